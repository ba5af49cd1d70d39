"""Trackers: other programs that get the figures of `metrics.jsonl` as they come.

Owns what each is sent and where, and what was sent already, so that a resumed run doubles nothing. Each is used through
its package's own public interface: transformers' callbacks rename the figures, and send arguments and model besides.
A tracker that fails is said once and left out; it never ends a run.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab.config.tracker_checks import NO_REPORTS, hide_secrets, load_package
from loralab.errors import RunFolderError, excerpt
from loralab.run import read_json, write_json
from loralab.training.callbacks import logged_line

PROJECT = "loralab"
_STATE = "state.json"
# What a tracker may take to finish; what it has not sent by then it has kept on disk, or lost.
_FINISH_SECONDS = 60.0
# MLflow's own bounds: entries in a request, characters of a parameter.
_MLFLOW_BATCH, _MLFLOW_CHARACTERS = 100, 6000
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        name: the run folder's.
        folder: where the tracker may keep files of its own.
        config: the resolved configuration, nested, without secrets.
        identity: by which the tracker knows an earlier start of the run, or None at the first.
        purge_from: first step that is sent again, where a tracker can take back what it has.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    identity: str | None
    purge_from: int


class Tracker(Protocol):
    """One program that gets figures.

    Attributes:
        identity: by which a later start of the same run finds it.
    """

    identity: str

    def send(self, figures: Figures, step: int) -> None:
        """Send the figures of a step."""

    def finish(self, *, failed: bool) -> None:
        """Send what is left, and say how the run ended."""


class _TensorBoard:
    """Event files below the run folder; numbers are float32 there."""

    identity = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        writer = load_package("torch.utils.tensorboard").SummaryWriter
        purge = run.purge_from if run.identity else None
        self.writer = writer(log_dir=str(run.folder / "tensorboard"), purge_step=purge)
        if not purge:  # the text is of step 0
            self.writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2)}\n```", 0)
        self.writer.flush()

    def send(self, figures: Figures, step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # what is still in its queue would not outlive a kill

    def finish(self, *, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    """A run of Weights & Biases, with figures and configuration alone: no code, no output, no facts of the machine."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = load_package("wandb")
        self.identity = run.identity or secrets.token_hex(4)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=self.identity,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.config),
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        # Rows of their own: with wandb's step, a second row of a step would be dropped.
        self.run.define_metric("*", step_metric="step")

    def send(self, figures: Figures, step: int) -> None:
        self.run.log({"step": step, **figures})

    def finish(self, *, failed: bool) -> None:
        _within(_FINISH_SECONDS, self.run.finish, exit_code=int(failed))  # without a network it would wait for ever


