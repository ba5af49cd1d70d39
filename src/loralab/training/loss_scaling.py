"""Loss scaling: gradients of a float16 base stay within the range of float16.

Owns the scale: where there is one, when it falls and rises, and taking it out of the gradients. Does not
own running a step again, which `trainer.py` does. There is no autocast to switch on: the base computes in
the type that it is stored in, and its adapter, like every other trained weight, is float32.

Scales are powers of two, so that multiplying and dividing by one changes no digit of a float32 number.

Source: Micikevicius et al. 2018, Mixed precision training, section 3.2.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from loralab.training.state import RunState

# Of the mean loss over a step's tokens: the share of one token is small, which leaves room above.
INITIAL_SCALE = 2.0**14
# Below it, it is not the scale that makes gradients too large.
LOWEST_SCALE = 2.0**-4
# Above it nothing is won: gradients of one token that it lifts into the range do not count.
HIGHEST_SCALE = 2.0**24
# Steps in a row without an overflow after which a scale twice as high is tried.
GROWTH_STEPS = 2000


class LossScaler:
    """The scale of a run whose base computes in float16.

    Scale and counter are kept in the run's state, which every checkpoint holds.

    Args:
        run_state: of the run; its `loss_scale` is set.
        note: told when a step lowered the scale.
    """

    def __init__(self, run_state: RunState, *, note: Callable[[str], None]) -> None:
        run_state.loss_scale = run_state.loss_scale or INITIAL_SCALE
        self._run_state = run_state
        self._note = note
        self._overflows = 0

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before the backward sweep."""
        return self._run_state.loss_scale or INITIAL_SCALE

    def overflowed(self, model: nn.Module) -> bool:
        """Return whether a gradient is not finite; waits for the device once.

        Args:
            model: after the backward sweeps of a step.
        """
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        return not math.isfinite(float(get_total_norm(gradients, norm_type=math.inf)))

    def lower(self) -> bool:
        """Halve the scale after an overflow; return False where that is no way out any more."""
        if self.scale / 2 < LOWEST_SCALE:
            return False
        self._run_state.loss_scale = self.scale / 2
        self._run_state.good_steps = 0
        self._overflows += 1
        return True

    @torch.no_grad()
    def unscale(self, model: nn.Module, *, step: int) -> None:
        """Divide the gradients of a step that did not overflow by its scale, and count the step.

        Args:
            model: its gradients are changed in place.
            step: number of the optimizer step, for the note.
        """
        factor = 1.0 / self.scale
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(factor)
        if self._overflows:
            times = "once" if self._overflows == 1 else f"{self._overflows} times"
            what = f"gradients exceeded float16's range {times} at step {step}"
            self._note(f"{what}: loss scale lowered to {self.scale:,.10g}, the step was run again")
            self._overflows = 0
        self._run_state.good_steps += 1
        if self._run_state.good_steps >= GROWTH_STEPS:
            self._run_state.loss_scale = max(self.scale, min(self.scale * 2, HIGHEST_SCALE))
            self._run_state.good_steps = 0


def resolve_loss_scaler(model: nn.Module, run_state: RunState, *, note: Callable[[str], None]) -> LossScaler | None:
    """Return what scales the loss of a model that computes in float16; None where nothing has to.

    Args:
        model: base with adapter.
        run_state: of the run; a `loss_scale` in it switches scaling on for any model.
        note: told when a step lowered the scale.
    """
    half = any(weight.dtype == torch.float16 for weight in model.parameters())
    return LossScaler(run_state, note=note) if half or run_state.loss_scale is not None else None
