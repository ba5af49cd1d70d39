"""What the C library does with memory that was freed, and what that makes of a sequence of tensors.

Owns the two calls that give memory back, and the model of the heap behind every estimate of memory
on a CPU. PyTorch asks for tensors on the CPU by `posix_memalign`; in glibc, freed chunks stay with the
process, and a chunk often cannot serve the next request of its own size: the request is for some bytes
more, to find an aligned place, and small objects settle in what was cut off. So a step's memory is not
the most that is alive at once but, over some steps, up to 1.6 times that.
"""

import bisect
import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

# What glibc's own threshold rises to once tensors of some size were freed: larger ones are given back at once.
MAPPED_BYTES = 32 << 20
# While weights are read and quantized: nearly every tensor is given back at once, at the price of new pages.
_LOADING_BYTES = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's settings, from malloc.h
_PAGE, _CHUNK, _HEADER = 4096, 16, 8
# What a request for an aligned place adds, and what is left before the place.
_SEARCHED, _CUT_OFF = 96, 48
# Share of chunks before which something small settles and stays. Fitted to runs of 20 steps of the shapes of
# GPT-2-small (B 8 and 16, NF4) and Qwen2.5-0.5B (B 2) in bfloat16 (glibc 2.36): between 0.06 and 0.12.
KEPT_PINNED = 0.1
# The same where activations are recomputed: many more come and go while few are held. Fitted to one run
# of GPT-2-small's shape; the weakest point of the estimate.
RECOMPUTED_PINNED = 0.4
_GOLDEN = 0.6180339887498949


@cache
def _glibc() -> Any:
    """Return the C library where it is one with glibc's calls, else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keeps_freed_memory() -> bool:
    """Return whether memory that was freed stays with this process, as `heap_peak` has it."""
    return _glibc() is not None


@contextmanager
def returning_memory() -> Iterator[None]:
    """Give freed memory back to the system at once, while weights are loaded.

    Reading and quantizing makes copies in several threads, whose heaps would keep them: of a base in
    4 bits, several times its size.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        # From here on as glibc would have come to by itself.
        library.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_TRIM_THRESHOLD, 2 * MAPPED_BYTES)
        library.malloc_trim(0)


def release_freed_memory() -> None:
    """Give back what was freed and kept, once: before steps, what came before them is not needed."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


class _Heap:
    """glibc's heap as far as large chunks go: best fit, neighbours joined, the top given back when large."""

    def __init__(self, pinned: float) -> None:
        self.peak = 0
        self._pinned = pinned
        self._top = self._end = self._mapped = 0
        self._free: list[tuple[int, int]] = []  # size and start, in order
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._held: dict[int, tuple[int, int]] = {}  # start (-1: mapped) and size
        self._drawn = 0.0

    def allocate(self, number: int, size: int) -> None:
        """Make room for a tensor."""
        rounded = -(-(size + _HEADER) // _CHUNK) * _CHUNK
        if rounded >= MAPPED_BYTES:
            mapped = -(-rounded // _PAGE) * _PAGE
            self._held[number] = (-1, mapped)
            self._mapped += mapped
        else:
            self._held[number] = (self._place(rounded), rounded)
        self.peak = max(self.peak, self._end + self._mapped)

    def _place(self, size: int) -> int:
        # Evenly spread instead of drawn: the same trace gives the same number.
        self._drawn = (self._drawn + _GOLDEN) % 1.0
        skipped = _CUT_OFF if self._drawn < self._pinned else 0
        index = bisect.bisect_left(self._free, (size + _SEARCHED, 0))
        if index == len(self._free):
            start = self._top + skipped
            self._top = start + size
            self._end = max(self._end, self._top)
            return start
        found, start = self._free[index]
        self._take(start, found)
        rest = found - skipped - size
        if rest > 0:
            self._put(start + skipped + size, rest)
        return start + skipped

    def release(self, number: int) -> None:
        """Free a tensor."""
        start, size = self._held.pop(number)
        if start < 0:
            self._mapped -= size
            return
        before = self._start_before.get(start)
        if before is not None:
            length = self._size_at[before]
            self._take(before, length)
            start, size = before, size + length
        behind = self._size_at.get(start + size)
        if behind is not None:
            self._take(start + size, behind)
            size += behind
        if start + size == self._top:
            self._top = start
            if self._end - self._top > 2 * MAPPED_BYTES:
                self._end = self._top
            return
        self._put(start, size)

    def _put(self, start: int, size: int) -> None:
        self._size_at[start] = size
        self._start_before[start + size] = start
        bisect.insort(self._free, (size, start))

    def _take(self, start: int, size: int) -> None:
        del self._size_at[start], self._start_before[start + size]
        del self._free[bisect.bisect_left(self._free, (size, start))]


def heap_peak(computations: Sequence[Sequence[tuple[int, int]]], *, pinned: float = KEPT_PINNED) -> int:
    """Return the memory that a process holds at most for tensors that come and go, in bytes.

    Args:
        computations: one after the other: number and bytes of each tensor that comes, number and -1 of each that
            goes; what is left at the end of one goes before the next.
        pinned: share of chunks before which something small settles and stays.
    """
    heap = _Heap(pinned)
    for events in computations:
        alive: set[int] = set()
        for number, size in events:
            if size < 0:
                heap.release(number)
                alive.discard(number)
            else:
                heap.allocate(number, size)
                alive.add(number)
        for number in sorted(alive):
            heap.release(number)
    return heap.peak