class _MLflow:
    """A run of MLflow, on the server or store of MLFLOW_TRACKING_URI, else in a database below the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        entities = load_package("mlflow.entities")
        self.metric = entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.absolute() / 'mlflow.db'}"
        self.client = load_package("mlflow.tracking").MlflowClient(tracking_uri=uri)
        if run.identity is not None:
            self.identity = run.identity
            self.client.set_terminated(self.identity, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
        self.identity = self.client.create_run(number, run_name=run.name).info.run_id
        params = [entities.Param(key, value[:_MLFLOW_CHARACTERS]) for key, value in _flat(run.config)]
        for start in range(0, len(params), _MLFLOW_BATCH):
            self.client.log_batch(self.identity, params=params[start : start + _MLFLOW_BATCH])

    def send(self, figures: Figures, step: int) -> None:
        now = round(time.time() * 1000)
        metrics = [self.metric(name, value, now, step) for name, value in figures.items()]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self.client.log_batch(self.identity, metrics=metrics[start : start + _MLFLOW_BATCH])

    def finish(self, *, failed: bool) -> None:
        self.client.set_terminated(self.identity, status="FAILED" if failed else "FINISHED")


class _Trackio:
    """A run of trackio, in its own folder or on the Space of TRACKIO_SPACE_ID; one that is made there is private."""

    def __init__(self, run: TrackedRun) -> None:
        # trackio finds runs by name alone, so the name must be this run's own.
        self.identity = run.identity or f"{run.name}-{secrets.token_hex(3)}"
        self.trackio = load_package("trackio")
        self.run = self.trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.identity,
            config=dict(run.config),
            resume="allow",
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def send(self, figures: Figures, step: int) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, *, failed: bool) -> None:
        self.trackio.finish()  # not the run's own: that one would be called again, and print, when Python ends


BUILDERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


@dataclass(frozen=True, slots=True)
class Beginning:
    """What trackers begin with.

    Attributes:
        run: what tells this run from another one that had the folder before.
        name: of the run.
        config: the resolved configuration, nested.
        lines: those that `metrics.jsonl` holds; what a tracker has not got of them it gets now.
    """

    run: str
    name: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]


@dataclass
class Trackers:
    """The trackers of one run.

    Attributes:
        names: those that the configuration names.
        folder: where they keep files of their own, and this class what was sent.
        beginning: tells what to begin with, once `metrics.jsonl` is what the run goes on from.
        note: told once of each that fails.
    """

    names: Sequence[str]
    folder: Path
    beginning: Callable[[], Beginning]
    note: Callable[[str], None]
    _open: dict[str, Tracker] = field(default_factory=dict)
    _state: dict[str, Any] = field(default_factory=dict)

    def open(self) -> None:
        """Begin, or go on where an earlier start of the run ended."""
        start = self.beginning()
        self._state = self._take_up(start.run)
        last = max((int(line["step"]) for line in start.lines), default=0)
        for tracker in self.names:
            earlier = self._state["trackers"].setdefault(tracker, {"identity": None, "sent": {}})
            if tracker == "tensorboard":  # it takes back its last step, which is sent again
                earlier["sent"] = {kind: min(step, last - 1) for kind, step in earlier["sent"].items()}
            tracked = TrackedRun(start.name, self.folder, hide_secrets(start.config), earlier["identity"], last)
            with self._failing(tracker):
                os.environ.update({key: os.environ.get(key, value) for key, value in NO_REPORTS.items()})
                self._open[tracker] = BUILDERS[tracker](tracked)
                earlier["identity"] = self._open[tracker].identity
        self._save()
        for line in start.lines:
            self.send(line)

    def _take_up(self, run: str) -> dict[str, Any]:
        """Return what an earlier start of the run has sent, and make room for what this one sends."""
        path, known = self.folder / _STATE, {}
        try:
            known = read_json(path) if path.is_file() else {}
        except RunFolderError as error:
            self.note(f"trackers begin anew, {path} cannot be used: {error.problems[0].what}")
        if known.get("run") != run:
            shutil.rmtree(self.folder, ignore_errors=True)
            known = {"run": run, "trackers": {}}
        with contextlib.suppress(OSError):  # told when it is written to
            self.folder.mkdir(parents=True, exist_ok=True)
        return known

    def send(self, line: Mapping[str, Any]) -> None:
        """Send a line of `metrics.jsonl` to those that have not got it; what is no number is left out.

        Args:
            line: its step, epoch and figures.
        """
        kind = "eval" if "eval_loss" in line else "train"
        self._send(kind, int(line["step"]), {key: value for key, value in line.items() if key != "step"})

    def _send(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        figures = {key: float(value) for key, value in values.items() if _is_number(value)}
        waiting = [name for name in self._open if self._state["trackers"][name]["sent"].get(kind, -1) < step]
        if not waiting or not figures:
            return
        for name in waiting:
            self._state["trackers"][name]["sent"][kind] = step
        self._save()  # before: behind a kill, a figure that is missing is better than one that is there twice
        for name in filter(self._open.__contains__, waiting):
            with self._failing(name):
                self._open[name].send(figures, step)

    def close(self, final: Mapping[str, Any] | None, *, step: int, failed: bool) -> None:
        """Send the final evaluation and finish.

        Args:
            final: figures of the final evaluation, or None where the run did not get there.
            step: the last one.
            failed: whether the run ended by an error.
        """
        if final is not None:
            self._send("final", step, final)
        for name in list(self._open):
            with self._failing(name):
                self._open[name].finish(failed=failed)
        self._open.clear()

    def _save(self) -> None:
        """Write down what is sent; where that cannot be, no tracker gets more: it might get it twice."""
        try:
            write_json(self.folder / _STATE, self._state)
        except OSError as error:
            if self._open:
                self.note(f"trackers get nothing more, {self.folder} cannot be written: {excerpt(error)}")
            self.close(None, step=0, failed=True)

    @contextlib.contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Leave a tracker out once it fails; what it prints goes to stderr."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # noqa: BLE001 - whatever another program raises must not end a run
            self._open.pop(name, None)
            self.note(f"tracker {name} failed and gets nothing more: {hide_secrets(excerpt(error))}")


def _within(seconds: float, act: Callable[..., None], **arguments: Any) -> None:
    """Run `act` in a thread for at most some seconds.

    Raises:
        TimeoutError: it took longer, and goes on by itself.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            act(**arguments)
        except Exception as error:  # noqa: BLE001 - raised again in the thread that asked
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise TimeoutError(f"it was not done with sending after {seconds:.0f} s")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class TrackerCallback(TrainerCallback):
    """Sends what `metrics.jsonl` gets."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Send a training or evaluation line."""
        line = logged_line(state, logs)
        if line is not None:
            self.trackers.send(line)
