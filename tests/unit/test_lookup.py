"""Table look-up: the entry, or an error with the nearest name and all names."""

import pytest

from loralab.errors import ConfigError
from loralab.lookup import look_up, nearest_name, suggest


def test_look_up_returns_the_entry() -> None:
    assert look_up({"lora": 1, "dora": 2}, "dora", kind="variant", where="key lora.variant") == 2


def test_look_up_names_what_where_and_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        look_up({"alpaca": 1, "text": 2}, "alpacca", kind="format", where="key data.format")
    assert str(caught.value) == (
        "error: no such format: 'alpacca'\nwhere: key data.format\nfix:   did you mean 'alpaca'? known: alpaca, text"
    )


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("txet", ["alpaca", "text"], "did you mean 'text'? known: alpaca, text"),
        ("zzz", ["alpaca", "text"], "known: alpaca, text"),
        ("x", [], "known: (none)"),
    ],
)
def test_suggest(name: str, known: list[str], sentence: str) -> None:
    assert suggest(name, known) == sentence


def test_nearest_name_takes_any_iterable() -> None:
    assert nearest_name("learning_rat", iter(["r", "learning_rate"])) == "learning_rate"
    assert nearest_name("qqq", {"alpha": 1}) is None
