"""Rules over the adapter: what each variant can use.

Owns which keys of `lora` act in which variant, and which quantizations it can stand on: what can be
told without a model. What needs the base is checked in `models/variants.py`.
"""

from dataclasses import dataclass

from loralab.config.findings import Finding
from loralab.config.schema import Config, LoraConfig

_PLACES = frozenset({"target_modules", "vision", "layers_to_transform", "modules_to_save"})
_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
_LORA = _PLACES | _PATTERNS | {"r", "alpha", "dropout", "trainable_token_indices"}
_LYCORIS = _PLACES | _PATTERNS | {"r", "alpha"}
_EVERY = frozenset({"none", "nf4", "fp4", "int8"})


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """What a variant can use.

    Attributes:
        keys: keys of `lora` that act, `variant` aside.
        quantizations: values of `model.quantization` that it can stand on.
        why_not: why it cannot stand on the others.
    """

    keys: frozenset[str]
    quantizations: frozenset[str] = _EVERY
    why_not: str = ""


_PACKED = "PEFT shapes the update as the stored weight, which 4 bits pack"
FACTS: dict[str, VariantFacts] = {
    "lora": VariantFacts(_LORA),
    "rslora": VariantFacts(_LORA),
    "dora": VariantFacts(_LORA),
    "lora_plus": VariantFacts(_LORA | {"loraplus_lr_ratio"}),
    "pissa": VariantFacts(_LORA),
    "olora": VariantFacts(_LORA),
    # EVA deals out ranks by itself, among the layers that it saw: those of text.
    "eva": VariantFacts((_LORA - _PATTERNS - {"vision"}) | {"eva_rho", "eva_rows"}),
    "loftq": VariantFacts(_LORA, frozenset({"nf4", "fp4"}), "it makes up for what 4-bit quantization changed"),
    "vera": VariantFacts(_PLACES | {"r", "dropout"}),
    "loha": VariantFacts(_LYCORIS, frozenset({"none", "int8"}), _PACKED),
    "lokr": VariantFacts(_LYCORIS, frozenset({"none", "int8"}), _PACKED),
    "ia3": VariantFacts(_PLACES - {"layers_to_transform"}),
}


def check_variant_keys(config: Config) -> list[Finding]:
    """Find keys that the variant cannot use."""
    lora = config.lora
    unusable = [
        name
        for name in LoraConfig.model_fields
        if name != "variant" and name not in FACTS[lora.variant].keys and lora.chosen(name)
    ]
    return [_unusable(lora, name) for name in unusable]


def _unusable(lora: LoraConfig, name: str) -> Finding:
    others = [variant for variant, facts in FACTS.items() if name in facts.keys]
    listed = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} or {others[-1]}"
    what = f"{name} {getattr(lora, name)!r} with variant {lora.variant}, which cannot use it"
    return Finding(f"lora.{name}", what, f"remove it, or set lora.variant: {listed}")


def check_variant_quantization(config: Config) -> list[Finding]:
    """Find a quantization that the variant cannot stand on."""
    variant, quantization = config.lora.variant, config.model.quantization
    facts = FACTS[variant]
    if quantization in facts.quantizations:
        return []
    what = f"variant {variant} with quantization {quantization}: {facts.why_not}"
    return [Finding("lora.variant", what, quantization_fix(facts))]


def quantization_fix(facts: VariantFacts) -> str:
    """Return what to do about a quantization that a variant cannot stand on."""
    listed = " or ".join(name for name in ("none", "nf4", "fp4", "int8") if name in facts.quantizations)
    return f"set model.quantization: {listed}, or lora.variant: lora"


RULES = (check_variant_keys, check_variant_quantization)
