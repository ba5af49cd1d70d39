"""What the client of the Hub shows by itself, kept out: progress is the reporter's, results the command's."""

import contextlib
import logging
from collections.abc import Iterator

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

# What the client logs where the repository has every file already.
_NOTHING_NEW = "No files have been modified since last commit"


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Let the client show no progress bar meanwhile."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextlib.contextmanager
def without_remark() -> Iterator[None]:
    """Keep back the client's remark on a commit that changes nothing: all files are compared anyway."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOTHING_NEW)

    logger = logging.getLogger("huggingface_hub.hf_api")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
