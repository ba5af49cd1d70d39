"""A LoRA step of a tiny model on every device, compared with the same step in float64 on the CPU.

Owns the model, the comparison and the table of steps. The compared step goes the way that training
goes (`SupervisedPeftModel`); the reference is the library's own forward and the textbook loss, so
that a device, a library and loralab's own forward are proven at once.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.config.schema import LoraConfig
from loralab.doctor.programs import open_output
from loralab.errors import excerpt
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel

if importlib.util.find_spec("bitsandbytes") is not None:  # it has no wheels for some systems
    from loralab.doctor.quantized_base import place_quantized

_VOCABULARY, _ROWS, _LENGTH = 128, 2, 24
_SEED = 0
# Largest relative error of loss and gradient. Rounding gives a seventh of it or less, a wrong kernel about 1.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, slots=True)
class Step:
    """What a step showed.

    Attributes:
        kind: name in `STEPS`.
        device: where it ran.
        precision: of the frozen weights.
        loss: in nats per token.
        loss_error: relative, against float64 on the CPU.
        gradient_error: ||g - g'|| / ||g|| over all adapter weights.
        tolerance: largest error that passes.
        seconds: of forward, backward and optimizer; the first step on a device includes its start.
    """

    kind: str
    device: str
    precision: str
    loss: float
    loss_error: float
    gradient_error: float
    tolerance: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether loss and gradient are right; errors that are no numbers are not."""
        return self.loss_error <= self.tolerance and self.gradient_error <= self.tolerance


def run_step(kind: str, device: torch.device, dtype: torch.dtype) -> Step:
    """Run one step and compare it.

    Args:
        kind: name in `STEPS`.
        device: where to run.
        dtype: of the frozen weights, and of what is computed.
    """
    ids = torch.randint(_VOCABULARY, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(_SEED))
    base = _build_base(dtype)
    stands_for = STEPS[kind].place(base, device)
    model = _add_adapter(base).to(device)
    reference = _build_base(dtype).double()
    reference.load_state_dict({**reference.state_dict(), **stands_for})
    expected_loss, expected = _reference(_add_adapter(reference), ids)
    started = time.perf_counter()
    ids = ids.to(device)
    model.eval()  # an evaluation comes between steps in every run, and must change nothing
    with torch.no_grad():
        _supervised_loss(model, ids)
    model.train()
    loss = _supervised_loss(model, ids)
    loss.backward()
    gradient = _gradient(model)
    torch.optim.AdamW(_trained(model), lr=1e-3).step()
    measured = float(loss.detach())
    return Step(
        kind=kind,
        device=str(device),
        precision=str(dtype).removeprefix("torch."),
        loss=measured,
        loss_error=abs(measured - expected_loss) / expected_loss,
        gradient_error=float((gradient - expected).norm() / expected.norm()),
        tolerance=TOLERANCES[dtype],
        seconds=time.perf_counter() - started,
    )


def _build_base(dtype: torch.dtype) -> LlamaForCausalLM:
    """Return the tiny base on the CPU, frozen, its weights rounded to `dtype`."""
    torch.manual_seed(_SEED)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        use_cache=False,
    )
    base = LlamaForCausalLM(config)
    base.requires_grad_(False)
    base.to(dtype)  # type: ignore[arg-type]
    return base


def _add_adapter(base: LlamaForCausalLM) -> SupervisedPeftModel:
    model, _ = build_adapter(base, LoraConfig(r=4, alpha=8.0), seed=_SEED)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:  # B is zero at start, and then the gradient of A is zero too
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def _reference(model: nn.Module, ids: Tensor) -> tuple[float, Tensor]:
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits, ids[:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), _gradient(model)


def _supervised_loss(model: SupervisedPeftModel, ids: Tensor) -> Tensor:
    rows, length = ids.shape
    positions = torch.arange(length, device=ids.device).repeat(rows, 1)
    predicting = torch.arange(rows * length, device=ids.device).view(rows, length)[:, :-1].flatten()
    found = model(
        label_positions=predicting,
        labels=ids[:, 1:].flatten(),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
    )
    mean: Tensor = found.losses.mean()
    return mean


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _gradient(model: nn.Module) -> Tensor:
    parts = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in _trained(model)]
    return torch.cat([part.detach().cpu().double().flatten() for part in parts])


def plan_steps() -> Iterator[tuple[str, torch.device, torch.dtype]]:
    """Yield what there is to try: kind, device and precision."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices += [torch.device("mps")] if torch.backends.mps.is_available() else []
    for device in devices:
        for name, kind in STEPS.items():
            for dtype in offered_precisions(device) if device.type in kind.devices else ():
                yield name, device, dtype


def offered_precisions(device: torch.device) -> list[torch.dtype]:
    """Return the number formats that a device computes in."""
    if device.type != "cuda":
        return [torch.float32, torch.bfloat16]
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return [torch.float32, *([torch.bfloat16] if modern else []), torch.float16]


def place_plain(base: LlamaForCausalLM, device: torch.device) -> dict[str, Tensor]:
    """Put the base on a device as it is; its weights stand for themselves."""
    base.to(device)  # type: ignore[arg-type]
    return {}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of step.

    Attributes:
        place: puts the base on a device, and returns the weights that are now others (float64, on the CPU).
        devices: types of devices that it runs on.
    """

    place: Callable[[LlamaForCausalLM, torch.device], dict[str, Tensor]]
    devices: tuple[str, ...]


STEPS: dict[str, Kind] = {"lora": Kind(place_plain, ("cpu", "cuda", "mps"))}
if importlib.util.find_spec("bitsandbytes") is not None:
    STEPS["qlora"] = Kind(place_quantized, ("cpu", "cuda"))


def run_steps(write: Callable[[dict[str, Any]], None]) -> None:
    """Run every step; each is announced first, so that one that ends the process is known.

    Args:
        write: takes `{"begins": ...}`, then the step or `{"error": ...}`.
    """
    for kind, device, dtype in plan_steps():
        named = {"kind": kind, "device": str(device), "precision": str(dtype).removeprefix("torch.")}
        write({"begins": named})
        try:
            step = run_step(kind, device, dtype)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            write({**named, "error": f"{type(error).__name__}: {excerpt(error)}", "passed": False})
        else:
            write({**asdict(step), "passed": step.passed})


if __name__ == "__main__":
    run_steps(open_output())
