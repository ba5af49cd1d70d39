"""`model.device_map`: accepted where there is one device, an error where layers would be spread."""

import pytest
import torch

from loralab.errors import ConfigError
from loralab.models.device_map import resolve_device_map

CPU = torch.device("cpu")


def test_one_device_holds_everything() -> None:
    assert resolve_device_map(None, CPU, several_gpus=True, processes=2) == {}
    chosen = resolve_device_map("auto", CPU, several_gpus=False, processes=1)["device_map"]
    assert (chosen.value, chosen.reason) == ("auto", "one device: all layers are on cpu")


@pytest.mark.parametrize(
    ("several", "processes", "what"), [(True, 1, "one process with several GPUs"), (False, 2, "2 processes")]
)
def test_layers_are_not_spread(several: bool, processes: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        resolve_device_map("auto", CPU, several_gpus=several, processes=processes)
    assert "training.distributed=fsdp2" in caught.value.problems[0].fix
