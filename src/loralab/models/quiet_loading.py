"""Loading by transformers without its own progress bars: progress is the reporter's.

Owns that alone.
"""

import contextlib
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
