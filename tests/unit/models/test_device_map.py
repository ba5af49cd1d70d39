"""`model.device_map`: one device, an error for several processes, and a base that is spread.

There are no two GPUs here. A base is dispatched by accelerate's hooks, which compute everything on the CPU: numbers
must stay the same. And its second half lies on the meta device, where every operation that mixes the two is refused:
what no hook carries must be carried by us.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loralab.config.schema import LoraConfig, ModelConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.errors import ConfigError, ModelError
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Layout, Planner
from loralab.models import device_map
from loralab.models.adapters import build_adapter
from loralab.models.device_map import (
    describe_spread,
    is_spread,
    put_whole,
    resolve_device_map,
    select_gpus,
    spreads,
    tightest_free_bytes,
    visible_devices,
)
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import model_inputs, run_micro_batches
from support import tiny
from support.layouts import ALWAYS_SHARE

CPU = torch.device("cpu")
FAR = torch.device("meta")  # the second device: it holds no numbers
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
SECOND = PARTS[3:]


def section(**fields: Any) -> ModelConfig:
    return ModelConfig(name="base", **fields)


def see(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)


def test_one_device_holds_everything() -> None:
    assert resolve_device_map(section(), CPU, processes=2) == {}
    chosen = resolve_device_map(section(device_map="auto"), CPU, processes=1)["device_map"]
    assert (chosen.value, chosen.reason) == ("auto", "one device: all layers are on cpu")


def test_several_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="of 2 processes") as caught:
        resolve_device_map(section(device_map="auto"), CPU, processes=2)
    assert "training.distributed: fsdp2" in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("gpus", "fields", "spread"),
    [
        (2, {"device_map": "auto"}, True),
        (2, {"device_map": "auto", "device": "cuda"}, True),
        (2, {"device_map": "auto", "device": "cuda:1"}, False),
        (2, {"device_map": "auto", "device": "cpu"}, False),
        (2, {}, False),
        (1, {"device_map": "auto"}, False),
        (0, {"device_map": "auto"}, False),
    ],
)
def test_a_base_is_spread_over_several_gpus_alone(
    gpus: int, fields: dict[str, Any], spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(gpus, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    model = section(**fields)
    assert spreads(model) == spread
    hidden = gpus > 1 and not spread and model.device != "cpu"
    assert (select_gpus(model) is not None) == hidden  # the others stay visible where they are used
    told = resolve_device_map(model, CPU, processes=1)
    assert ("over 2 GPUs" in told["device_map"].reason) == spread if model.device_map else told == {}
    assert len(visible_devices(model, CPU)) == (2 if spread else 1)


def test_a_process_of_a_launcher_spreads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    see(2, monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not spreads(section(device_map="auto"))


def test_places_are_told() -> None:
    base = SimpleNamespace(hf_device_map={"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1})
    told = describe_spread(base, section(device_map="auto"))["device_map"].reason
    assert told == "2 parts on GPU 0, 1 parts on GPU 1; they compute one after another; not tested on several GPUs"
    whole = SimpleNamespace(hf_device_map={"": 0}, device=CPU)
    assert describe_spread(whole, section(device_map="auto"))["device_map"].reason.startswith("one device")
    assert describe_spread(base, section()) == {}


def test_layers_in_main_memory_are_refused() -> None:
    base = nn.Linear(1, 1)
    base.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": "cpu", "lm_head": "disk"}
    with pytest.raises(ModelError, match="2 parts of 'base' find no room"):
        describe_spread(base, section(device_map="auto"))


def test_the_tightest_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dispatched()
    gpus = {torch.device("cuda", 0): 5, torch.device("cuda", 1): 3, CPU: 9}
    monkeypatch.setattr(device_map, "free_bytes", gpus.__getitem__)
    monkeypatch.setattr(device_map, "spread_devices", lambda _: [device for device in gpus if device != CPU])
    assert tightest_free_bytes(model, torch.device("cuda", 0)) == 3
    assert tightest_free_bytes(nn.Linear(1, 1), CPU) == 9


def build_base() -> Any:
    base: Any = tiny.build_model(vocabulary=300)
    return base.requires_grad_(False)


def adapted(base: Any, **lora: Any) -> SupervisedPeftModel:
    model, _ = build_adapter(base, LoraConfig(r=4, dropout=0.1, **lora), seed=1)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def dispatched(**lora: Any) -> SupervisedPeftModel:
    """Return a model whose modules have accelerate's hooks, all on the CPU."""
    base = build_base()
    dispatch_model(base, dict.fromkeys(PARTS, "cpu"), force_hooks=True)
    return adapted(base, **lora)


def micro_batches(layout: Layout) -> list[MicroBatch]:
    def ids(*numbers: int) -> Any:
        return torch.tensor(numbers, dtype=torch.int32).numpy()

    prompts = [ids(3, 1, 4, 1, 5), ids(3, 1, 4, 7, 7, 2), ids(9, 2)]
    rows = [TokenizedExample(i + 1, 0, (Branch(prompt, ids(8, i + 2, 8)),)) for i, prompt in enumerate(prompts)]
    return Planner(64, layout=layout, cost=ALWAYS_SHARE)(rows).micro_batches


def losses_and_gradients(model: SupervisedPeftModel, layout: Layout) -> list[Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    model.tree_kernel = None if layout == "padded" else "per_tree"
    found = run_micro_batches(model, micro_batches(layout), device=CPU, backward=Tensor.backward, dropout_key=(3, 2))
    return [found.total, *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_hooks_change_no_number(layout: Layout) -> None:
    spread = dispatched()
    assert is_spread(spread)
    whole, parts = losses_and_gradients(adapted(build_base()), layout), losses_and_gradients(spread, layout)
    assert len(whole) == len(parts) > 20
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_spread_model_is_not_moved() -> None:
    model = dispatched()
    model.to = None  # type: ignore[assignment]  # would fail if it were called
    put_whole(model, CPU)
    linear = nn.Linear(1, 1)
    put_whole(linear, torch.device("meta"))
    assert linear.weight.is_meta


class TwoDevices(TorchDispatchMode):
    """Refuses operations on tensors of two devices, index tensors included, and lets them be copied between these."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        found = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.dim() > 0]
        assert copies or len({each.device for each in found}) <= 1, f"{func} mixes devices"
        if copies and found and found[0].is_meta and kwargs.get("device", FAR) != FAR:
            return torch.zeros(found[0].shape, dtype=kwargs.get("dtype") or found[0].dtype)
        return func(*args, **kwargs)


def halve(model: SupervisedPeftModel) -> None:
    """Put the second half of a dispatched model on another device."""
    base: Any = model.language_model
    for part in SECOND:
        base.get_submodule(part).to(FAR)
        for module in base.get_submodule(part).modules():
            if hasattr(module, "_hf_hook"):
                module._hf_hook.execution_device = FAR


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_nothing_mixes_devices(layout: Layout, lora: dict[str, Any]) -> None:
    model = dispatched(**lora)
    model.tree_kernel = None if layout == "padded" else "per_tree"
    halve(model)
    model.train()
    with TwoDevices():
        for batch in micro_batches(layout):
            inputs = model_inputs(batch)
            losses = model(**inputs, dropout_key=(3, 2)).losses
            assert losses.device == CPU  # where the inputs are
            losses.sum().backward()
            with torch.no_grad():
                assert {each.device for each in model(**inputs, dropout_key=(3, 2), statistics=True)} == {CPU}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.device for weight in trained} == {CPU, FAR}
    assert all(weight.grad is not None and weight.grad.device == weight.device for weight in trained)
