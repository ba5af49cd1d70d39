"""Kinds of adapters: what each is in PEFT, what it can stand on, and where it starts.

Owns the table of variants. Which keys a variant can use is told without a model, in
`config/lora_checks.py`; how the special ones start is in `first_weights.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import EvaConfig, IA3Config, LoHaConfig, LoKrConfig, PeftConfig, PeftModel, TaskType, VeraConfig
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.ia3 import IA3Layer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralab.config.lora_checks import FACTS, VariantFacts, quantization_fix
from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.models import first_weights
from loralab.models.first_weights import Beginning, Start
from loralab.models.precision import Resolved

_TASK = TaskType.CAUSAL_LM


@dataclass(frozen=True, slots=True)
class Site:
    """Where an adapter goes.

    Attributes:
        base: the frozen base.
        layers: full names of the layers that get an adapter.
        placement: the same in PEFT's words.
        seed: of the adapter's first weights.
    """

    base: PreTrainedModel
    layers: Sequence[str]
    placement: Mapping[str, Any]
    seed: int

    def holds_conv1d(self, *, as_loaded: bool) -> bool:
        """Return whether a layer is a Conv1D, as loaded or in the original of a quantized base.

        A quantized layer holds its weight as nn.Linear does; on the unquantized base an adapter meets the original.
        """
        modules = [self.base.get_submodule(name) for name in self.layers]
        if any(isinstance(module, Conv1D) for module in modules):
            return True
        return not as_loaded and any(getattr(module, "source_cls", None) is Conv1D for module in modules)


Builder = Callable[[LoraConfig, Site], PeftConfig]


def _build_lora(lora: LoraConfig, site: Site, **settings: Any) -> PeftConfig:
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        fan_in_fan_out=site.holds_conv1d(as_loaded=False),
        task_type=_TASK,
        **site.placement,
        **settings,
    )


def _build_doubled(lora: LoraConfig, site: Site) -> PeftConfig:
    """Build a plain LoRA of rank 2r: r ranks to train, and r that hold what these began as."""
    doubled: dict[str, Any] = {"r": 2 * lora.r, "alpha": 2 * lora.alpha}
    placement = dict(site.placement)
    for key in ("rank_pattern", "alpha_pattern"):
        if key in placement:
            placement[key] = {name: 2 * value for name, value in placement[key].items()}
    return _build_lora(lora.model_copy(update=doubled), Site(site.base, site.layers, placement, site.seed))


def _build_eva(lora: LoraConfig, site: Site) -> PeftConfig:
    # An EvaConfig is PEFT's word for how the first weights are found; they and the ranks are put in afterwards.
    return _build_lora(lora, site, init_lora_weights="eva", eva_config=EvaConfig(rho=lora.eva_rho))


def _build_vera(lora: LoraConfig, site: Site) -> PeftConfig:
    return VeraConfig(
        r=lora.r,
        vera_dropout=lora.dropout,
        projection_prng_key=site.seed,
        save_projection=True,  # a generator's numbers are no promise across versions of torch
        fan_in_fan_out=site.holds_conv1d(as_loaded=True),
        task_type=_TASK,
        **site.placement,
    )


def _build_lycoris(kind: type[LoHaConfig] | type[LoKrConfig], lora: LoraConfig, site: Site) -> PeftConfig:
    return kind(r=lora.r, alpha=lora.alpha, task_type=_TASK, **site.placement)  # type: ignore[arg-type]


def _build_ia3(lora: LoraConfig, site: Site) -> PeftConfig:
    names = FEEDFORWARD.get(site.base.config.get_text_config().model_type, [])
    # A regular expression, since PEFT wants plain names to be among the target modules word for word.
    inputs: str | list[str] = rf"(.*\.)?({'|'.join(map(re.escape, names))})" if names else []
    return IA3Config(
        feedforward_modules=inputs,
        fan_in_fan_out=site.holds_conv1d(as_loaded=True),
        task_type=_TASK,
        **site.placement,
    )


def _start_at_ones(model: PeftModel, _: Beginning) -> Resolved[str]:
    """Say what PEFT scales; it starts at ones by itself."""
    scaled = [module for module in model.modules() if isinstance(module, IA3Layer)]
    inputs = sum(bool(module.is_feedforward) for module in scaled)
    what = "the inputs of feed-forward outputs, as PEFT knows them in this family, and the outputs of other layers"
    return Resolved("ones", f"scaled: {what} ({inputs} and {len(scaled) - inputs} layers)")


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of adapter.

    Attributes:
        facts: the keys that it can use and the quantizations that it can stand on.
        build: makes PEFT's configuration.
        start: gives the adapter its first weights, where they are not PEFT's own.
        is_a_start: whether the start is all that makes the variant, which is a plain LoRA otherwise.
        takes_conv1d: whether it can adapt layers that hold their weights the other way round (GPT-2's).
    """

    facts: VariantFacts
    build: Builder
    start: Start | None = None
    is_a_start: bool = False
    takes_conv1d: bool = True


