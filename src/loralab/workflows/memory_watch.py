"""The most memory that a run takes, as it takes it.

Owns measuring: on a CPU the anonymous memory of this process (RssAnon, where the system tells it),
sampled by a thread; on CUDA what PyTorch's allocator has handed out. What was there before, Python
and its libraries, is the level that the peak is counted from.
"""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
import torch

_STATUS = Path("/proc/self/status")
_ANONYMOUS = re.compile(rb"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
# A step of the smallest model takes longer than this; a reading takes 30 microseconds.
_SECONDS = 0.01


def _anonymous() -> int | None:
    try:
        found = _ANONYMOUS.search(_STATUS.read_bytes())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def process_bytes(device: torch.device) -> int:
    """Return the main memory of this process, as a watch measures it; 0 where a run does not go by that.

    Args:
        device: where the run computes.
    """
    if device.type == "cuda":
        return 0
    found = _anonymous()
    return _resident() if found is None else found


class MemoryWatch:
    """Measures while it is entered.

    Attributes:
        level_bytes: what there was of main memory at the start.
    """

    def __init__(self) -> None:
        first = _anonymous()
        self._source = "rss" if first is None else "RssAnon"
        self._read: Callable[[], int] = _resident if first is None else lambda: _anonymous() or 0
        self.level_bytes = 0
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="loralab-memory", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self.level_bytes = self._peak = self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._peak = max(self._peak, self._read())

    def source(self, device: torch.device) -> str:
        """Return what a peak on `device` is read from: RssAnon, rss or cuda."""
        return "cuda" if device.type == "cuda" else self._source

    def peak_bytes(self, device: torch.device) -> int:
        """Return the most so far, above the level.

        Args:
            device: where the run computes.
        """
        if device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(device))
        return max(self._peak, self._read()) - self.level_bytes


def forget_peak(device: torch.device) -> None:
    """Let what is said of a GPU's peak begin here: its counter is the process's, and a run may not be its first.

    Args:
        device: where the run will compute.
    """
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
