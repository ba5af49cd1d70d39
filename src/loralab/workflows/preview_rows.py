"""Rows as a person looks at them: turn by turn, every token with its text and whether it carries loss.

Owns which rows are shown and their form as data; how they look is the terminal's and the page's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loralab.data.dataset import PreparedData
from loralab.data.example import Branch, PlacedImage, TokenizedExample
from loralab.data.pools import Pool
from loralab.data.prompts.decoding import Decoder
from loralab.data.reading.json_rows import parse_row
from loralab.data.reading.sources import Source
from loralab.data.tokens.packing import Integers
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.data.tokens.tokenize import NOTES
from loralab.errors import DataError
from loralab.lookup import suggest
from loralab.workflows.thumbnails import image_facts

# Of a row that was dropped, so much of each field is shown.
_FIELD_CHARACTERS = 400


class RowViewer:
    """Makes the data of rows to show.

    Args:
        data: prepared rows.
    """

    def __init__(self, data: PreparedData) -> None:
        self._data = data
        self._stops = set(data.prompter.stop.ids)
        self._notes: dict[str, dict[str, Integers]] = {}
        self._decoder = Decoder(data.prompter.tokenizer, data.prompter.stop.ids[0])
        self._special = {
            index for index, token in data.prompter.tokenizer.added_tokens_decoder.items() if token.special
        } | self._stops

    def first_rows(self, split: str, count: int) -> list[dict[str, Any]]:
        """Return the first rows of a split.

        Raises:
            DataError: there is no such split.
        """
        if split not in self._data.splits:
            raise DataError(
                f"no such split: {split!r}", where="option --split", fix=suggest(split, list(self._data.splits))
            )
        store, names = self._data.splits[split], self._pool(split).sources
        places = range(min(count, len(store)))
        return [self._view(split, place, store[place], names[store[place].source].name) for place in places]

    def named_row(self, name: str) -> list[dict[str, Any]]:
        """Return everything that is stored of one row, or why there is nothing.

        Args:
            name: number of the row, or source and number: `FILE:NUMBER`, where the end of a path will do.

        Raises:
            DataError: there is no such row.
        """
        source_name, _, text = name.rpartition(":")
        if not text.isdecimal() or int(text) < 1:
            raise DataError(
                f"not a row: {name!r}", where="option --row", fix="give its number, or FILE:NUMBER; the first is 1"
            )
        number, found = int(text), []
        sources = [source.name for pool in self._data.pools for source in pool.sources]
        meant = [source for source in sources if _is_named(source, source_name)]
        if not meant:
            raise DataError(f"no such source: {source_name!r}", where="option --row", fix=suggest(source_name, sources))
        for pool in self._data.pools:
            for index, (source, worker) in enumerate(zip(pool.sources, pool.workers, strict=True)):
                if source.name in meant:
                    found += self._stored(pool, index, number) or self._dropped(source, worker, number)
        if not found:
            raise DataError(
                f"no row {number} in {source_name or ', '.join(sources)}",
                where="option --row",
                fix="give the number of a row that is there; the first is 1",
            )
        return found

    def _pool(self, split: str) -> Pool:
        return next(pool for pool in self._data.pools if split in pool.parts)

    def _stored(self, pool: Pool, source: int, number: int) -> list[dict[str, Any]]:
        name = pool.sources[source].name
        return [
            self._view(split, int(place), self._data.splits[split][int(place)], name)
            for split in pool.parts
            for place in np.flatnonzero((self._data.splits[split].origins == (source, number)).all(axis=1))
        ]

    def _dropped(self, source: Source, worker: RowTokenizer, number: int) -> list[dict[str, Any]]:
        for unparsed in source.pick([number]):
            row = parse_row(unparsed)
            ((_, units),) = worker([row])
            fields = {str(name): str(value)[:_FIELD_CHARACTERS] for name, value in row.fields.items()}
            reasons = [unit.dropped for unit in units if unit.dropped is not None]
            if "bad_row" in reasons or "template_refused" in reasons:
                reasons.append(worker.explain(unparsed))
            return [
                _facts(None, source.name, number)
                | {"status": "dropped", "reason": ", ".join(reasons), "fields": fields}
            ]
        return []

    def _view(self, split: str, place: int, example: TokenizedExample, source: str) -> dict[str, Any]:
        turns = []
        before: list[int] = []
        root = self._pool(split).workers[example.source].images.root
        for branch in example.branches:
            turn, before = self._turn(branch, before, root)
            turns.append(turn)
        return _facts(split, source, example.row) | {
            "status": "kept",
            "notes": [note for note, places in self._noted(split).items() if place in places],
            "length": max(len(branch.prompt_ids) + len(branch.answer_ids) for branch in example.branches),
            "supervised": example.supervised_tokens,
            "turns": turns,
        }

    def _noted(self, split: str) -> dict[str, Integers]:
        """Return the positions of the rows with each note; read once, as a store reads all rows for each."""
        if split not in self._notes:
            store = self._data.splits[split]
            self._notes[split] = {note: places for note in NOTES if len(places := store.noted(note))}
        return self._notes[split]

    def _turn(self, branch: Branch, before: Sequence[int], root: Path) -> tuple[dict[str, Any], list[int]]:
        """Return a branch as data; where it goes on from the one before, only what is new."""
        prompt, answer = branch.prompt_ids.tolist(), branch.answer_ids.tolist()
        seen = len(before) if before and prompt[: len(before)] == list(before) else 0
        tokens: list[dict[str, Any]] = []
        last = seen
        for image in branch.images:
            if image.start < seen:
                continue
            tokens += [*self._tokens(prompt[last : image.start]), _picture_token(image, prompt, root)]
            last = image.end
        tokens += [*self._tokens(prompt[last:]), *self._tokens(answer, supervised=True)]
        start = 0
        for token in tokens:
            token["start"], token["end"] = start, start + len(token["text"])
            start = token["end"]
        facts = {"prompt_tokens": len(prompt), "answer_tokens": len(answer), "seen_tokens": seen}
        return facts | {"text": "".join(token["text"] for token in tokens), "tokens": tokens}, [*prompt, *answer]

    def _tokens(self, ids: Sequence[int], *, supervised: bool = False) -> Iterator[dict[str, Any]]:
        for piece in self._decoder.pieces(ids):
            yield {
                "ids": list(piece.ids),
                "text": piece.text,
                "start": 0,
                "end": 0,
                "supervised": supervised,
                "special": piece.ids[0] in self._special,
                "stop": supervised and piece.ids[0] in self._stops,
            }


def _picture_token(image: PlacedImage, prompt: Sequence[int], root: Path) -> dict[str, Any]:
    """Return the tokens of a picture as one."""
    file = image.file
    path = Path(file.path)
    name = str(path.relative_to(root)) if path.is_relative_to(root) else file.path
    return {
        "ids": list(prompt[image.start : image.end]),
        "text": f"<picture {file.width}x{file.height}, {image.length:,} tokens: {name}>",
        "start": 0,
        "end": 0,
        "supervised": False,
        "special": True,
        "stop": False,
        "picture": {"name": name, **image_facts(file)},
    }


def _is_named(source: str, name: str) -> bool:
    """Whether a source is the one named: every one by no name, else by its whole path or the end of it."""
    return name in ("", source) or source.endswith(f"/{name}")


def _facts(split: str | None, source: str, row: int) -> dict[str, Any]:
    return {"split": split, "source": source, "row": row}
