"""Paths that a user names: which cannot be one on any machine, and how `~` is read.

Owns the checks that need the file system but open no file. What a path must lead to is checked
where it is read.
"""

import errno
import os
import sys
from pathlib import Path

from loralab.config.checks import source_names
from loralab.config.findings import Finding
from loralab.config.schema import Config
from loralab.errors import ConfigError

_NAME_BYTES = 255  # the longest name in a folder, on all common file systems


def path_problem(text: str) -> tuple[str, str] | None:
    """Return what is wrong with a path and how to mend it, or None; the path need not exist."""
    if "\0" in text:
        return f"null byte in the path {text!r}", "remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        fix = "rename the file or folder" if encoding == "utf-8" else f"set LC_ALL=C.UTF-8; the locale is {encoding}"
        return f"the path {text!r} is not UTF-8", fix
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        return f"cannot expand {text!r}: {_lower(str(error))}", "write the whole path instead of ~, or set HOME"
    return _too_long(text, path)


def _too_long(text: str, path: Path) -> tuple[str, str] | None:
    size = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if size > _NAME_BYTES:
        return f"name of {size} bytes in the path {_cut(text)!r}", f"shorten it to at most {_NAME_BYTES} bytes"
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"path of {len(os.fsencode(path))} bytes: {_cut(text)!r}", "shorten it"
        if error.errno == errno.ELOOP:
            return f"links in a circle: {_cut(text)!r}", "mend the symbolic link"
    return None


def _lower(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def local_path(text: str) -> Path | None:
    """Return `text` as a path with `~` expanded, or None where it cannot be one."""
    return None if path_problem(text) else Path(text).expanduser()


def check_path(path: Path, *, where: str) -> Path:
    """Return `path` if it can be one.

    Raises:
        ConfigError: it cannot.
    """
    problem = path_problem(os.fspath(path))
    if problem is not None:
        raise ConfigError(problem[0], where=where, fix=problem[1])
    return path


def check_paths(config: Config) -> list[Finding]:
    """Return findings for settings that name no possible path, and for the revision of a local folder."""
    named = {
        "model.name": config.model.name,
        "data.train": config.data.train,
        "data.validation": config.data.validation,
        "data.test": config.data.test,
        "data.template": config.data.template,
        "data.image.folder": config.data.image.folder,
        "data.cache_dir": config.data.cache_dir,
        "output.dir": config.output.dir,
    }
    findings = []
    for key, value in named.items():
        for text in source_names(value):
            problem = path_problem(text)
            if problem is not None:
                findings.append(Finding(key, *problem))
    folder = local_path(config.model.name)
    if config.model.revision is not None and folder is not None and folder.is_dir():
        what = f"revision {config.model.revision!r} of a local folder, which has only one"
        findings.append(Finding("model.revision", what, "remove it, or name the model by its Hub id"))
    return findings
