"""Quantized layers: what they compute, how they get into a base, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft.tuners.lora import bnb as peft_layers
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loralab.config.schema import LoraConfig, ModelConfig
from loralab.errors import ModelError
from loralab.models.adapters import build_adapter
from loralab.models.load import count_parameters, load_base_model, load_model_config
from loralab.models.quantized import (
    QuantizedLinear4bit,
    describe_quantization,
    quantized_layers,
)
from support import quantized, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


def layer_4bit(rows: int, columns: int, kind: str = "nf4", **settings: Any) -> Any:
    dtype = settings.pop("dtype", torch.float32)
    plain = bitsandbytes.nn.Linear4bit(columns, rows, quant_type=kind, **settings)
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(dtype)
    plain.weight = bitsandbytes.nn.Params4bit(
        weight, quant_type=kind, compress_statistics=settings.get("compress_statistics", True), module=plain
    ).to("cpu")
    return plain


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(64, 64), (96, 32), (5, 96), (172, 64), (64, 172), (48, 36), (7, 5), (33, 17), (3, 2), (1, 2)]
)
def test_weights_are_what_the_format_says(rows: int, columns: int, kind: str, double: bool) -> None:
    layer = QuantizedLinear4bit.adopt(layer_4bit(rows, columns, kind, compress_statistics=double))
    expected = quantized.expected_weights(layer)
    assert torch.allclose(layer.dequantized(torch.float32), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_a_layer_is_the_plain_one_of_its_dequantized_weights(kind: str, tmp_path: Path) -> None:
    loaded = quantized.load(quantized.save_base(tmp_path, "qwen2, widths 96 and 36"), **quantized.KINDS[kind])
    for _, layer in quantized_layers(loaded):
        weight = quantized.expected_weights(layer)
        inputs = torch.randn(2, 3, layer.in_features, requires_grad=True)
        plain = inputs.detach().clone().requires_grad_()
        upstream = torch.randn(2, 3, layer.out_features)
        for training in (True, False, True):
            layer.train(training)
            found = layer(inputs)
            found.backward(upstream)
            expected = functional.linear(plain, weight, layer.bias)
            expected.backward(upstream)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert torch.allclose(inputs.grad, plain.grad, rtol=1e-5, atol=1e-5)
            inputs.grad = plain.grad = None


def test_products_are_in_the_type_of_the_input() -> None:
    layer = QuantizedLinear4bit.adopt(layer_4bit(96, 44))
    inputs = torch.randn(3, 44, dtype=torch.bfloat16)
    assert torch.equal(
        layer(inputs), functional.linear(inputs, layer.dequantized(torch.bfloat16), layer.bias.bfloat16())
    )
    assert layer.bias.dtype == torch.float32  # untouched


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the library's own products and its packing fail."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the library's own kernel was taken")

    for name in names:
        module, _, attribute = name.rpartition(".")
        monkeypatch.setattr(f"{module}.{attribute}", fail)


FORBIDDEN = (
    "bitsandbytes.nn.modules._convert_weight_packed_for_cpu",
    "bitsandbytes.matmul_4bit",
    "bitsandbytes.matmul",
)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_the_packed_inference_kernel_is_never_taken(base: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build_adapter(quantized.load(base, **quantized.KINDS[kind]), LoraConfig(r=2), seed=0)
    layers = dict(quantized_layers(model))
    before = {name: layer.weight.data.clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = True  # as on the processors that have the kernel
    forbid(monkeypatch, *FORBIDDEN)
    model.eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        model(input_ids=ids)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    for name, layer in layers.items():
        assert torch.equal(layer.weight.data, before[name]), name
        assert not getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)


def test_the_library_would_take_that_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above has power: the library's layer, asked in the same way, fails."""
    layer = layer_4bit(64, 64)
    layer.support_avx512bf16_for_cpu = True
    forbid(monkeypatch, FORBIDDEN[0])
    layer.eval()
    with pytest.raises(AssertionError, match="own kernel"), torch.no_grad():
        layer(torch.randn(2, 64))


def test_peft_and_the_library_know_the_layers(base: Path) -> None:
    four, _ = build_adapter(quantized.load(base, quantization="nf4"), LoraConfig(r=2), seed=0)
    eight, _ = build_adapter(quantized.load(base, quantization="int8"), LoraConfig(r=2), seed=0)
    assert sum(isinstance(module, peft_layers.Linear4bit) for module in four.modules()) == 14
    assert sum(isinstance(module, peft_layers.Linear8bitLt) for module in eight.modules()) == 14
    assert all(isinstance(layer, bitsandbytes.nn.Linear4bit) for _, layer in quantized_layers(four))


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2, with bias"])
def test_head_and_embeddings_stay_as_they_are(shape: str, tmp_path: Path) -> None:
    folder = quantized.save_base(tmp_path, shape)
    loaded, plain = quantized.load(folder, quantization="nf4"), quantized.load(folder)
    for held, own in (
        (loaded.get_output_embeddings(), plain.get_output_embeddings()),
        (loaded.get_input_embeddings(), plain.get_input_embeddings()),
    ):
        assert type(held) is type(own)
        assert torch.equal(held.weight, own.weight)
    assert count_parameters(loaded)[0] == count_parameters(plain)[0]


