"""DeepSpeed's ZeRO: gradients and moments of what is trained in parts (stage 2), the frozen base in parts (stage 3).

Owns everything that is asked of the optional package deepspeed. A step stays ours: sums over tokens, one division,
clipping behind the reduction, our schedule. DeepSpeed's mixed precision is not used; every weight keeps its type.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import ConfigError, WorkerError
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.deepspeed_library import load_deepspeed
from loralab.training.distributed import Processes

# Elements that are reduced at once; the buffer for it is as large.
_BUCKET = 50_000_000
# Stands for a module that never ends; those of a model are numbered from 0.
_IN_USE = -1
# Optimizers that treat every number alone: a moment may be cut anywhere.
_ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


class _Whole(nn.Module):
    """Trained tensors as a model; what passes through it is a loss, whose backward sweep DeepSpeed then notices."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, loss: Tensor) -> Tensor:
        """Return the loss as a tensor of its own."""
        return loss * 1.0


class MomentsInParts(torch.optim.Optimizer):
    """An optimizer whose moments, and the gradients that it reads, lie in parts in all processes (ZeRO-2).

    Args:
        optimizer: fresh, over the trained weights; each process keeps its part of it.
        max_norm: what the norm of all gradients is clipped to; 0 for no clipping.
        processes: those that share the run.
        device: of this process.

    Attributes:
        norm: the norm of all gradients, filled in by each `step` (scalar).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, max_norm: float, processes: Processes, device: torch.device
    ) -> None:
        if not isinstance(optimizer, _ELEMENTWISE):
            raise ConfigError(
                f"zero2 with {type(optimizer).__name__}: its moments are not of single numbers, and cannot be cut",
                where="keys training.optim, training.distributed",
                fix="set training.optim: adamw_torch, or training.distributed: ddp",
            )
        self._deepspeed = load_deepspeed(device)
        self._processes = processes
        self._own = optimizer
        self._trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._engine = self._deepspeed.initialize(
            model=_Whole(self._trained),
            optimizer=optimizer,
            config=_settings(2, {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}, max_norm=max_norm),
            dist_init_required=False,
        )[0]
        self._gathered: list[dict[str, Any]] = []
        self.norm = torch.zeros((), device=device)
        super().__init__(optimizer.param_groups, optimizer.defaults)

    def probe(self, loss: Tensor) -> None:
        """Sweep back without summing anything; the gradients, or None, lie where they usually are until `step`.

        Args:
            loss: of a micro-batch (scalar, with graph).
        """
        for weight, gradient in zip(
            self._trained, torch.autograd.grad(loss, self._trained, allow_unused=True), strict=True
        ):
            weight.grad = gradient

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Sweep back, and add the gradients' mean over the processes to each one's part.

        Args:
            loss: of a micro-batch (scalar, with graph); each process brings one.
            last: whether no other follows in this step.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(self._engine(loss), scale_wrt_gas=False)

    def show_gradients(self) -> None:
        """Put the whole gradients where they usually are, for those who look; all processes together."""
        for weight in self._trained:
            weight.grad = self._deepspeed.utils.safe_get_full_grad(weight)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip, let each process move its part of the weights, and put the weights together again."""
        for weight in self._trained:
            weight.grad = None
        self._engine.step()
        self.norm.fill_(float(self._engine.get_global_grad_norm()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` has let go of the gradients."""

    def gather(self) -> None:
        """Fetch all processes' parts to the first, for `state_dict`; all processes together."""
        own = self._own.state_dict()
        parts = self._processes.gather({**own, "state": _on_cpu(own["state"])})
        self._gathered = parts if self._processes.first else []

    def state_dict(self) -> dict[str, Any]:
        """Return what `gather` found, by process."""
        return {"parts": self._gathered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of a gathered state."""
        if state_dict["parts"]:
            self._own.load_state_dict(state_dict["parts"][self._processes.rank])
            self.param_groups = self._own.param_groups


def _on_cpu(state: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {
        key: {name: held.cpu() if isinstance(held, Tensor) else held for name, held in found.items()}
        for key, found in state.items()
    }


def _settings(stage: int, further: dict[str, Any], *, max_norm: float = 0.0) -> dict[str, Any]:
    """Return DeepSpeed's configuration: no precision of its own, one micro-step, which the trainer counts itself."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **further},
    }


class _Layers(nn.Module):
    """The decoder's layers as a model; it is called before each forward, which is how DeepSpeed counts them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> None:
        """Compute nothing."""


def cut_layers(model: SupervisedPeftModel, layers: Sequence[nn.Module], device: torch.device) -> None:
    """Let each process keep a part of every frozen matrix of the layers; what is trained stays whole (ZeRO-3).

    Args:
        model: base with adapter, in main memory.
        layers: its decoder layers.
        device: where the run computes.

    Raises:
        ConfigError: deepspeed cannot be imported.
    """
    deepspeed = load_deepspeed(device)
    root = _Layers(layers)
    trained: list[Any] = [weight for weight in root.parameters() if weight.requires_grad]
    # A layer is gathered as a whole: our forwards read weights of modules that they do not call.
    deepspeed.utils.set_z3_leaf_modules(root, sorted({type(layer) for layer in layers}, key=lambda kind: kind.__name__))
    # No tensor below this size is cut: then none that is trained.
    kept = max((weight.numel() for weight in trained), default=0)
    settings = _settings(3, {"stage3_param_persistence_threshold": max(kept, 1), "stage3_max_reuse_distance": 0})
    deepspeed.zero.Init(module=root, config_dict_or_path=settings)
    engine = deepspeed.initialize(model=root, config=settings, dist_init_required=False)[0]
    for weight in trained:
        weight.all_gather()
        # While something uses a weight, it is not let go. Small ones stay by themselves, but only where forwards
        # come in an order that DeepSpeed has seen before; and what comes back is what was cut, not what was learnt.
        weight.ds_active_sub_modules.add(_IN_USE)
    sizes = [weight.numel() for weight in trained]

    def begin(*_: object) -> None:
        kept = [weight.numel() if _IN_USE in weight.ds_active_sub_modules else 0 for weight in trained]
        if kept != sizes:
            raise WorkerError(
                "DeepSpeed has let go of trained weights, and what they learnt may be lost",
                where="key training.distributed",
                fix="set training.distributed: fsdp2; the last checkpoint is unharmed",
            )
        engine.optimizer.release_backward_leftovers()  # a layer whose input has no gradient is not let go otherwise
        root()

    model.body.register_forward_pre_hook(begin)


def held_of(weight: Tensor) -> int:
    """Return how many numbers of a weight, cut or not, lie in this process."""
    part: Tensor | None = getattr(weight, "ds_tensor", None)
    return weight.numel() if part is None or weight.numel() else part.numel()
