"""Which optimizer runs where."""

import pytest
import torch

from loralab.errors import ConfigError
from loralab.training.arguments import check_optimizer

TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor")
EIGHT_BIT, PAGED = ("adamw_8bit", "adamw_bnb_8bit"), ("paged_adamw_8bit", "paged_adamw_32bit")


@pytest.mark.parametrize(
    ("device", "names"),
    [("cpu", TORCH + EIGHT_BIT), ("mps", TORCH), ("cuda", TORCH + EIGHT_BIT + PAGED)],
)
def test_optimizers_run_on_these_devices(device: str, names: tuple[str, ...]) -> None:
    for name in TORCH + EIGHT_BIT + PAGED:
        if name in names:
            check_optimizer(name, torch.device(device))
        else:
            with pytest.raises(ConfigError, match=f"{name} on {device}: ") as caught:
                check_optimizer(name, torch.device(device))
            (problem,) = caught.value.problems
            assert problem.where == "key training.optim"
            check_optimizer(problem.fix.removeprefix("set training.optim: "), torch.device("cpu"))


def test_optimizers_of_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.training.arguments._BITSANDBYTES", False)
    check_optimizer("adamw_torch", torch.device("cuda"))
    with pytest.raises(ConfigError, match="adamw_8bit needs the package bitsandbytes"):
        check_optimizer("adamw_8bit", torch.device("cuda"))
