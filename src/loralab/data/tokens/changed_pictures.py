"""Pictures behind stored tokens: whether they are still what was looked at.

Owns the look at their files. What happens to an entry whose pictures changed is the cache's.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from loralab.data.example import ImageFile
from loralab.run import file_sha256


def find_changed_picture(files: Iterable[ImageFile]) -> str | None:
    """Return which picture is gone or holds other bytes than before, the first such one, or None.

    A file of the same size and time of writing is taken for the same; any other is read.

    Args:
        files: as they were looked at.
    """
    for file in files:
        try:
            found = os.stat(file.path)  # noqa: PTH116 - a path with odd characters must stay as it is
            if (found.st_size, found.st_mtime_ns) == (file.size_bytes, file.modified_ns):
                continue
            if found.st_size != file.size_bytes or file_sha256(Path(file.path)) != file.sha256:
                return f"{file.path!r} is another one now"
        except OSError as error:
            return f"{file.path!r}: {error.strerror or error}"
    return None
