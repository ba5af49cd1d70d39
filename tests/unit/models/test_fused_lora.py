"""The fused forward of a plain LoRA layer: PEFT's numbers, less memory, and PEFT's own way wherever it is not plain."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import LoraConfig
from loralab.models import fused_lora
from loralab.models.adapters import build_adapter
from loralab.models.dropout import DropoutKeys, KeyedDropout
from loralab.models.fused_lora import fuse_lora
from support import quantized, tiny
from support.tiny_vision import build_vision_model

ROWS, WIDTH, OUT = 7, 12, 20


class Holder(nn.Module):
    """A model of one LoRA layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def build(kind: str, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, bias: bool = True) -> Any:
    torch.manual_seed(0)
    base = Conv1D(OUT, WIDTH) if kind == "conv1d" else nn.Linear(WIDTH, OUT, bias=bias)
    base.to(dtype).requires_grad_(False)
    if kind == "conv1d":
        base.bias.data.normal_()
    config = PeftConfig(r=4, lora_alpha=6.0, fan_in_fan_out=kind == "conv1d")
    layer: Any = LoraLinear(base, "default", config=config, r=4, lora_alpha=6.0, fan_in_fan_out=kind == "conv1d")
    layer.lora_A.float(), layer.lora_B.float()
    layer.lora_B["default"].weight.data.normal_()
    if dropout:
        keys = DropoutKeys(torch.arange(ROWS))
        layer.lora_dropout["default"] = KeyedDropout(dropout, layer=3, keys=keys)
    return layer


def outcome(layer: Any, *, dtype: torch.dtype = torch.float32, frozen_input: bool = False) -> list[Tensor]:
    """Return output and all gradients."""
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, ROWS, WIDTH, generator=source).to(dtype).requires_grad_(not frozen_input)
    out = layer(inputs)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = [*([] if frozen_input else [inputs]), a, b]
    gradients = torch.autograd.grad(out, wanted, torch.randn(out.shape, generator=source).to(out.dtype))
    assert [each.dtype for each in gradients[-2:]] == [torch.float32] * 2
    return [out.detach(), *gradients]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count how often PEFT's own forward runs."""
    seen: list[int] = []
    own = LoraLinear.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LoraLinear, "forward", counted)
    return seen


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
def test_outputs_and_gradients_are_pefts(kind: str, dropout: float, frozen_input: bool, calls: list[int]) -> None:
    layer = build(kind, dropout=dropout, bias=kind != "without bias")
    expected = outcome(layer, frozen_input=frozen_input)
    assert fuse_lora(Holder(layer), dtype=torch.float32).value == "1 layers"
    if dropout:  # the comparison at start has used the keys
        layer.lora_dropout["default"].keys.tokens = torch.arange(ROWS)
    calls.clear()
    found = outcome(layer, frozen_input=frozen_input)
    assert not calls
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_the_backward_sweep_is_the_input_itself() -> None:
    layer = build("linear", dtype=torch.bfloat16)
    fuse_lora(Holder(layer), dtype=torch.bfloat16)
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(inputs)
    own = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != inputs.untyped_storage().data_ptr()]
    # Beside the input: A, B and the image of the rows under A, all in the input's type.
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in own) == 4 * WIDTH + OUT * 4 + ROWS * 4


def test_half_precision_is_as_near_to_the_truth_as_pefts() -> None:
    exact = outcome(build("linear"))
    layer = build("linear", dtype=torch.bfloat16)
    theirs = outcome(layer, dtype=torch.bfloat16)
    fuse_lora(Holder(layer), dtype=torch.bfloat16)
    ours = outcome(layer, dtype=torch.bfloat16)
    for mine, peft, truth in zip(ours, theirs, exact, strict=True):
        error, bar = (float((each.float() - truth).abs().max()) for each in (mine, peft))
        assert error < 2.5 * bar + 1e-3


def test_whatever_is_not_plain_goes_pefts_way(calls: list[int]) -> None:
    layer = build("linear")
    fuse_lora(Holder(layer), dtype=torch.float32)
    inputs = torch.randn(ROWS, WIDTH)
    calls.clear()
    adapted = layer(inputs)
    assert not calls
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(inputs), layer.get_base_layer()(inputs))
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(layer(inputs), adapted, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    layer.update_layer("other", config=PeftConfig(r=2), r=2, lora_alpha=2)
    layer.set_adapter(["default", "other"])
    layer(inputs)
    assert len(calls) == 3


@pytest.mark.parametrize("variant", ["dora", "pissa", "vera", "ia3"])
def test_other_variants_keep_pefts_forward(variant: str) -> None:
    model, chosen = build_adapter(
        tiny.build_model("llama", vocabulary=64).requires_grad_(False),  # type: ignore[arg-type]
        LoraConfig(variant=variant, **({} if variant == "ia3" else {"r": 4})),
        seed=0,
    )
    assert chosen["lora_forward"].value == "off"
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, LoraLinear))


def test_a_forward_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    product = fused_lora._product
    monkeypatch.setattr(fused_lora, "_product", lambda base, rows: product(base, rows) * 1.01)
    layer = build("linear")
    chosen = fuse_lora(Holder(layer), dtype=torch.float32)
    assert chosen.value == "off"
    assert "layer differs from PEFT's own forward" in chosen.reason
    assert "forward" not in vars(layer)


def test_the_comparison_leaves_no_trace() -> None:
    layer = build("linear", dropout=0.2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    fuse_lora(Holder(layer), dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(weight.grad is None for weight in layer.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_layers_dequantize_and_keep_nothing(kind: str, tmp_path: Any) -> None:
    base = quantized.load(quantized.save_base(tmp_path, "llama"), quantization=kind)
    model, chosen = build_adapter(base, LoraConfig(r=4), seed=0)
    assert chosen["lora_forward"].value == "14 layers"
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    width = layer.in_features
    inputs = torch.randn(ROWS, width, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours = layer(inputs)
    assert max(kept) <= ROWS * max(width, 1)
    torch.testing.assert_close(ours, type(layer).forward(layer, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_layers_that_read_pictures_are_fused_with_dropout_too(family: Any) -> None:
    """Their keys are those of pictures, which a probe has to set."""
    base, _ = build_vision_model(family)
    model, _ = build_adapter(base, LoraConfig(r=2, dropout=0.1, vision="all"), seed=0)
    fused = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert any("visual" in name or "vision_tower" in name for name in fused)
    assert any("language_model" in name for name in fused)
