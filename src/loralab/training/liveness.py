"""Proof that everything which is said to be trained is trained.

Owns which tensors must have had a gradient by which step, and the words for those that had none.
No table of adapter kinds: a tensor may wait only while another tensor of its layer is all zeros,
as A waits for B in LoRA, one factor for the other in LoHa and LoKr, lambda_d for lambda_b in VeRA.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab.errors import DeadAdapterError
from loralab.training.state import RunState

# Steps with a positive learning rate until every tensor must have had a gradient that is not zero.
WINDOW = 3
_MOST_SHOWN = 4
# An expert that no token was sent to has no gradient, and nothing is wrong with it.
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_UNUSED = "no gradient reaches them: the forward does not use their layers, or cuts the result off from the loss"
_WITHOUT_EFFECT = "their gradient is zero: what their layers add does not change the loss"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A trained tensor.

    Attributes:
        name: as a user knows it.
        layer: the adapted layer that it belongs to.
        weight: the tensor.
    """

    name: str
    layer: str
    weight: nn.Parameter


class LivenessCheck(TrainerCallback):
    """Looks at the gradients of the first steps, and stops a run in which a tensor has none.

    Args:
        run_state: remembers across a resume that the check has passed.
        note: told what was not reached and need not have been: experts, tokens of the embedding.
    """

    def __init__(self, run_state: RunState, *, note: Callable[[str], None]) -> None:
        self.run_state = run_state
        self.note = note
        self._reached = set(run_state.reached)
        self._rows: dict[str, torch.Tensor] = {}
        self._begun = run_state.live_steps > 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Check that something is trained.

        Raises:
            DeadAdapterError: nothing is.
        """
        if not any(weight.requires_grad for weight in model.parameters()):
            raise DeadAdapterError(
                "nothing is trained: every tensor is frozen", where="the model with its adapter", fix=_fix(())
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Look at the gradients of a step, before they are used.

        Raises:
            DeadAdapterError: a tensor has none, or still none after the steps in which it may wait.
        """
        if self.run_state.alive:
            return
        tensors = _trained_tensors(model)
        self._look(tensors)
        # Where no label has more than one token before it, attention has nothing to choose: no proof either way.
        first = self.run_state.attended and not self._begun
        self._begun |= first
        if self.run_state.attended:
            self.run_state.live_steps += any(group["lr"] > 0 for group in optimizer.param_groups)
        last = self.run_state.live_steps >= WINDOW
        dead = [t for t in tensors if t.name not in self._reached and not _may_rest(t)]
        if dead and not last:
            waiting = _waiting(tensors) if first else {t.name for t in tensors}
            dead = [t for t in dead if t.weight.grad is None or t.name not in waiting]
        if dead:
            raise _dead(dead, len(tensors), step=state.global_step + 1)
        if last:
            self._say_resting(tensors, model)
            self.run_state.alive, self.run_state.reached = True, []
        else:
            self.run_state.reached = sorted(self._reached)

    def _look(self, tensors: Sequence[_Tensor]) -> None:
        gradients = [t.weight.grad for t in tensors]
        found = _any([g for g in gradients if g is not None])
        lively = iter(found)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None and next(lively):
                self._reached.add(tensor.name)
            if gradient is not None and _is_tokens(tensor):
                rows = gradient.detach().ne(0).any(dim=-1).cpu()
                self._rows[tensor.name] = rows | self._rows.get(tensor.name, rows)

    def _say_resting(self, tensors: Sequence[_Tensor], model: nn.Module) -> None:
        experts = [t.name for t in tensors if _EXPERT.search(t.name) and t.name not in self._reached]
        if experts:
            count = f"{len(experts)} tensors ({_listed(experts)})"
            self.note(f"experts that no token was sent to in the first {WINDOW} steps: {count}")
        for tensor in tensors:
            rows = self._rows.get(tensor.name)
            if rows is not None and not bool(rows.all()):
                ids = _token_ids(model, tensor)
                unseen = [str(number) for number, seen in zip(ids, rows.tolist(), strict=True) if not seen]
                self.note(f"trained tokens that did not occur in the first {WINDOW} steps: {_listed(unseen)}")


