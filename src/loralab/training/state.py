"""What a run must remember between steps and across a resume, besides weights and optimizer.

Owns the running sums of the logged window, what early stopping has seen, and the clock.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STATE_FILE = "loralab_state.json"


@dataclass
class RunState:
    """Saved with every checkpoint, restored before a resumed run goes on.

    Attributes:
        window_total: nats since the last logged line.
        window_count: supervised tokens since then.
        best_value: best value of the watched metric so far, or None.
        reference_value: value that the next must undercut by `min_delta` to count as improvement.
        evaluated_step: step of the newest complete evaluation, 0 before the first.
        best_step: its step.
        without_improvement: observations since the best one.
        stopped_because: why training ended before its last step, or None.
        train_seconds: seconds of training before this process.
        train_tokens: tokens of the rows trained on so far, each branch on its own.
        laid_out_tokens: tokens that went through the model for them; fewer where prefixes were shared.
        token_budget: most tokens of a micro-batch, or None before the first step.
        train_examples: rows trained on so far.
        alive: whether every trained tensor has been seen to learn.
        live_steps: steps with a positive learning rate in which learning was looked for.
        reached: trained tensors that have had a gradient which is not zero, until all have.
        attended: whether the newest step had a label with more than one token before it.
        loss_scale: what the loss is multiplied by before the backward sweep, or None where it is not.
        good_steps: steps since that scale was last changed.
    """

    window_total: float = 0.0
    window_count: int = 0
    best_value: float | None = None
    reference_value: float | None = None
    evaluated_step: int = 0
    best_step: int | None = None
    without_improvement: int = 0
    stopped_because: str | None = None
    train_seconds: float = 0.0
    train_tokens: int = 0
    train_examples: int = 0
    laid_out_tokens: int = 0
    token_budget: int | None = None
    alive: bool = False
    live_steps: int = 0
    reached: list[str] = field(default_factory=list)
    attended: bool = False
    loss_scale: float | None = None
    good_steps: int = 0
    window_tokens: int = field(default=0)
    _started: float = field(default_factory=time.perf_counter, repr=False)
    _window_started: float = field(default_factory=time.perf_counter, repr=False)
    _paused: float = field(default=0.0, repr=False)
    _paused_in_all: float = field(default=0.0, repr=False)

    def start_clock(self) -> None:
        """Count seconds from here."""
        self._started = self._window_started = time.perf_counter()
        self._paused = self._paused_in_all = 0.0

    def pause_clock(self, seconds: float) -> None:
        """Leave `seconds` (an evaluation, a save) out of the time of training."""
        self._paused += seconds
        self._paused_in_all += seconds

    def add_step(self, *, total: float, count: int, tokens: int, laid_out_tokens: int, examples: int) -> None:
        """Add one optimizer step to the window."""
        self.window_total += total
        self.window_count += count
        self.window_tokens += tokens
        self.train_tokens += tokens
        self.laid_out_tokens += laid_out_tokens
        self.train_examples += examples

    def close_window(self) -> tuple[float, float]:
        """Return the window's token-weighted mean loss and tokens per second, and begin a new one."""
        now = time.perf_counter()
        seconds = max(now - self._window_started - self._paused, 1e-9)
        mean = self.window_total / max(self.window_count, 1)
        rate = self.window_tokens / seconds
        self.window_total, self.window_count, self.window_tokens = 0.0, 0, 0
        self._window_started, self._paused = now, 0.0
        return mean, rate

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training so far, earlier processes included, evaluations and saves not."""
        return self.train_seconds + time.perf_counter() - self._started - self._paused_in_all

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        values = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        values["train_seconds"] = self.elapsed_seconds
        (folder / STATE_FILE).write_text(json.dumps(values, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        """Read the state of a checkpoint folder."""
        values: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        values["window_tokens"] = 0  # its time is not known any more
        return cls(**values)
