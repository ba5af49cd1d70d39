"""Features of a frozen tower are kept once, found again, and never those of another tower; nothing else changes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import loralab
from loralab.errors import ConfigError, LoralabError
from support.tiny import run_config
from support.tiny_vision import save_vision_base, vqa_rows


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_vision_base(tmp_path / "base")


def train(tmp_path: Path, base: Path, name: str, *, image: dict[str, Any], **sections: dict[str, Any]) -> loralab.Run:
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        rows.write_text("\n".join(json.dumps(row) for row in vqa_rows(tmp_path, 5)), encoding="utf-8")
    data = {"validation": 3, "image": image, "cache_dir": str(tmp_path / "cache/tokens")} | sections.pop("data", {})
    training = {"num_train_epochs": 2} | sections.pop("training", {})
    return loralab.train(run_config(base, rows, tmp_path / name, data=data, training=training, **sections))


def losses(run: loralab.Run) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in run.metrics]


def choice(run: loralab.Run) -> dict[str, str]:
    return run.record["resolved"]["cache_features"]


def test_kept_features_change_no_loss_and_are_found_again(tmp_path: Path, base: Path) -> None:
    without = train(tmp_path, base, "without", image={"cache_features": False})
    first = train(tmp_path, base, "first", image={})
    again = train(tmp_path, base, "again", image={"cache_features": True})
    assert choice(without)["value"] == "off"
    assert choice(first)["value"] == choice(again)["value"] == "on"
    assert losses(first) == pytest.approx(losses(without), rel=1e-5)
    assert losses(again) == losses(first)
    assert (first.record["kept_features"]["encoded"], again.record["kept_features"]["encoded"]) == (5, 0)
    assert len(list((tmp_path / "cache/features").rglob("*.bin"))) == 5


def test_another_tower_has_features_of_its_own(tmp_path: Path, base: Path) -> None:
    train(tmp_path, base, "one", image={})
    other = train(tmp_path, save_vision_base(tmp_path / "other", seed=1), "two", image={})
    assert other.record["kept_features"]["encoded"] == 5
    assert len(list((tmp_path / "cache/features").iterdir())) == 2


def test_where_features_are_not_kept_it_is_said_why(tmp_path: Path, base: Path) -> None:
    once = train(tmp_path, base, "once", image={}, data={"validation": None}, training={"max_steps": 1})
    assert choice(once)["value"] == "off"
    assert "read once" in choice(once)["reason"]
    trained = train(tmp_path, base, "trained", image={}, lora={"vision": "projector"})
    assert "the vision tower learns" in choice(trained)["reason"]
    small = train(tmp_path, base, "small", image={"cache_gib": 1e-6})
    assert "cache_gib" in choice(small)["reason"]


def test_what_was_asked_for_and_cannot_be_is_an_error(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"features cannot be kept: .*the vision tower learns"):
        train(tmp_path, base, "run", image={"cache_features": True}, lora={"vision": "all"})


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_that_changes_under_way_stops_the_run_by_name(tmp_path: Path, base: Path, kept: bool) -> None:
    """The tokens are in the cache; the file is changed behind its back, time and size included."""
    train(tmp_path, base, "run", image={"cache_features": False})
    path = tmp_path / "images/3.png"
    before, raw = path.stat(), bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(LoralabError, match="changed") as caught:
        train(tmp_path, base, "again", image={"cache_features": kept})
    assert "3.png" in str(caught.value)
