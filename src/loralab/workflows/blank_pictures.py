"""The adapter without its eyes: what it makes of the same rows with every picture grey.

Owns what is compared. What a blank picture is, is `data/images/blank.py`'s.
"""

import copy
from dataclasses import replace
from typing import Any

from loralab.data.images.blank import blanked
from loralab.data.images.reader import PictureReader
from loralab.data.prompts.prompter import Prompter
from loralab.data.tokens.store import TokenStore
from loralab.errors import ConfigError
from loralab.evaluation.perplexity import SplitLoss, compare_losses
from loralab.layout.planner import Planner
from loralab.workflows.task_meter import Measured, compare_sides

NOTE = (
    "The adapter with every picture replaced by a grey one of its size. Differences are what it gains by seeing the "
    "pictures: figures with them, minus figures without."
)


def check_blanking(split: TokenStore, name: str) -> None:
    """Check that there are pictures to blank.

    Args:
        split: the rows.
        name: of the split.

    Raises:
        ConfigError: there are none.
    """
    if not split.image_uses():
        raise ConfigError(f"no row of {name} has a picture", where="option --blank-images", fix="remove it")


def without_sight(prompter: Prompter, planner: Planner) -> tuple[Prompter, Planner]:
    """Return prompter and planner to which every picture is grey.

    Args:
        prompter: of the rows.
        planner: reads their pictures.
    """
    if prompter.pictures is None or not isinstance(planner.pictures, PictureReader):
        raise ValueError("a planner that reads no pictures has none to blank")
    blank = blanked(prompter.pictures)
    blind = copy.copy(prompter)
    blind.pictures = blank
    return blind, replace(planner, pictures=replace(planner.pictures, processor=blank, known=None))


def describe_blind(
    seen: tuple[SplitLoss, Measured | None], blind: tuple[SplitLoss, Measured | None], *, resamples: int
) -> dict[str, Any]:
    """Return what `evaluation.json` holds of an adapter that sees no pictures, and how it differs from one that does.

    Args:
        seen: losses and metrics with pictures.
        blind: those with grey ones.
        resamples: bootstrap resamples.
    """
    content = {"note": NOTE, **blind[0].as_dict(), "difference": compare_losses(seen[0], blind[0], resamples=resamples)}
    if seen[1] is not None and blind[1] is not None:
        content |= blind[1].as_dict()
        content["differences"] = compare_sides(seen[1], blind[1], resamples=resamples)
    return content
