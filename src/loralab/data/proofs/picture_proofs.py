"""The proof of a prompt's pictures: their files are the row's, their tokens those of the model's own processor.

Owns both checks. The processor reads the real picture here, where training's tokens come of a blank one of its
size. A picture goes through it once: where it stands again, its tokens must be those that were proven.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from loralab.data.example import ImageFile, PlacedImage
from loralab.data.images.files import decode
from loralab.data.images.processor import PictureProcessor
from loralab.data.prompts.prompter import Prompter
from loralab.data.proofs.findings import Seen
from loralab.data.proofs.turn_proofs import TrainedTurn
from loralab.errors import DataError

# Pictures whose tokens are remembered as proven.
_REMEMBERED = 1_000_000


class PictureProver:
    """Proves the pictures of trained turns.

    Args:
        prompter: with the model's processor.
    """

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._proven: dict[str, bytes] = {}

    @property
    def proven(self) -> int:
        """How many different pictures the processor has read."""
        return len(self._proven)

    def prove(self, case: TrainedTurn) -> Iterator[Seen]:
        """Yield what is wrong with the pictures of a turn whose `before` is known."""
        pictures = self._prompter.pictures
        files = [part.file for message in case.before for part in message.images if part.file is not None]
        if pictures is None or not (files or case.images):
            return
        fault = _compare_files(files, [image.file for image in case.images])
        if fault is None:
            fault = self._prove_tokens(case, pictures)
        if fault is not None:
            yield fault

    def _prove_tokens(self, case: TrainedTurn, pictures: PictureProcessor) -> Seen | None:
        spans = [_digest(case.stored[image.start : image.end]) for image in case.images]
        if all(self._proven.get(image.file.sha256) == span for image, span in zip(case.images, spans, strict=True)):
            return None
        if case.served is None:  # nobody is sent this prompt: each picture by itself
            text, stored = "".join(pictures.marker for _ in case.images), _joined(case.stored, case.images)
        else:
            text = self._prompter.render(case.before, add_generation_prompt=True, tools=case.conversation.tools)
            stored = case.stored
        try:
            own = _ask(pictures, text, [image.file for image in case.images])
        except DataError as error:
            return "picture_changed", f"{error.problems[0].where}: {error.problems[0].what}"
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            return "picture_differs", f"the processor refuses it: {' '.join(str(error).split())[:160]}"
        if own != stored:
            return "picture_differs", _difference(stored, own, case.images, pictures.token)
        for image, span in zip(case.images, spans, strict=True):
            if len(self._proven) < _REMEMBERED:
                self._proven[image.file.sha256] = span
        return None


def _ask(pictures: PictureProcessor, text: str, files: Sequence[ImageFile]) -> list[int]:
    """Return what the processor makes of a prompt's text and its real pictures."""
    shown = [decode(file) for file in files]
    made: Any = pictures.processor(text=[text], images=[shown], add_special_tokens=False, return_tensors="pt")
    return [int(token) for token in made["input_ids"][0].tolist()]


def _compare_files(row: Sequence[ImageFile], stored: Sequence[ImageFile]) -> Seen | None:
    if len(row) != len(stored):
        return "picture_missing", f"the row has {len(row)} pictures before the answer, {len(stored)} are stored"
    for now, then in zip(row, stored, strict=True):
        if now.sha256 == then.sha256:
            continue
        if now.path == then.path:
            return "picture_changed", f"{now.path}: sha256 {now.sha256[:12]}, stored was {then.sha256[:12]}"
        return "picture_missing", f"the row has {now.path}, stored is {then.path}"
    return None


def _joined(ids: Sequence[int], images: Sequence[PlacedImage]) -> list[int]:
    return [token for image in images for token in ids[image.start : image.end]]


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _difference(stored: Sequence[int], own: Sequence[int], images: Sequence[PlacedImage], token: int) -> str:
    names = ", ".join(image.file.path for image in images)
    ours, theirs = (sum(each == token for each in ids) for ids in (stored, own))
    if ours != theirs:
        return f"{names}: {ours} tokens are stored, the processor makes {theirs}"
    place = next((i for i, (a, b) in enumerate(zip(stored, own, strict=False)) if a != b), min(len(stored), len(own)))
    return f"{names}: token {place + 1} is {stored[place : place + 3]}, the processor makes {own[place : place + 3]}"
