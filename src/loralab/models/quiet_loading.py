"""Loading by transformers without its own progress bars: progress is the reporter's.

Owns that alone.
"""

import contextlib
import io
import sys
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Let transformers show no progress bar meanwhile."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep bars from stderr that ask no setting, as that of reading a GGUF file; other lines come out at the end."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            yield
    finally:
        if sys.stderr is not None:  # as after `2>&-`
            lines = caught.getvalue().split("\n")
            sys.stderr.write("".join(f"{line}\n" for line in lines if line and "\r" not in line))
