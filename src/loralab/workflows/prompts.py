"""Prompts of `generate`: where they come from (options, a file, standard input), and what turn each makes. No torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from loralab.data.example import ImageFile, ImagePart, Message
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
        text = _read_input(stdin).strip("\n")
        prompts = [text] if text else []
    if not prompts:
        raise DataError("no prompt given", where="options --prompt, --file", fix="add --prompt 'Your question'")
    check_texts(prompts)
    return prompts


def _read_input(stdin: TextIO) -> str:
    with readable_input():
        return stdin.read()


@contextmanager
def readable_input() -> Iterator[None]:
    """Name input that is no text of its encoding.

    Raises:
        DataError: what is read within is not.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"the prompt is not {error.encoding} text (byte {error.start})",
            where="standard input",
            fix="send UTF-8, and set LC_ALL=C.UTF-8 where the locale is another",
        ) from None


def check_texts(prompts: Sequence[str], system: str | None = None) -> None:
    """Check that every prompt and the system message can be written as UTF-8, which tokenizers read.

    Raises:
        DataError: one holds half a surrogate pair, as bytes that are no UTF-8 become on the command line.
    """
    for number, prompt in enumerate(prompts, start=1):
        check_text(prompt, where=f"prompt {number}")
    if system is not None:
        check_text(system, where="system message")


def check_text(text: str, *, where: str) -> None:
    """Check that a text can be written as UTF-8.

    Raises:
        DataError: it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"not UTF-8 text: {text[max(error.start - 20, 0) : error.start + 20]!r}",
            where=f"{where}, character {error.start + 1}",
            fix="write it in UTF-8, or put it into a UTF-8 file for --file",
        ) from None


def user_turn(text: str, pictures: Sequence[ImageFile]) -> Message:
    """Return a user turn with pictures before its text."""
    if not pictures:
        return Message("user", text)
    parts = [ImagePart(picture.path, picture) for picture in pictures]
    return Message("user", text, parts=(*parts, text))
