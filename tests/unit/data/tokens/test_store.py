"""Tokenized rows on disk: what was written comes back, and whatever is damaged is noticed."""

import copy
import json
import os
import pickle
import stat
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.data.example import TokenizedExample
from loralab.data.tokens import store as store_module
from loralab.data.tokens.store import ARRAYS, MANIFEST, TokenStore, find_damage, read_manifest, read_report
from loralab.data.tokens.store_writer import PROGRESS, StoreWriter
from loralab.data.tokens.tokenize import Unit
from unit.data.stores import Placed, branch, pack, plain, write_units

UNITS: list[Placed] = [
    (0, 1, Unit([branch([1, 2], [3])], system="be kind")),
    (0, 2, Unit(dropped="too_long")),
    (0, 3, Unit([branch([4], [5, 6]), branch([4, 5, 6, 7, 8], [9])], notes={"truncated"})),
    (1, 1, Unit([branch([2**31 - 1], [0])], notes={"empty_answer"})),
    (1, 2, Unit([branch([7], [8, 9, 10])], notes={"truncated", "empty_answer"}, system="be kind")),
    (1, 3, Unit(dropped="bad_row")),
    (1, 4, Unit(dropped="too_long")),
]
KEPT = [plain(TokenizedExample(row, source, tuple(unit.branches))) for source, row, unit in UNITS if not unit.dropped]


# Without pictures the files of pictures are empty: `test_store_pictures.py` damages those.
FILLED = [name for name in ARRAYS if name not in ("images.bin", "paths.bin")]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_units(tmp_path / "deep" / "store", UNITS)


def test_round_trip(store: TokenStore) -> None:
    assert [plain(example) for example in store] == KEPT
    assert len(store) == 4
    assert plain(store[-1]) == KEPT[-1]
    assert [plain(example) for example in store[1:3]] == KEPT[1:3]
    with pytest.raises(IndexError):
        store[4]


def test_report(store: TokenStore) -> None:
    assert read_report(store.folder) == {
        "rows": 7,
        "units": 7,
        "dropped": [[1, 0, 2, "too_long"], [5, 1, 3, "bad_row"], [6, 1, 4, "too_long"]],
        "systems": {"be kind": 2},
        "systems_without": 2,
    }


def test_only_the_first_system_messages_are_listed(tmp_path: Path) -> None:
    names = ["a", "b", None, "c", "d", "e", "f", "e", "a"]
    units: list[Placed] = [(0, row, Unit([branch([1], [2])], system=name)) for row, name in enumerate(names, 1)]
    whole = read_report(write_units(tmp_path / "whole", units).folder)
    assert (whole["systems"], whole["systems_without"]) == ({"a": 2, "b": 1, "c": 1, "d": 1}, 1)
    writer = StoreWriter(tmp_path / "parts")  # how rows are packed together does not matter
    for unit in units:
        writer.add(pack([unit])[0][1], 0)
    writer.finish({})
    assert read_report(tmp_path / "parts") == whole


def test_figures_of_the_whole(store: TokenStore) -> None:
    assert store.units.tolist() == [0, 2, 3, 4]
    assert store.origins.tolist() == [[0, 1], [0, 3], [1, 1], [1, 2]]
    assert store.lengths().tolist() == [3, 6, 2, 4]
    assert store.supervised().tolist() == [1, 3, 1, 3]
    assert (store.count("truncated"), store.count("empty_answer"), store.count("no_stop")) == (2, 2, 0)
    assert store.noted("truncated").tolist() == [1, 3]
    assert store.largest_id == 2**31 - 1
    figures = {"largest_id": 2**31 - 1, "supervised_tokens": 8, "total_tokens": 15, "examples": 4}
    assert read_manifest(store.folder)["figures"] == figures


def test_select_is_a_view_in_the_given_order(store: TokenStore) -> None:
    part = store.select(np.asarray([3, 1]))
    assert [plain(example) for example in part] == [KEPT[3], KEPT[1]]
    assert part.units.tolist() == [4, 2]
    assert part.lengths().tolist() == [4, 6]
    assert part.supervised().tolist() == [3, 3]
    assert part.noted("empty_answer").tolist() == [0]
    assert plain(part.select(np.asarray([1]))[0]) == KEPT[1]


def test_pickling_carries_the_place_and_not_the_tokens(tmp_path: Path) -> None:
    store = write_units(tmp_path / "s", [(0, 1, Unit([branch([1] * 50_000, [2])]))]).select(np.asarray([0]))
    packed = pickle.dumps(store)
    assert len(packed) < 2000
    assert [plain(example) for example in pickle.loads(packed)] == [plain(example) for example in store]


def test_store_without_any_kept_unit_can_be_opened(tmp_path: Path) -> None:
    store = write_units(tmp_path / "s", [(0, 1, Unit(dropped="too_long"))])
    assert (len(store), list(store), store.count("truncated"), store.largest_id) == (0, [], 0, 0)
    assert (store.lengths().tolist(), store.supervised().tolist()) == ([], [])
    assert find_damage(store.folder) is None
    assert len(store.content_sha256()) == 64


