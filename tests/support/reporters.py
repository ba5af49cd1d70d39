"""Reporters for tests: one that keeps what it is told, one that stops a run at a step."""

import os
import signal

from loralab.progress import Reporter


class Notes(Reporter):
    """Keeps what it is told.

    Attributes:
        said: line by line.
    """

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class StopAt(Reporter):
    """Asks the run to stop at a step, as SIGTERM does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        if label == "train" and done == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
