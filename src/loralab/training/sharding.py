"""The frozen base in parts: each process holds a share of every decoder layer, whole only while it computes.

Owns what is cut and what stays whole. What is trained stays whole in every process: an adapter is small, and so are
its moments; checkpoints, saves and clipping are then those of one process, and a run's files do not depend on how
its base lay. Gradients are summed here, since no wrapper does it. FSDP2 cuts here, ZeRO-3 in `zero.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from loralab.errors import ConfigError
from loralab.models.device_map import put_whole
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.distributed import Processes
from loralab.training.liveness import trains_experts
from loralab.training.zero import cut_layers, held_of


def loading_device(device: torch.device, processes: Processes) -> torch.device:
    """Return where the base is loaded: in main memory where its layers are cut before they go to a GPU.

    Args:
        device: where the run computes.
        processes: those that share the run.
    """
    return torch.device("cpu") if processes.lockstep else device


def place_model(
    model: SupervisedPeftModel, device: torch.device, setting: str, *, processes: Processes
) -> dict[str, Resolved[str]]:
    """Put base and adapter where the run computes, whole or in parts.

    Args:
        model: base with adapter, where it was loaded.
        device: where the run computes.
        setting: `training.distributed`.
        processes: those that share the run.

    Returns:
        How the processes share the model, where that is a question.

    Raises:
        ConfigError: the base has no list of decoder layers that could be cut, or ZeRO-2 cannot sum its gradients.
    """
    if processes.moments_in_parts:
        return {"distributed": _keep_whole(model, device, processes)}
    if not processes.lockstep:
        put_whole(model, device)
        if processes.count > 1:
            return {"distributed": Resolved("ddp", f"each of {processes.count} processes holds the whole base")}
        alone = Resolved("none", f"one process has nobody to share with; {setting} acts under `loralab launch`")
        return {} if setting == "ddp" else {"distributed": alone}
    for weight in model.parameters():  # as DDP does: another machine may have drawn other last digits
        if weight.requires_grad:
            processes.follow_first(weight.data)
    layers = decoder_layers(model)
    whole = sum(weight.numel() for weight in model.parameters())
    if setting == "zero3":
        cut_layers(model, layers, device)
    else:
        _shard_layers(model, layers, device, processes)
    _move_rest(model, device)
    held = sum(_held(weight) for weight in model.parameters())
    reason = (
        f"{len(layers)} decoder layers are cut into {processes.count} parts: this process holds {held / whole:.0%} of "
        "all weights, and the adapter whole"
    )
    return {"distributed": Resolved(setting, reason)}


def _keep_whole(model: SupervisedPeftModel, device: torch.device, processes: Processes) -> Resolved[str]:
    if any(weight.dtype == torch.float16 for weight in model.parameters()):
        raise ConfigError(
            "zero2 with a base in float16, whose loss scale is found from whole gradients",
            where="keys model.precision, training.distributed",
            fix="set model.precision: bfloat16, or training.distributed: ddp",
        )
    if model.trains_vision or trains_experts(model):
        what = "a vision tower" if model.trains_vision else "single experts"
        raise ConfigError(
            f"zero2 with an adapter in {what}: DeepSpeed sums gradients in the order in which they come, and that is "
            "not the same in all processes here",
            where="keys lora.target_modules, training.distributed",
            fix="set training.distributed: ddp",
        )
    put_whole(model, device)
    reason = (
        f"each of {processes.count} processes holds the whole base, and a part of the gradients and moments of what "
        "is trained"
    )
    return Resolved("zero2", reason)


def _held(weight: Tensor) -> int:
    """Return how many numbers of a weight lie in this process between forwards."""
    if isinstance(weight, DTensor):
        return weight.to_local().numel()
    return held_of(weight)


def _shard_layers(
    model: SupervisedPeftModel, layers: Sequence[nn.Module], device: torch.device, processes: Processes
) -> None:
    """Cut the layers by FSDP2."""
    mesh = init_device_mesh(device.type, (processes.count,))
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # Embedding, head and norms stay whole: what is called past the model's own forward (generation, the checks at
    # start) then meets plain tensors everywhere but inside the layers, which gather their own.
    # The body is the root, which orders what its layers gather: every way into the model leads through it.
    rest = {weight for weight in model.parameters() if not isinstance(weight, DTensor)}
    fully_shard(model.body, mesh=mesh, ignored_params=rest)


def decoder_layers(model: SupervisedPeftModel) -> Sequence[nn.Module]:
    """Return the decoder's layers: the largest list of modules that is as long as the configuration says.

    Args:
        model: base with adapter; without numbers will do.

    Raises:
        ConfigError: it has no such list.
    """
    count = getattr(model.language_model.config.get_text_config(), "num_hidden_layers", None)
    lists: list[nn.ModuleList] = [
        held for held in model.body.modules() if isinstance(held, nn.ModuleList) and len(held) == count
    ]
    if not lists:
        raise ConfigError(
            f"{type(model.language_model).__name__} has no list of {count} decoder layers to cut",
            where="key training.distributed",
            fix="set training.distributed: ddp",
        )
    longest: nn.ModuleList = max(lists, key=lambda held: sum(weight.numel() for weight in held.parameters()))
    return list(longest)


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Move what was not cut; the parts are there already, and a module that holds them refuses to be moved."""
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if not isinstance(weight, DTensor):
                weight.data = weight.data.to(device)  # a part of ZeRO's is elsewhere, and this is empty
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


class PlacedAccelerator(Accelerator):  # type: ignore[misc]
    """Leaves a model as it is: what is in parts is so already, and the trainer sums its gradients.

    Args:
        norm: returns what clips the gradients itself where these lie in parts, else None.
    """

    def __init__(self, *, norm: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self._norm_of_parts = norm

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Any:
        """Clip, or return the norm that clipping will have found once the step is done."""
        norm = self._norm_of_parts()
        return super().clip_grad_norm_(parameters, max_norm, norm_type) if norm is None else norm

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """Return the model without a wrapper."""
        return super().prepare_model(model, device_placement=False, evaluation_mode=True)


def average_gradients(model: nn.Module, processes: Processes) -> None:
    """Replace each process's gradients by their mean over the processes, the same bits in all.

    A tensor that no process reached keeps having none; where only some did, the others count as zeros.

    Args:
        model: after all backward sweeps of a step, in every process.
        processes: those that share the step.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        return
    parts: list[Tensor] = [
        torch.zeros(weight.numel(), device=weight.device) if weight.grad is None else weight.grad.float().flatten()
        for weight in trained
    ]
    reached = torch.tensor([float(weight.grad is not None) for weight in trained], device=trained[0].device)
    flat = torch.cat([*parts, reached])
    dist.all_reduce(flat)
    sizes = [weight.numel() for weight in trained]
    *means, reached = flat.split([*sizes, len(trained)])
    for weight, mean, times in zip(trained, means, reached.tolist(), strict=True):
        if times:
            weight.grad = (mean / processes.count).view_as(weight).to(weight.dtype)
