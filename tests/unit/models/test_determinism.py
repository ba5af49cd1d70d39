"""The switch to deterministic algorithms: left alone on a CPU, restored after a run, given up with its reason."""

from typing import Any

import pytest
import torch
from torch.utils import deterministic

from loralab.config.schema import LoraConfig
from loralab.models import determinism
from loralab.models.adapters import build_adapter
from loralab.models.determinism import resolve_determinism, restored_algorithms
from loralab.models.supervised import SupervisedPeftModel
from support import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def model() -> SupervisedPeftModel:
    base: Any = tiny.build_model("llama", vocabulary=97).requires_grad_(False)
    return build_adapter(base, LoraConfig(r=4), seed=0)[0]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the probe of a CUDA device run here."""
    probe = determinism._train_on_probe
    monkeypatch.setattr(determinism, "_train_on_probe", lambda model, _device: probe(model, CPU))
    monkeypatch.setattr(torch.random, "fork_rng", _fork)


def _fork(devices: list[torch.device]) -> Any:
    assert devices
    return torch.inference_mode(False)


def test_nothing_is_switched_on_a_cpu(model: SupervisedPeftModel) -> None:
    with restored_algorithms():
        assert resolve_determinism(model, CPU) == {}
        assert not torch.are_deterministic_algorithms_enabled()


def test_algorithms_are_switched_and_restored(model: SupervisedPeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    filled = deterministic.fill_uninitialized_memory
    with restored_algorithms():
        found = resolve_determinism(model, CUDA)["deterministic"]
        assert found.value == "on"
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert deterministic.fill_uninitialized_memory is filled
    assert all(weight.grad is None for weight in model.parameters())


class _Refuses:
    """Stands for a layer whose operation is refused."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, *_: Any) -> None:
        raise RuntimeError(self.text)


def test_model_that_needs_another_operation_is_told_apart(model: SupervisedPeftModel) -> None:
    text = "cumsum_cuda_kernel does not have a deterministic implementation, but you set it.\nYou can turn it off."
    model.language_model.model.layers[0].register_forward_pre_hook(_Refuses(text))
    with restored_algorithms():
        found = resolve_determinism(model, CUDA)["deterministic"]
        assert found.value == "off"
        assert found.reason.startswith("a resumed run may differ in its last digits: cumsum_cuda_kernel does not have")
        assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_are_not_taken_for_that(model: SupervisedPeftModel) -> None:
    model.language_model.model.layers[0].register_forward_pre_hook(_Refuses("shapes do not fit"))
    with restored_algorithms(), pytest.raises(RuntimeError, match="shapes do not fit"):
        resolve_determinism(model, CUDA)
