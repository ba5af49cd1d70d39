"""Where adapters start that do not start from noise and zero.

Owns PiSSA's and OLoRA's start at a part of the base's weights, LoftQ's at what quantization changed,
EVA's at directions of activations, and DoRA's exact magnitudes.

PiSSA and OLoRA are known as variants that rewrite the base: W becomes W - s B0 A0, and B A starts at
B0 A0. Here the base stays as it is, in every precision and quantization. The same function is
W + s (B A - B0 A0), and that is what runs: a LoRA layer of rank 2r whose second half is fixed. So what
is saved is a plain LoRA adapter, to the bit the one that was trained; figures of the base are those
of untouched weights; and nothing is lost to the rounding of rewritten weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from loralab.errors import ConfigError, ModelError
from loralab.models.factors import EXACT_WIDTH, ITERATIONS, Factors, orthogonal_factors, principal_factors
from loralab.models.precision import Resolved

ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Beginning:
    """What first weights are made from.

    Attributes:
        saved: whether saved weights come next, so that nothing needs computing.
        directions: A of each layer (R, in) by its name, for EVA.
    """

    saved: bool = False
    directions: Mapping[str, Tensor] = field(default_factory=dict)


Start = Callable[[PeftModel, Beginning], Resolved[str]]
_SAVED = "from the saved adapter"


class HalfFixed(nn.Linear):
    """One factor of a LoRA layer of rank 2R: R ranks are trained, and R are what these began as.

    Its state is that of PEFT's layer of rank 2R.

    Args:
        start: the factor at the start: A (R, in) or B (out, R).
        ranks: the dimension that ranks lie along.
        sign: of the fixed half.
    """

    def __init__(self, start: Tensor, *, ranks: int, sign: float) -> None:
        sizes = list(start.shape)
        sizes[ranks] *= 2
        super().__init__(sizes[1], sizes[0], bias=False, device="meta")
        self.ranks = ranks
        self.weight = nn.Parameter(start.clone())
        self.fixed: Tensor
        self.register_buffer("fixed", sign * start, persistent=False)

    def whole(self) -> Tensor:
        """Return both halves."""
        return torch.cat([self.weight, self.fixed], dim=self.ranks)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product with both halves."""
        return functional.linear(inputs, self.whole())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        whole = self.whole()
        destination[f"{prefix}weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        whole = state_dict.get(f"{prefix}weight")
        if isinstance(whole, Tensor) and whole.shape == (self.out_features, self.in_features):
            trained, fixed = whole.chunk(2, dim=self.ranks)
            state_dict[f"{prefix}weight"] = trained
            self.fixed.copy_(fixed)
        super()._load_from_state_dict(state_dict, prefix, *others)


def start_at_principal(model: PeftModel, beginning: Beginning) -> Resolved[str]:
    """Start at the principal part of each weight.

    Source: Meng, Wang & Zhang 2024, PiSSA, section 3.
    """

    def factors(weight: Tensor, rank: int, scale: float) -> Factors:
        return _scaled(principal_factors(weight, rank), scale)

    how = f"exact up to a width of {EXACT_WIDTH}, by {ITERATIONS} subspace iterations beyond"
    return _start_inside(model, beginning, factors, f"the principal components of each weight ({how})")


def start_at_orthogonal(model: PeftModel, beginning: Beginning) -> Resolved[str]:
    """Start at the leading part of each weight's QR decomposition.

    Source: Büyükakyüz 2024, OLoRA, algorithm 1.
    """
    return _start_inside(
        model,
        beginning,
        lambda weight, rank, _: orthogonal_factors(weight, rank),
        "the QR decomposition of each weight",
    )


def _start_inside(
    model: PeftModel, beginning: Beginning, factors: Callable[[Tensor, int, float], Factors], what: str
) -> Resolved[str]:
    """Start every layer at a part of its weight, which a fixed second half takes off again."""
    for name, layer in lora_layers(model):
        rank, parts = layer.r[ADAPTER] // 2, (layer.lora_A, layer.lora_B)
        first, second = (part[ADAPTER].weight.detach() for part in parts)
        if not beginning.saved:
            weight = held_weight(layer)
            _check_rank(name, rank, weight.shape)
            pair = factors(weight, rank, layer.scaling[ADAPTER])
        else:
            pair = first[:rank], second[:, :rank]
        parts[0][ADAPTER] = HalfFixed(pair[0].to(first), ranks=0, sign=1.0)
        parts[1][ADAPTER] = HalfFixed(pair[1].to(second), ranks=1, sign=-1.0)
    form = "saved as a plain LoRA of rank 2r: what was trained, less what it began as; the base is not rewritten"
    return Resolved(_SAVED if beginning.saved else what, form)


def start_at_quantization_error(model: PeftModel, beginning: Beginning) -> Resolved[str]:
    """Start at what quantization took from each weight, as far as the rank reaches.

    Source: Li et al. 2023, LoftQ, algorithm 1 with one iteration (more would quantize the base anew).
    """
    done = left = 0
    for name, layer in lora_layers(model):
        held: Any = layer.get_base_layer()
        residual: Factors | None = getattr(held, "residual", None)
        if beginning.saved or residual is None:
            left += residual is None
            continue
        first, second = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        rank = layer.r[ADAPTER]
        _check_rank(name, rank, (held.out_features, held.in_features))
        pair = _scaled((residual[0][:rank], residual[1][:, :rank]), layer.scaling[ADAPTER])
        first.data.copy_(pair[0])
        second.data.copy_(pair[1])
        done += 1
    for module in model.modules():
        if hasattr(module, "residual"):
            module.residual = None  # type: ignore[assignment]
    if beginning.saved:
        return Resolved(_SAVED, "the quantized base is not rewritten")
    if not done:
        raise ModelError(
            "variant loftq, but none of the adapted layers was quantized",
            where="keys lora.variant, lora.target_modules",
            fix="adapt quantized layers, or set lora.variant: lora",
        )
    rest = f"; {left} layers that are not quantized start as in lora" if left else ""
    what = f"the leading part of what quantization changed, in {done} layers"
    return Resolved(what, f"one iteration, so that the quantized base is not rewritten{rest}")


def start_at_directions(model: PeftModel, beginning: Beginning) -> Resolved[str]:
    """Start A at the leading directions of each layer's inputs; B is zero.

    Source: Paischer et al. 2024, EVA, section 3.
    """
    if beginning.saved:
        return Resolved(_SAVED, "nothing is computed anew; ranks are the saved ones")
    ranks = []
    for name, layer in lora_layers(model):
        directions = beginning.directions[name]
        layer.lora_A[ADAPTER].weight.data.copy_(directions)
        ranks.append(len(directions))
    removed = len(beginning.directions) - len(ranks)
    without = f"; {removed} layers explain so little that they have none" if removed else ""
    what = "the leading directions of each layer's inputs"
    return Resolved(what, f"ranks {min(ranks)} to {max(ranks)} by explained variance{without}")


def start_at_exact_magnitudes(model: PeftModel, beginning: Beginning) -> Resolved[str]:
    """Start DoRA's magnitudes at the norms of the weights in float32, so that nothing is changed at the start.

    PEFT rounds them to the type of the base.
    """
    what = "magnitudes are the norms of the weights, in float32"
    why = "so that a fresh adapter changes nothing, whatever the type of the base"
    if next(model.parameters()).is_meta:
        return Resolved(what, why)
    check_dora(model)
    for _, layer in lora_layers(model):
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        magnitude.data = torch.linalg.norm(held_weight(layer), dim=1).to(magnitude.device)
    return Resolved(_SAVED if beginning.saved else what, why)


def check_dora(model: PeftModel) -> None:
    """Check that PEFT's DoRA sees the weights that the quantized layers multiply with.

    PEFT dequantizes with the library's own kernel, which on a CPU is wrong for some widths.

    Raises:
        ModelError: it does not.
    """
    for name, layer in lora_layers(model):
        held: Any = layer.get_base_layer()
        if not hasattr(held, "dequantized"):
            continue
        if not torch.equal(dequantize_module_weight(held).float(), held.dequantized(torch.float32)):
            raise ModelError(
                f"variant dora on {name!r}: bitsandbytes dequantizes its {held.in_features} x {held.out_features} "
                f"weights wrongly on {held.weight.device.type}, and PEFT's DoRA relies on that",
                where="keys lora.variant, model.quantization",
                fix="set model.quantization: int8 or none, or lora.variant: lora",
            )


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every LoRA layer, with its name in the base."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def held_weight(layer: Any) -> Tensor:
    """Return the weight that an adapted layer stands on (out, in), in float32."""
    held = layer.get_base_layer()
    if hasattr(held, "dequantized"):
        dequantized: Tensor = held.dequantized(torch.float32)
        return dequantized
    weight: Tensor = held.weight.detach().float()
    return weight.T if isinstance(held, Conv1D) else weight


def _check_rank(name: str, rank: int, shape: Sequence[int]) -> None:
    """Check that a matrix has as many components as the rank.

    Raises:
        ConfigError: it has fewer.
    """
    if rank > min(shape):
        raise ConfigError(
            f"r {rank} is more than layer {name!r} has components ({min(shape)})",
            where="key lora.r",
            fix=f"set lora.r: {min(shape)} or less, or leave the layer out of lora.target_modules",
        )


def _scaled(factors: Factors, scale: float) -> Factors:
    """Return factors whose product, times the scale, is that of `factors`."""
    root = scale**0.5
    return factors[0] / root, factors[1] / root
