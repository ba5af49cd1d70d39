"""Pictures of tokenized rows on disk: what was written comes back, in views too, and after a kill."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from loralab.data.example import Branch, ImageFile, PlacedImage
from loralab.data.tokens import store as store_module
from loralab.data.tokens.packing import IMAGE_COLUMNS
from loralab.data.tokens.store import TokenStore, find_damage
from loralab.data.tokens.store_writer import StoreWriter
from loralab.data.tokens.tokenize import Unit
from unit.data.stores import Placed, branch, pack, write_units

# As names on disks are: a space, letters beyond Latin, a line break, and bytes that are no UTF-8.
NAMES = ["a b.png", "Bär 熊.png", "new\nline.png", os.fsdecode(b"\xff\xfe.png"), "q'uote\".png"]


def file(number: int, *, path: str | None = None, content: int | None = None) -> ImageFile:
    sha = hashlib.sha256(str(number if content is None else content).encode()).hexdigest()
    name = path or f"/photos/{NAMES[number % len(NAMES)]}{number}"
    return ImageFile(name, sha, 30 + number, 20 + number, 2**33 + number, 2**61 + number)


def shown(prompt: list[int], *files: ImageFile, start: int = 0) -> Branch:
    images = tuple(PlacedImage(each, start + 3 * k, 2 + k, k, 2) for k, each in enumerate(files))
    return Branch(np.asarray(prompt, dtype=np.int32), np.asarray([7], dtype=np.int32), images)


UNITS: list[Placed] = [
    (0, 1, Unit([shown([1, 2], file(0), file(1)), branch([4], [5])])),
    (0, 2, Unit(dropped="bad_row")),
    (0, 3, Unit([branch([1], [2])])),
    (0, 4, Unit([branch([1], [2]), shown([3], file(2)), shown([3, 4], file(0), file(3), start=1)])),
    (1, 1, Unit([shown([1], file(4))])),
    (1, 2, Unit([shown([1], file(0)), shown([2], file(4))])),
]
KEPT = [[each.images for each in unit.branches] for _, _, unit in UNITS if unit.dropped is None]


def images_of(store: TokenStore) -> list[list[tuple[PlacedImage, ...]]]:
    return [[each.images for each in example.branches] for example in store]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_units(tmp_path / "whole", UNITS)


def test_round_trip(store: TokenStore) -> None:
    assert images_of(store) == KEPT
    assert store.has_images
    assert store.images() == store.image_files() == [file(0), file(1), file(2), file(3), file(4)]
    assert store.image_uses() == 8


def test_views_and_copies_in_other_processes(store: TokenStore) -> None:
    part = store.select(np.asarray([4, 1, 2]))
    assert images_of(part) == [KEPT[4], KEPT[1], KEPT[2]]
    assert part.images() == [file(0), file(4), file(2), file(3)]
    assert part.image_uses() == 5
    assert images_of(pickle.loads(pickle.dumps(part))) == images_of(part)
    without = store.select(np.asarray([1]))
    assert (without.images(), without.image_files(), without.image_uses()) == ([], [], 0)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_how_rows_are_packed_does_not_matter(store: TokenStore, tmp_path: Path, chunk: int) -> None:
    writer = StoreWriter(tmp_path / "parts")
    for start in range(0, len(UNITS), chunk):
        for source, packed in pack(UNITS[start : start + chunk]):
            writer.add(packed, source)
    writer.finish({})
    parts = TokenStore(tmp_path / "parts")
    assert images_of(parts) == KEPT
    assert parts.images() == parts.image_files() == store.images()  # a path stands there once for each chunk
    assert parts.content_sha256() == store.content_sha256()
    assert find_damage(parts.folder) is None


@pytest.mark.parametrize("committed", range(1, len(UNITS) + 1))
def test_writing_goes_on_at_the_last_commit(store: TokenStore, tmp_path: Path, committed: int) -> None:
    writer = StoreWriter(tmp_path / "s")
    for number, unit in enumerate(UNITS):
        if number == committed:
            writer.commit()
        writer.add(pack([unit])[0][1], unit[0])
    writer.close()  # as far as the buffers go: more than was committed
    again = StoreWriter(tmp_path / "s")
    assert again.progress.rows == committed % len(UNITS)
    for unit in UNITS[again.progress.rows :]:
        again.add(pack([unit])[0][1], unit[0])
    again.finish({})
    assert images_of(TokenStore(tmp_path / "s")) == KEPT
    assert TokenStore(tmp_path / "s").content_sha256() == store.content_sha256()


@pytest.mark.parametrize("name", ["images.bin", "paths.bin"])
def test_changed_cut_or_missing_file_is_damage(store: TokenStore, name: str) -> None:
    path = store.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert find_damage(store.folder) == f"{name} has {len(content) - 1:,} bytes, {len(content):,} were written"
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert find_damage(store.folder) == f"{name} is not what was written"
    path.unlink()
    assert find_damage(store.folder) == f"{name}: No such file or directory"


@pytest.mark.parametrize("name", ["images.bin", "paths.bin"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_beginning_is_written_again(store: TokenStore, tmp_path: Path, name: str, damage: str) -> None:
    writer = StoreWriter(tmp_path / "s")
    for unit in UNITS:
        writer.add(pack([unit])[0][1], unit[0])
    writer.commit()
    writer.close()
    path = tmp_path / "s" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    again = StoreWriter(tmp_path / "s")
    assert again.progress.rows == 0
    assert again.restarted is not None
    again.close()


def test_equal_bytes_are_one_picture_and_several_files(tmp_path: Path) -> None:
    twin, newer = file(0, path="/twin.png"), file(0, path="/twin.png", content=9)
    units: list[Placed] = [(0, n, Unit([shown([1], each)])) for n, each in enumerate([file(0), twin, newer, twin], 1)]
    store = write_units(tmp_path / "s", units)
    assert store.images() == [file(0), newer]
    assert store.image_files() == [file(0), twin, newer]


CONTENTS: dict[str, list[Branch]] = {
    "as it is": [shown([1, 2], file(0)), branch([1, 2], [7])],
    "none": [branch([1, 2], [7]), branch([1, 2], [7])],
    "another picture": [shown([1, 2], file(0, content=5)), branch([1, 2], [7])],
    "another place": [shown([1, 2], file(0), start=1), branch([1, 2], [7])],
    "another shape": [
        Branch(np.asarray([1, 2], dtype=np.int32), np.asarray([7], np.int32), (PlacedImage(file(0), 0, 2, 2, 1),)),
        branch([1, 2], [7]),
    ],
    "another branch": [branch([1, 2], [7]), shown([1, 2], file(0))],
    "twice": [shown([1, 2], file(0)), shown([1, 2], file(0))],
}


@pytest.mark.parametrize("block", [1, 2**16])
def test_content_hash_is_of_pictures_and_their_places(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_BLOCK_EXAMPLES", block)
    stores = [write_units(tmp_path / str(n), [(0, 1, Unit(c))]) for n, c in enumerate(CONTENTS.values())]
    assert len({store.content_sha256() for store in stores}) == len(CONTENTS)
    moved = [shown([1, 2], file(0, path="/elsewhere.png")), branch([1, 2], [7])]
    assert write_units(tmp_path / "m", [(0, 1, Unit(moved))]).content_sha256() == stores[0].content_sha256()


def test_content_hash_of_a_view_is_that_of_its_examples(store: TokenStore, tmp_path: Path) -> None:
    kept = [unit for unit in UNITS if unit[2].dropped is None]
    for number, chosen in enumerate(([3, 0], [1], [2, 4, 1])):
        part = write_units(tmp_path / f"part{number}", [(7, 70 + i, kept[i][2]) for i in chosen])
        assert store.select(np.asarray(chosen)).content_sha256() == part.content_sha256()


def test_the_table_has_the_columns_that_the_store_reads_by_number() -> None:
    hashes = tuple(f"hash_{n}" for n in range(1, 5))
    assert IMAGE_COLUMNS[store_module._HASH] == hashes
    assert IMAGE_COLUMNS[store_module._FILE] == ("size_bytes", "modified_ns", *hashes, "path_start", "path_bytes")
    assert tuple(IMAGE_COLUMNS[n] for n in store_module._SHOWN) == ("start", "length", "rows", "columns", *hashes)


def test_many_rows_on_few_pictures_are_listed_without_a_look_at_each(tmp_path: Path) -> None:
    """No time is asserted: a loop over rows would make one object for each."""
    units: list[Placed] = [(0, row, Unit([shown([1], file(row % 3))])) for row in range(3000)]
    store = write_units(tmp_path / "s", units)
    made: list[int] = []
    original = store._arrays._file
    store._arrays._file = lambda row: made.append(1) or original(row)  # type: ignore[method-assign]
    assert store.images() == store.image_files() == [file(0), file(1), file(2)]
    assert store.image_uses() == 3000
    assert len(made) == 6
