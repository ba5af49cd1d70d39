"""Paths in texts that others read: only their last part is anybody's business."""

from pathlib import PurePosixPath, PureWindowsPath


def path_name(text: str) -> str:
    """Return the last part of a path, whichever system wrote it; other text as it stands."""
    name = PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name
    return name or "model"


def is_absolute(text: str) -> bool:
    """Return whether a text is an absolute path on some system."""
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