def check_reached(model: nn.Module, *, step: int) -> None:
    """Check that a backward sweep over several processes has met every trained tensor.

    Their gradients are summed together, so none may be left out by any process.

    Args:
        model: after the sweep.
        step: optimizer step, for the message.

    Raises:
        DeadAdapterError: a tensor has no gradient.
    """
    tensors = _trained_tensors(model)
    missing = [tensor for tensor in tensors if tensor.weight.grad is None]
    if any(_may_rest(tensor) for tensor in missing):
        raise DeadAdapterError(
            f"experts that no token was sent to, in a run of several processes: {len(missing)} tensors "
            f"({_listed([tensor.name for tensor in missing])})",
            where=f"optimizer step {step}",
            fix="run in one process, or leave the experts out of lora.target_modules",
        )
    if missing:
        raise _dead(missing, len(tensors), step=step)


def trains_experts(model: nn.Module) -> bool:
    """Return whether something is trained that only some tokens are sent to.

    Args:
        model: base with adapter.
    """
    return any(weight.requires_grad and _EXPERT.search(name) for name, weight in model.named_parameters())


def no_gradient_at_all(step: int) -> DeadAdapterError:
    """Return the error of a step whose loss depends on nothing that is trained."""
    return DeadAdapterError(
        f"the loss does not depend on any trained tensor: {_UNUSED}", where=f"optimizer step {step}", fix=_fix(())
    )


def _trained_tensors(model: nn.Module) -> list[_Tensor]:
    owners = {name for name, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    found = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            parents = [name[:place] for place, sign in enumerate(name) if sign == "." and name[:place] in owners]
            found.append(_Tensor(_shown(name), parents[-1] if parents else name.rpartition(".")[0], weight))
    return found


def _shown(name: str) -> str:
    name = name.removeprefix("module.").removeprefix("base_model.model.").replace(".modules_to_save.", ".")
    return re.sub(r"\.default(?=\.|$)", "", name)


def _any(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Return which tensors hold a number other than zero, with one wait for the device."""
    flags = [tensor.detach().ne(0).any() for tensor in tensors]
    return [bool(flag) for flag in torch.stack(flags).tolist()] if flags else []


def _waiting(tensors: Sequence[_Tensor]) -> set[str]:
    """Return the names of tensors whose gradient may be zero, because another one of their layer is all zeros."""
    empty: dict[str, set[str]] = {}
    for tensor, filled in zip(tensors, _any([tensor.weight for tensor in tensors]), strict=True):
        if not filled:
            empty.setdefault(tensor.layer, set()).add(tensor.name)
    return {tensor.name for tensor in tensors if empty.get(tensor.layer, set()) - {tensor.name}}


def _is_tokens(tensor: _Tensor) -> bool:
    return tensor.name.endswith("trainable_tokens_delta")


def _may_rest(tensor: _Tensor) -> bool:
    return _is_tokens(tensor) or _EXPERT.search(tensor.name) is not None


def _token_ids(model: nn.Module, tensor: _Tensor) -> Sequence[int]:
    layer = cast(TrainableTokensLayer, model.get_submodule(tensor.layer))
    indices: Mapping[str, Sequence[int]] = layer.token_indices
    return indices["default"]


def _dead(dead: Sequence[_Tensor], count: int, *, step: int) -> DeadAdapterError:
    unused = [tensor for tensor in dead if tensor.weight.grad is None]
    named = unused or dead
    why = _UNUSED if unused else _WITHOUT_EFFECT
    names = [tensor.name for tensor in named]
    return DeadAdapterError(
        f"{len(dead)} of {count} trained tensors learn nothing ({_listed(names)}); {why}",
        where=f"optimizer step {step}",
        fix=_fix(names),
    )


def _fix(names: Sequence[str]) -> str:
    if any(".lora_" in name or ".vera_" in name or ".hada_" in name or ".lokr_" in name for name in names):
        return "leave these layers out: name the others in lora.target_modules or lora.layers_to_transform"
    return "name layers that the model uses in lora.target_modules, and none in lora.modules_to_save that it does not"


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
