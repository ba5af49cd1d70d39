"""The items of a preference test: what is judged, and for every rater an order and sides of their own.

Owns which prompts are taken from a comparison, what makes two answers the same, and how sides are drawn. The file
that holds a set is written here; when it may change is `folder.py`'s.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loralab.errors import JudgingError
from loralab.judging.sitting import BlindPair
from loralab.reports.pictures import find_thumbnail, images_in
from loralab.run import read_json, write_json

Side = Literal["left", "right"]
VERSION = 1
_FIELDS = {"item": str, "prompt": str, "base_output": str, "adapter_output": str, "pictures": list}


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with both answers.

    Attributes:
        item: 16 hexadecimal digits; of prompt, pictures and both answers in an order that says nothing about models.
        source: file or data set that the prompt is from.
        row: of the source, from 1.
        prompt: what both models were asked.
        base_output: the base's answer.
        adapter_output: the adapter's answer.
        pictures: hashes of the prompt's pictures.
    """

    item: str
    source: str
    row: int | None
    prompt: str
    base_output: str
    adapter_output: str
    pictures: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both answers are the same text, blanks at their ends aside: nobody is asked which is better."""
        return self.base_output.strip() == self.adapter_output.strip()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {
            "item": self.item,
            "source": self.source,
            "row": self.row,
            "prompt": self.prompt,
            "base_output": self.base_output,
            "adapter_output": self.adapter_output,
            "pictures": list(self.pictures),
        }


@dataclass(frozen=True, slots=True)
class ItemSet:
    """The frozen items of one test.

    Attributes:
        items: each prompt once, in the order of the data.
        seed: of all orders and sides; drawn, never chosen, as whoever knows it knows the sides.
        adapter_sha256: of the adapter's weights.
        comparison_sha256: of the prompts and answers of the comparison that the items are from.
        split: split that was compared.
        pictures: folder of the pictures' small copies.
    """

    items: tuple[Item, ...]
    seed: int
    adapter_sha256: str
    comparison_sha256: str
    split: str
    pictures: Path

    @property
    def sha256(self) -> str:
        """SHA-256 of all that `items.json` holds. The drawn seed is part of it, so it gives no side away."""
        text = json.dumps(self.as_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def shown(self) -> tuple[Item, ...]:
        """The items whose answers differ."""
        return tuple(item for item in self.items if not item.same)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `items.json`."""
        return {
            "loralab_items": VERSION,
            "seed": self.seed,
            "adapter_sha256": self.adapter_sha256,
            "comparison_sha256": self.comparison_sha256,
            "split": self.split,
            "items": [item.as_dict() for item in self.items],
        }

    def adapter_sides(self, rater: str) -> Mapping[str, Side]:
        """Return the side that a rater sees the adapter's answer on, by item: half of them left, one more or less.

        Args:
            rater: name of the rater.
        """
        ranked = sorted((item.item for item in self.shown), key=lambda item: self._draw(rater, "side", item))
        half = (len(ranked) + self._draw(rater, "odd", "") % 2) // 2
        left = frozenset(ranked[:half])
        return {item.item: "left" if item.item in left else "right" for item in self.shown}

    def pairs_for(self, rater: str) -> tuple[BlindPair, ...]:
        """Return what a rater is shown, in this rater's order and on this rater's sides.

        Args:
            rater: name of the rater.
        """
        sides = self.adapter_sides(rater)
        ordered = sorted(self.shown, key=lambda item: self._draw(rater, "order", item.item))
        return tuple(self._pair(item, sides[item.item]) for item in ordered)

    def _pair(self, item: Item, adapter_side: Side) -> BlindPair:
        texts = (item.adapter_output, item.base_output)
        left, right = texts if adapter_side == "left" else texts[::-1]
        found = (find_thumbnail(self.pictures, sha256) for sha256 in item.pictures)
        return BlindPair(item.item, item.prompt, left, right, tuple(path for path in found if path is not None))

    def _draw(self, rater: str, what: str, item: str) -> int:
        """Return a number that only depends on seed, rater and item, and is the same everywhere."""
        text = "\0".join((str(self.seed), rater, what, item))
        return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def draw_seed() -> int:
    """Return a new seed. A small one could be found by trying which of them gives an item set's hash."""
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a set of items is made from.

    Attributes:
        adapter_sha256: of the adapter's weights.
        comparison_sha256: of the comparison's prompts and answers.
        pictures: folder of the pictures' small copies.
    """

    adapter_sha256: str
    comparison_sha256: str
    pictures: Path


def build_items(comparison: Mapping[str, Any], origin: Origin, *, examples: int, seed: int) -> ItemSet:
    """Return the items of a comparison: each prompt with both answers once, evenly spread.

    Args:
        comparison: content of `comparison.json`.
        origin: where it is from.
        examples: most items.
        seed: of orders and sides, from `draw_seed`.

    Raises:
        JudgingError: the comparison has no prompts with two answers, or none whose pictures are there.
    """
    read = read_comparison(comparison)
    items = [item for item in read if not missing_pictures([item], origin.pictures)]
    if not read:
        raise JudgingError(
            "nothing to judge: the comparison has no prompt with two answers, as plain text has none",
            where="comparison.json",
            fix="compare on rows with prompts: loralab judge RUN --data FILE --output FOLDER",
        )
    if not items:
        raise JudgingError(
            f"nothing to judge: the pictures of all {len(read)} compared prompts are gone or have changed",
            where=str(origin.pictures),
            fix="bring the files back to where the comparison read them, or compare again: loralab compare RUN",
        )
    chosen = items if examples >= len(items) else [items[place] for place in _spread(len(items), examples)]
    return ItemSet(
        tuple(chosen),
        seed,
        origin.adapter_sha256,
        origin.comparison_sha256,
        str(comparison.get("split") or ""),
        origin.pictures,
    )


def read_comparison(comparison: Mapping[str, Any]) -> list[Item]:
    """Return the prompts of a comparison that have two answers, each once.

    Args:
        comparison: content of `comparison.json`.
    """
    records = comparison.get("prompts")
    found: dict[str, Item] = {}
    for record in records if isinstance(records, list) else []:
        item = _item(record) if isinstance(record, Mapping) else None
        if item is not None:
            found.setdefault(item.item, item)
    return list(found.values())


def comparison_sha256(comparison: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a comparison's prompts and answers; what else was measured does not matter here.

    Args:
        comparison: content of `comparison.json`.
    """
    text = json.dumps([item.as_dict() for item in read_comparison(comparison)])
    return hashlib.sha256(text.encode()).hexdigest()


