"""How many kernels are kept: bounded on a CPU, unless the environment says otherwise."""

import pytest
import torch

from loralab.models.kernel_caches import VARIABLES, bound_kernel_caches


def test_few_are_kept_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    chosen = bound_kernel_caches(torch.device("cpu"))["kernel_caches"]
    assert chosen.value == "ONEDNN_PRIMITIVE_CACHE_CAPACITY=32, LRU_CACHE_CAPACITY=32"


def test_what_the_user_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "500")
    assert bound_kernel_caches(torch.device("cpu"))["kernel_caches"].value.count("=500") == 2


def test_other_devices_have_none() -> None:
    assert bound_kernel_caches(torch.device("meta")) == {}
