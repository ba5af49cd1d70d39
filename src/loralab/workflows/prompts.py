"""Where the prompts of `generate` come from: options, a file, or standard input. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from loralab.errors import DataError


def read_prompts(options: Sequence[str], file: Path | None, stdin: TextIO | None) -> list[str]:
    """Return the prompts given as options, then those of a file; else one from standard input.

    Raises:
        DataError: the file cannot be read, or there is no prompt.
    """
    prompts = list(options)
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot read the prompts file {str(file)!r}: {error}",
                where="option --file",
                fix="give a UTF-8 text file",
            ) from None
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts and file is None and stdin is not None:
        text = stdin.read().strip("\n")
        prompts = [text] if text else []
    if not prompts:
        raise DataError("no prompt given", where="options --prompt, --file", fix="add --prompt 'Your question'")
    return prompts