@pytest.mark.parametrize("name", FILLED)
def test_changed_cut_or_missing_file_is_damage(store: TokenStore, name: str) -> None:
    path = store.folder / name
    content = path.read_bytes()
    assert find_damage(store.folder) is None
    path.write_bytes(content[:-1])
    assert find_damage(store.folder) == f"{name} has {len(content) - 1} bytes, {len(content)} were written"
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert find_damage(store.folder) == f"{name} is not what was written"
    path.unlink()
    assert find_damage(store.folder) == f"{name}: No such file or directory"
    path.write_bytes(content)
    assert find_damage(store.folder) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sizes": {}}', '{"content": {}, "sha256": ""}', "[" * 9999])
def test_damaged_manifest_is_damage(store: TokenStore, content: str) -> None:
    (store.folder / MANIFEST).write_text(content)
    assert find_damage(store.folder) == "manifest.json is damaged"


def test_every_changed_character_of_the_manifest_is_noticed(store: TokenStore) -> None:
    path = store.folder / MANIFEST
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert find_damage(store.folder) is not None, place


def test_absent_store_is_damage(tmp_path: Path) -> None:
    assert find_damage(tmp_path / "gone") == "manifest.json: No such file or directory"


def test_everybody_may_read_a_store(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_units(tmp_path / "s", UNITS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").iterdir()} == {0o644}


def test_store_of_another_user_is_not_taken_for_damaged(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PermissionError):
        find_damage(store.folder)


CONTENTS: dict[str, list[Placed]] = {
    "token": [(0, 1, Unit([branch([1, 2], [4])]))],
    "border": [(0, 1, Unit([branch([1], [2, 3])]))],
    "branches": [(0, 1, Unit([branch([1], [2]), branch([3], [])]))],
    "two examples": [(0, 1, Unit([branch([1, 2], [3])])), (0, 2, Unit([branch([1, 2], [3])]))],
    "nothing": [],
}


def test_content_hash_is_of_ids_borders_and_order(tmp_path: Path) -> None:
    stores = [
        write_units(tmp_path / str(number), units)
        for number, units in enumerate(({"base": [UNITS[0]]} | CONTENTS).values())
    ]
    assert len({store.content_sha256() for store in stores}) == len(stores)


def test_content_hash_stays_the_same_in_later_versions(store: TokenStore) -> None:
    # A resume must find the data that an older version prepared.
    assert store.content_sha256() == "6627dbfcc3ee55d7ad240830cccfd2629df13d0a43d393559b1f9bd4dcbdb151"


@pytest.mark.parametrize("block", [1, 2, 2**16])
def test_content_hash_of_a_view_is_that_of_its_examples(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    whole = store.content_sha256()
    monkeypatch.setattr(store_module, "_BLOCK_EXAMPLES", block)
    monkeypatch.setattr(store_module, "_BLOCK_BYTES", block)
    assert store.content_sha256() == whole
    for number, chosen in enumerate(([3, 1], [0, 1, 2, 3], [1], [0, 3])):
        kept = [unit for unit in UNITS if not unit[2].dropped]
        # Other rows and sources, the same tokens.
        part = write_units(tmp_path / f"part{number}", [(7, 70 + i, kept[i][2]) for i in chosen])
        assert store.select(np.asarray(chosen)).content_sha256() == part.content_sha256()
    assert store.select(np.asarray([1, 3])).content_sha256() != store.select(np.asarray([3, 1])).content_sha256()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("committed", range(len(UNITS) + 1))
def test_writing_goes_on_at_the_last_commit(store: TokenStore, tmp_path: Path, committed: int) -> None:
    writer = StoreWriter(tmp_path / "s")
    for number, unit in enumerate(UNITS):
        if number == committed:
            writer.commit()
        writer.add(pack([unit])[0][1], unit[0])
    writer.close()  # as far as the buffers go: more than was committed
    again = StoreWriter(tmp_path / "s")
    assert again.restarted is None
    done = committed if committed < len(UNITS) else 0
    assert again.progress.rows == again.progress.units == done
    if done:
        assert (again.progress.source, again.progress.source_rows) == UNITS[done - 1][:2]
    for unit in UNITS[done:]:
        again.add(pack([unit])[0][1], unit[0])
    again.finish({})
    assert contents(tmp_path / "s") == contents(store.folder)


@pytest.mark.parametrize("name", [*FILLED, PROGRESS])
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
    assert (again.restarted is None) == (name == PROGRESS and damage == "gone")
    for unit in UNITS:
        again.add(pack([unit])[0][1], unit[0])
    again.finish({})
    assert contents(tmp_path / "s") == contents(store.folder)


def test_key_is_in_the_manifest(tmp_path: Path) -> None:
    write_units(tmp_path / "s", UNITS, key={"template": "x"})
    assert json.loads((tmp_path / "s" / MANIFEST).read_text())["content"]["key"] == {"template": "x"}


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    units: list[Placed] = [(0, row, Unit([branch([row] * 100, [row] * 20)])) for row in range(200)]
    ((_, packed),) = pack(units)
    writer = StoreWriter(tmp_path / "s")
    tracemalloc.start()
    try:
        for _ in range(200):
            writer.add(copy.deepcopy(packed), 0)
        writer.finish({})
        store = TokenStore(tmp_path / "s")
        store.content_sha256()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(store) == 40_000
    written = sum((tmp_path / "s" / name).stat().st_size for name in ARRAYS)
    assert written > 20_000_000
    # Buffers, and what a block of rows takes while it is hashed.
    assert peak_bytes < 12_000_000


def test_a_full_disk_is_told_once(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.add(pack(UNITS[:1])[0][1], 0)
    writer._files["tokens.bin"].close()
    with Path("/dev/full").open("wb") as full:
        writer._files["tokens.bin"] = full
        full.write(b"x")
        with pytest.raises(OSError, match="No space left"):
            writer.commit()
        writer.close()
    assert not (tmp_path / "s" / PROGRESS).exists()
