"""Measuring memory: a peak between two looks is seen, and counted from the level at the start."""

import gc
import time

import torch

from loralab.models.allocator import release_freed_memory
from loralab.workflows.memory_watch import MemoryWatch

CPU = torch.device("cpu")
MIB = 1 << 20


def test_peak_that_is_gone_again_is_seen() -> None:
    gc.collect()  # what tests before this one left would be given back meanwhile, and lower the peak
    release_freed_memory()
    with MemoryWatch() as watch:
        held = torch.ones(64 * MIB // 4)  # larger than what the C library would keep
        time.sleep(0.1)
        del held
        time.sleep(0.05)
    assert 60 * MIB < watch.peak_bytes(CPU) < 120 * MIB
    assert watch.source(CPU) in ("RssAnon", "rss")
    assert watch.level_bytes > MIB


def test_thread_ends_with_the_watch() -> None:
    with MemoryWatch() as watch:
        pass
    assert not watch._thread.is_alive()