def check_site(name: str, site: Site) -> None:
    """Check that a variant can stand on a base.

    Args:
        name: of the variant.
        site: where it goes.

    Raises:
        ConfigError: it cannot.
    """
    variant = VARIANTS[name]
    held = held_quantization(site.base)
    if held not in variant.facts.quantizations:
        raise ConfigError(
            f"variant {name} on weights in {held}: {variant.facts.why_not}",
            where="keys lora.variant, model.name",
            fix=quantization_fix(variant.facts),
        )
    if not variant.takes_conv1d and site.holds_conv1d(as_loaded=False):
        takes = ", ".join(
            other for other, each in VARIANTS.items() if each.takes_conv1d and held in each.facts.quantizations
        )
        raise ConfigError(
            f"variant {name} on {type(site.base).__name__}, whose layers are Conv1D: PEFT has it for nn.Linear alone",
            where="key lora.variant",
            fix=f"set lora.variant: {takes}",
        )


def needs_activations(lora: LoraConfig) -> bool:
    """Return whether first weights come from what the base makes of training rows."""
    return lora.variant == "eva"


def residual_rank(lora: LoraConfig) -> int | None:
    """Return how many directions of what quantization changes a variant needs, or None for one that needs none."""
    return max([lora.r, *(lora.rank_pattern or {}).values()]) if lora.variant == "loftq" else None


def held_quantization(base: PreTrainedModel) -> str:
    """Return how the linear layers of a base are held: none, nf4, fp4 or int8."""
    for module in base.modules():
        if hasattr(module, "dequantized"):
            return str(getattr(module.weight, "quant_type", "int8"))
    return "none"


VARIANTS: dict[str, Variant] = {
    "lora": Variant(FACTS["lora"], _build_lora),
    "rslora": Variant(FACTS["rslora"], partial(_build_lora, use_rslora=True)),
    "dora": Variant(FACTS["dora"], partial(_build_lora, use_dora=True), first_weights.start_at_exact_magnitudes),
    "lora_plus": Variant(FACTS["lora_plus"], _build_lora),
    "pissa": Variant(FACTS["pissa"], _build_doubled, first_weights.start_at_principal, is_a_start=True),
    "olora": Variant(FACTS["olora"], _build_doubled, first_weights.start_at_orthogonal, is_a_start=True),
    "eva": Variant(FACTS["eva"], _build_eva, first_weights.start_at_directions, is_a_start=True),
    "loftq": Variant(FACTS["loftq"], _build_lora, first_weights.start_at_quantization_error, is_a_start=True),
    "vera": Variant(FACTS["vera"], _build_vera),
    "loha": Variant(FACTS["loha"], partial(_build_lycoris, LoHaConfig), takes_conv1d=False),
    "lokr": Variant(FACTS["lokr"], partial(_build_lycoris, LoKrConfig), takes_conv1d=False),
    "ia3": Variant(FACTS["ia3"], _build_ia3, _start_at_ones),
}
