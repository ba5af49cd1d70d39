"""One run of a sweep: its process, and what its folder holds afterwards.

Owns starting, following and stopping the process, and reading its result. No torch here: the memory of a run is that of
its process, and goes with it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from loralab.errors import RunFolderError
from loralab.progress import Reporter
from loralab.run import RunFolder, read_json
from loralab.workflows.output import LOCK, has_begun, locked

# Lines of a run that the sweep passes on; the log has all.
_PASSED_ON = ("train ", "step ", "warning:")
_WAIT_SECONDS = 0.2
# How long a process that ended may leave its stderr open to others, such as workers that outlive it.
_LAST_WORDS_SECONDS = 5.0
_OUT_OF_MEMORY = "killed by SIGKILL, as a system does that runs out of memory"


@dataclass
class Stop:
    """A signal that asked the sweep to stop; the run under way gets it too.

    Attributes:
        number: the signal, or None.
        process: the run under way, or None.
    """

    number: int | None = None
    process: subprocess.Popen[str] | None = None

    def attach(self, process: subprocess.Popen[str]) -> None:
        """Pass signals on to a process from now on, and one that came before."""
        self.process = process
        if self.number is not None:
            process.send_signal(self.number)


@contextmanager
def passing_signals(reporter: Reporter) -> Iterator[Stop]:
    """Pass SIGINT and SIGTERM on to the run under way: it writes a checkpoint; a second one ends it at once."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.number = number
        if stop.process is not None:
            with contextlib.suppress(ProcessLookupError):
                stop.process.send_signal(number)
        reporter.say("stopping the sweep; the run under way writes a checkpoint")

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_complete(folder: RunFolder) -> bool:
    """Return whether a run has come to its end."""
    return has_begun(folder) and read_json(folder.record).get("status") == "completed" and folder.report.is_file()


def run_process(
    folder: RunFolder, config: Path, overrides: Sequence[str], *, log: Path, stop: Stop, reporter: Reporter
) -> tuple[int, str]:
    """Train one run, from where its folder stands.

    Args:
        folder: of the run.
        config: of the sweep.
        overrides: of the run.
        log: file that gets all that the run says.
        stop: passes signals on to it.
        reporter: told what the run says of its course.

    Returns:
        The exit code (negative: the signal that killed it) and, where that is not 0, the reason.
    """
    _wait_until_free(folder, reporter)
    command = [sys.executable, "-m", "loralab.cli.sweep_child", "train", str(config), *overrides]
    command += [f"output.dir={folder.path}", *(["--resume"] if has_begun(folder) else [])]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # closed when this process is gone, however that came about
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
    )
    stop.attach(process)
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, log, lines, reporter), daemon=True)
    reader.start()
    code = process.wait()
    stop.process = None
    reader.join(_LAST_WORDS_SECONDS)
    if process.stdin is not None:
        process.stdin.close()
    if process.stderr is not None and not reader.is_alive():  # workers that outlive the run may hold it open
        process.stderr.close()
    return code, _reason(code, lines)


def _read(process: subprocess.Popen[str], log: Path, lines: list[str], reporter: Reporter) -> None:
    """Read what a run says to its end; a log that cannot be written must not stop the run."""
    with contextlib.ExitStack() as stack:
        copy = None
        with contextlib.suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            copy = stack.enter_context(log.open("a", encoding="utf-8", buffering=1))
        for line in process.stderr or ():
            lines.append(line.rstrip())
            if line.startswith(_PASSED_ON):
                reporter.say(f"  {lines[-1]}")
            if copy is not None:
                with contextlib.suppress(OSError):
                    copy.write(line)


def was_stopped(code: int) -> bool:
    """Return whether an exit code says that somebody stopped the process, so that it may go on."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    return code in {-number for number in numbers} | {128 + number for number in numbers}


def _wait_until_free(folder: RunFolder, reporter: Reporter) -> None:
    """Wait for a run whose sweep was killed: it writes a checkpoint and ends."""
    told = False
    while (folder.path / LOCK).is_file():
        try:
            with locked(folder.path / LOCK, note=""):
                return
        except RunFolderError:
            if not told:
                reporter.say(f"waiting for the process that still writes {folder.path}")
            told = True
            time.sleep(_WAIT_SECONDS)


def _reason(code: int, lines: Sequence[str]) -> str:
    if code == 0:
        return ""
    if code == -signal.SIGKILL:
        return _OUT_OF_MEMORY
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors[0] if errors else next((line for line in reversed(lines) if line.strip()), "")
    return said or f"exit code {code}"


def read_result(folder: RunFolder, figure: str) -> dict[str, Any]:
    """Return what a sweep keeps of a complete run.

    Args:
        folder: of the run.
        figure: the metric's name in `evaluation.json`.

    Returns:
        `metric`, `interval` (its bounds, or None), `examples` and `supervised_tokens` that it was measured on,
        `adapter_sha256`, `steps`, `trainable_parameters`, `train_seconds` and `peak_memory_bytes`.
    """
    record, evaluation = read_json(folder.record), read_json(folder.evaluation)
    return {
        "metric": evaluation.get(figure),
        "interval": _interval(evaluation, figure),
        "examples": evaluation.get("num_examples"),
        "supervised_tokens": evaluation.get("supervised_tokens"),
        "adapter_sha256": record.get("adapter_sha256"),
        "steps": record.get("steps"),
        "trainable_parameters": record.get("model", {}).get("trainable_parameters"),
        "train_seconds": record.get("train_seconds"),
        "peak_memory_bytes": record.get("peak_memory_bytes"),
    }


def _interval(evaluation: dict[str, Any], figure: str) -> list[float] | None:
    """Return the 95 % interval of a figure; of the loss, that of its difference to the base, put on the base's loss."""
    if figure == "eval_loss":
        found, base = evaluation.get("difference", {}), evaluation.get("base", {}).get("eval_loss")
    else:
        found, base = evaluation.get("metrics", {}).get(figure, {}), 0.0
    low, high = found.get("low"), found.get("high")
    return None if base is None or low is None or high is None else [base + low, base + high]
