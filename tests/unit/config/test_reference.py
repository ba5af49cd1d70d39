"""The page of settings: what a key takes, by its type and bounds, and its default."""

import pytest

from loralab.config.checks import TRAINER_ARGS
from loralab.config.load import describe_field
from loralab.config.reference import render_reference


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("model.name", "text", "required"),
        ("model.quantization", "`none`, `nf4`, `fp4`, `int8`", '`"none"`'),
        ("model.device_map", "`auto` or `null`", "`null`"),
        ("data.max_dropped_fraction", "number at least 0 and at most 1", "`0.05`"),
        ("data.train", "text or list of text or {path, format, columns, weight}", "required"),
        ("data.train_on", "`response`, `last_response`, `all` or list of `system`, `user`, `assistant`, `tool`", None),
        ("data.template_kwargs", "mapping", "`{}`"),
        ("lora.dropout", "number at least 0 and below 1", "`0.0`"),
        ("lora.rank_pattern", "mapping to integer above 0 or `null`", "`null`"),
        ("training.seed", f"integer at least 0 and below {2**32}", "`42`"),
        ("training.gradient_checkpointing", "`true`, `false` or `auto`", '`"auto"`'),
        ("training.early_stopping", "{metric, mode, patience, min_delta} or `null`", "`null`"),
        ("output.trackers", "list of `tensorboard`, `wandb`, `mlflow`, `trackio`", "`[]`"),
    ],
)
def test_a_key_says_what_it_takes(key: str, value: str, default: str | None) -> None:
    (line,) = [line for line in render_reference().splitlines() if line.startswith(f"| `{key}` |")]
    assert line.startswith(f"| `{key}` | {value} | {default or ''}")
    assert line.endswith(f" | {describe_field(key)} |")


def test_a_bar_in_a_description_does_not_end_its_cell() -> None:
    (line,) = [line for line in render_reference().splitlines() if "trainable_token_indices`" in line]
    assert r"<\|sep\|>" in line


def test_sections_within_sections_follow_their_own() -> None:
    headings = [line for line in render_reference().splitlines() if line.startswith("## ")]
    assert headings.index("## `data.image`") == headings.index("## `data`") + 1
    assert headings.index("## `training.early_stopping`") == headings.index("## `training`") + 1


def test_what_is_passed_through_is_listed() -> None:
    page = render_reference()
    assert all(f"| `advanced.trainer_args.{name}` | {reason}" in page for name, reason in TRAINER_ARGS.items())