def test_the_adapter_of_a_quantized_conv1d_fits_the_original(tmp_path: Path) -> None:
    folder = quantized.save_base(tmp_path, "gpt2")
    model, _ = build_adapter(quantized.load(folder, quantization="nf4"), LoraConfig(r=2), seed=0)
    assert model.peft_config["default"].fan_in_fan_out is True


@pytest.mark.parametrize("shape", ["gpt2, width 44", "llama, widths 44 and 172"])
def test_the_recorded_error_is_the_one_of_the_weights(shape: str, tmp_path: Path) -> None:
    folder = quantized.save_base(tmp_path, shape)
    loaded, plain = quantized.load(folder, quantization="fp4"), quantized.load(folder)
    squared = reference = 0.0
    for name, layer in quantized_layers(loaded):
        original = plain.get_submodule(name).weight
        original = original.T if shape.startswith("gpt2") else original
        squared += float((quantized.expected_weights(layer) - original).square().sum())
        reference += float(original.square().sum())
    facts = describe_quantization(loaded)
    assert facts is not None
    assert facts["error"]["relative"] == pytest.approx((squared / reference) ** 0.5, rel=1e-4)
    assert facts["error"]["mean_squared"] == pytest.approx(squared / facts["weights"], rel=1e-4)
    assert 4.0 < facts["bits_per_weight"] < 4.4
    assert describe_quantization(plain) is None


def test_errors_order_as_the_formats_do(base: Path) -> None:
    errors = {
        kind: describe_quantization(quantized.load(base, **settings))["error"]["relative"]  # type: ignore[index]
        for kind, settings in quantized.KINDS.items()
    }
    assert errors["int8"] < 0.01 < errors["nf4"] < errors["fp4"] < 0.2


# --- weights that come quantized ---------------------------------------------------------------------------------


def store_quantized(base: Path, folder: Path, **settings: Any) -> Path:
    """Write a base as Hub repositories of bitsandbytes weights hold it, by the library's own way."""
    config = BitsAndBytesConfig(**settings)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4, double"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
    ],
    ids=["nf4", "fp4", "int8"],
)
@pytest.mark.parametrize("shape", ["gpt2", "qwen2, widths 96 and 36"])
def test_weights_that_come_quantized_are_taken_as_they_are(
    shape: str, settings: dict[str, Any], value: str, tmp_path: Path
) -> None:
    folder = quantized.save_base(tmp_path / "base", shape)
    stored = store_quantized(folder, tmp_path / "stored", **settings)
    loaded, choices = load_base_model(ModelConfig(name=str(stored)), dtype=torch.float32, device=CPU)
    assert choices["quantization"].value == value
    assert choices["quantization"].reason.startswith("the weights are stored so")
    kind, _, double = value.partition(", ")
    own = quantized.load(
        folder, quantization=kind, **({} if double or kind == "int8" else {"double_quantization": False})
    )
    ids = torch.arange(3, 12)[None]
    assert torch.allclose(loaded(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-5)
    facts = describe_quantization(loaded)
    assert facts is not None
    assert facts["error"] is None  # the originals were never seen
    same = ModelConfig(name=str(stored), quantization=kind)  # type: ignore[arg-type]
    load_base_model(same, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quantization": "fp4"}, "whose weights are stored in nf4"),
        ({"quantization": "int8"}, "whose weights are stored in nf4"),
        ({"double_quantization": False}, "are stored with it"),
    ],
)
def test_another_quantization_than_the_stored_one(
    base: Path, tmp_path: Path, settings: dict[str, Any], what: str
) -> None:
    stored = store_quantized(
        base, tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with pytest.raises(ModelError, match=what):
        quantized.load(stored, **settings)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "hqq", "compressed-tensors", "aqlm", "torchao"])
def test_other_formats_are_refused_by_name(base: Path, tmp_path: Path, method: str) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_model_config(ModelConfig(name=str(tmp_path)))
    (problem,) = caught.value.problems
    assert f"quantized by {method.upper() if len(method) < 6 else method};" in problem.what
    assert problem.where == "key model.name"
    assert "name the unquantized model" in problem.fix


# --- what cannot be ----------------------------------------------------------------------------------------------


def test_double_quantization_without_quantization(base: Path) -> None:
    with pytest.raises(ModelError, match="double_quantization false with quantization none"):
        quantized.load(base, double_quantization=False)


def test_other_devices_and_installations_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nf4 = ModelConfig(name=str(base), quantization="nf4")
    with pytest.raises(ModelError, match="nf4 on mps: it is offered on cuda and cpu"):
        load_base_model(nf4, dtype=torch.float32, device=torch.device("mps"))
    monkeypatch.setattr("loralab.models.quantization.BITSANDBYTES", False)
    with pytest.raises(ModelError, match="needs the package bitsandbytes"):
        load_base_model(nf4, dtype=torch.float32, device=CPU)


def test_a_model_whose_kernels_read_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ModelError, match="a mamba model, whose kernels read weights past their layers"):
        quantized.load(tmp_path, quantization="int8")
