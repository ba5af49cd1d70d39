"""Rows on one picture stay in one part, or a picture would stand in training and validation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.config.schema import DataConfig
from loralab.data.dataset import prepare_data
from loralab.data.images.processor import PictureProcessor
from loralab.data.splits import split_groups
from loralab.errors import DataError
from loralab.progress import Reporter
from support.tiny import write_rows
from support.tiny_vision import build_vision_model, draw_picture

OWNERS = np.repeat(np.arange(20), 3)


@pytest.mark.parametrize("method", ["random", "first"])
def test_owners_are_never_divided_and_parts_are_as_large_as_asked_for(method: str) -> None:
    data = DataConfig(train="x", validation=7, test=0.1, split_method=method)
    parts = split_groups(OWNERS, data)
    assert {name: len(units) for name, units in parts.items()} == {"validation": 9, "test": 6, "train": 45}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(60))
    whose = [set(OWNERS[units].tolist()) for units in parts.values()]
    assert sum(map(len, whose)) == len(set().union(*whose))


def test_the_seed_decides() -> None:
    drawn = [split_groups(OWNERS, DataConfig(train="x", validation=6, split_seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0]["validation"].tolist() == drawn[1]["validation"].tolist() != drawn[2]["validation"].tolist()


def test_nothing_left_for_training_is_refused() -> None:
    with pytest.raises(DataError, match="rows stay together"):
        split_groups(np.zeros(10, dtype=np.int64), DataConfig(train="x", validation=1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_linked_by_pictures_and_windows_of_one_document_stay_together(seed: int, tmp_path: Path) -> None:
    """Rows of two pictures link those of each; text beside them is cut into windows that are no rows of their own."""
    _, processor = build_vision_model("qwen2_vl")
    for number in range(9):
        draw_picture(tmp_path / f"{number}.png", number, size=(32, 32))

    def row(*pictures: int) -> dict[str, Any]:
        shown = [{"type": "image", "image": f"{number}.png"} for number in pictures]
        return {"messages": [{"role": "user", "content": [*shown, "what?"]}, {"role": "assistant", "content": "a cat"}]}

    linked = [row(0), row(0, 1), row(1, 2), row(2)]
    write_rows(tmp_path / "rows.json", [*linked, *(row(number) for number in range(3, 9))])
    texts = [{"text": f"document {number} " + "the cat sleeps in the tree " * 30} for number in range(4)]
    write_rows(tmp_path / "texts.json", texts)
    data = DataConfig(
        train=[str(tmp_path / "rows.json"), {"path": str(tmp_path / "texts.json"), "format": "text"}],
        validation=0.3,
        split_seed=seed,
        max_length=64,
        cache_dir=str(tmp_path / "cache/tokens"),
    )
    made = prepare_data(data, processor.tokenizer, reporter=Reporter(), pictures=PictureProcessor(processor))
    sides = {name: {tuple(origin) for origin in store.origins.tolist()} for name, store in made.splits.items()}
    assert sides["train"]
    assert sides["validation"]
    assert not sides["train"] & sides["validation"]  # windows of one document have one origin
    assert len({(0, number) in sides["train"] for number in (1, 2, 3, 4)}) == 1