def missing_pictures(items: Iterable[Item], folder: Path) -> list[str]:
    """Return the pictures that a folder has no small copy of, without which their prompts cannot be judged.

    Args:
        items: prompts.
        folder: of small copies.
    """
    hashes = dict.fromkeys(sha256 for item in items for sha256 in item.pictures)
    return [sha256 for sha256 in hashes if find_thumbnail(folder, sha256) is None]


def _spread(count: int, limit: int) -> list[int]:
    return [(2 * place + 1) * count // (2 * limit) for place in range(limit)]


def _item(record: Mapping[str, Any]) -> Item | None:
    texts = [record.get(name) for name in ("prompt", "base_output", "adapter_output")]
    if not all(isinstance(text, str) for text in texts):
        return None
    # Half of a surrogate pair has no bytes in UTF-8.
    prompt, base, adapter = (str(text).encode("utf-8", "replace").decode() for text in texts)
    pictures = tuple(image["sha256"] for image in images_in(record))
    row = record.get("row")
    name = _name(prompt, sorted((base, adapter)), pictures)
    return Item(
        name,
        str(record.get("source") or ""),
        row if isinstance(row, int) else None,
        prompt,
        base_output=base,
        adapter_output=adapter,
        pictures=pictures,
    )


def _name(prompt: str, answers: Sequence[str], pictures: Sequence[str]) -> str:
    text = json.dumps([prompt, answers, pictures])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_items(path: Path, items: ItemSet) -> None:
    """Write a set with its hash.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(path, {**items.as_dict(), "sha256": items.sha256})


def read_items(path: Path, *, pictures: Path) -> ItemSet:
    """Read a set.

    Args:
        path: of `items.json`.
        pictures: folder of the pictures' small copies.

    Raises:
        JudgingError: the file is no set of items, or was changed.
        RunFolderError: it cannot be read.
    """
    value = read_json(path)
    broken = JudgingError(
        "the items are not those that were frozen: the file was changed, or written by another version",
        where=str(path),
        fix="restore the file from a backup, or begin anew with --new (the old votes are kept beside it)",
    )
    records = value.get("items")
    adapter, comparison, split = (value.get(name) for name in ("adapter_sha256", "comparison_sha256", "split"))
    if value.get("loralab_items") != VERSION or not isinstance(records, list) or not isinstance(value.get("seed"), int):
        raise broken
    if not (isinstance(adapter, str) and isinstance(comparison, str) and isinstance(split, str)):
        raise broken
    if not all(map(_is_item, records)):
        raise broken
    items = tuple(Item(**record | {"pictures": tuple(record["pictures"])}) for record in records)
    found = ItemSet(items, value["seed"], adapter, comparison, split, pictures)
    if found.sha256 != value.get("sha256"):
        raise broken
    return found


def _is_item(record: object) -> bool:
    return (
        isinstance(record, dict)
        and record.keys() == {*_FIELDS, "source", "row"}
        and all(isinstance(record[name], kind) for name, kind in _FIELDS.items())
        and all(isinstance(sha256, str) for sha256 in record["pictures"])
    )
