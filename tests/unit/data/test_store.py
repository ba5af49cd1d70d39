"""Tokenized rows on disk: what was written comes back, or the store does not exist."""

import json
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.data.example import Branch, TokenizedExample
from loralab.data.store import TokenStore, read_store_report, write_store
from loralab.data.tokenize import Unit


def branch(prompt: list[int], answer: list[int]) -> Branch:
    return Branch(np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32))


UNITS = [
    (0, 1, Unit([branch([1, 2], [3])])),
    (0, 2, Unit(dropped="too_long")),
    (0, 3, Unit([branch([4], [5, 6]), branch([4, 5, 6, 7, 8], [9])], truncated=True)),
    (1, 1, Unit([branch([2**31 - 1], [0])], empty_answer=True)),
    (1, 2, Unit([branch([7], [8, 9, 10])], truncated=True, empty_answer=True)),
]


def plain(example: TokenizedExample) -> tuple[int, int, list[tuple[list[int], list[int]]]]:
    pairs = [(b.prompt_ids.tolist(), b.answer_ids.tolist()) for b in example.branches]
    return example.source, example.row, pairs


KEPT = [plain(TokenizedExample(row, source, tuple(unit.branches))) for source, row, unit in UNITS if not unit.dropped]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    write_store(tmp_path / "deep" / "store", UNITS, report={"rows": 5})
    return TokenStore(tmp_path / "deep" / "store")


def test_round_trip(store: TokenStore) -> None:
    assert [plain(example) for example in store] == KEPT
    assert len(store) == 4
    assert plain(store[-1]) == KEPT[-1]
    assert [plain(example) for example in store[1:3]] == KEPT[1:3]
    assert read_store_report(store.folder) == {"rows": 5}
    with pytest.raises(IndexError):
        store[4]


def test_figures_of_the_whole(store: TokenStore) -> None:
    assert store.units.tolist() == [0, 2, 3, 4]
    assert store.lengths().tolist() == [3, 6, 2, 4]
    assert store.supervised().tolist() == [1, 3, 1, 3]
    assert (store.truncated, store.empty_answers) == (2, 2)


def test_select_is_a_view_in_the_given_order(store: TokenStore) -> None:
    part = store.select(np.asarray([3, 1]))
    assert [plain(example) for example in part] == [KEPT[3], KEPT[1]]
    assert part.units.tolist() == [4, 2]
    assert part.lengths().tolist() == [4, 6]
    assert part.supervised().tolist() == [3, 3]
    assert (part.truncated, part.empty_answers) == (2, 1)
    assert plain(part.select(np.asarray([1]))[0]) == KEPT[1]


def test_pickling_carries_the_place_and_not_the_tokens(tmp_path: Path) -> None:
    units = [(0, 1, Unit([branch([1] * 50_000, [2])]))]
    write_store(tmp_path / "s", units, report={})
    store = TokenStore(tmp_path / "s").select(np.asarray([0]))
    packed = pickle.dumps(store)
    assert len(packed) < 2000
    assert [plain(example) for example in pickle.loads(packed)] == [plain(example) for example in store]


def test_report_is_read_after_the_units_are_consumed(tmp_path: Path) -> None:
    report: dict[str, Any] = {"rows": 0}

    def units() -> Iterator[tuple[int, int, Unit]]:
        for unit in UNITS:
            report["rows"] += 1
            yield unit

    write_store(tmp_path / "s", units(), report=report)
    assert read_store_report(tmp_path / "s") == {"rows": 5}


def test_store_without_any_kept_unit_can_be_opened(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [(0, 1, Unit(dropped="too_long"))], report={})
    store = TokenStore(tmp_path / "s")
    assert (len(store), list(store), store.truncated) == (0, [], 0)


@pytest.mark.parametrize("name", ["tokens.npy", "branches.npy", "examples.npy"])
def test_truncated_or_missing_file_makes_the_store_absent(store: TokenStore, name: str) -> None:
    path = store.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert read_store_report(store.folder) is None
    path.unlink()
    assert read_store_report(store.folder) is None
    path.write_bytes(content)
    assert read_store_report(store.folder) is not None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sizes": {}}'])
def test_damaged_manifest_makes_the_store_absent(store: TokenStore, content: str) -> None:
    (store.folder / "manifest.json").write_text(content)
    assert read_store_report(store.folder) is None


def test_absent_folder_has_no_report(tmp_path: Path) -> None:
    assert read_store_report(tmp_path / "gone") is None


def test_exception_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def units() -> Iterator[tuple[int, int, Unit]]:
        yield UNITS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "cache" / "s", units(), report={})
    assert list((tmp_path / "cache").iterdir()) == []


def test_older_store_is_replaced_and_survives_a_failure(store: TokenStore) -> None:
    def failing() -> Iterator[tuple[int, int, Unit]]:
        yield UNITS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_store(store.folder, failing(), report={})
    assert read_store_report(store.folder) == {"rows": 5}
    write_store(store.folder, UNITS[:1], report={"rows": 1})
    assert [plain(example) for example in TokenStore(store.folder)] == KEPT[:1]
    assert json.loads((store.folder / "manifest.json").read_text())["report"] == {"rows": 1}
    assert [path.name for path in store.folder.parent.iterdir()] == ["store"]


def test_everybody_may_read_a_store(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_store(tmp_path / "s", UNITS, report={})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").iterdir()} == {0o644}


CONTENTS: dict[str, list[tuple[int, int, Unit]]] = {
    "token": [(0, 1, Unit([branch([1, 2], [4])]))],
    "border": [(0, 1, Unit([branch([1], [2, 3])]))],
    "branches": [(0, 1, Unit([branch([1], [2]), branch([3], [])]))],
    "two examples": [(0, 1, Unit([branch([1, 2], [3])])), (0, 2, Unit([branch([1, 2], [3])]))],
    "nothing": [],
}


def test_content_hash_is_of_ids_borders_and_order(tmp_path: Path) -> None:
    hashes = {}
    for number, (name, units) in enumerate({"base": [UNITS[0]], **CONTENTS}.items()):
        write_store(tmp_path / str(number), units, report={})
        hashes[name] = TokenStore(tmp_path / str(number)).content_sha256()
    assert len(set(hashes.values())) == len(hashes)


def test_content_hash_of_a_view_is_that_of_its_examples(store: TokenStore, tmp_path: Path) -> None:
    for chosen in ([3, 1], [0, 1, 2, 3], [1], [0, 3]):
        kept = [unit for unit in UNITS if not unit[2].dropped]
        # Other rows and sources, the same tokens.
        write_store(tmp_path / "part", [(7, 70 + i, kept[i][2]) for i in chosen], report={})
        part = TokenStore(tmp_path / "part").content_sha256()
        assert store.select(np.asarray(chosen)).content_sha256() == part
    assert store.select(np.asarray([1, 3])).content_sha256() != store.select(np.asarray([3, 1])).content_sha256()


def test_store_of_another_user_is_not_taken_for_absent(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PermissionError):
        read_store_report(store.folder)
