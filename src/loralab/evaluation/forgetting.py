"""The forgetting probe: what an adapter does to text that has nothing to do with its data.

Owns where the passages come from, how they become tokens, and the words that say what was seen.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loralab.config.paths import local_path
from loralab.data.example import Branch, Document
from loralab.data.formats.fields import RowError
from loralab.data.formats.table import build_example
from loralab.data.prompts.prompter import Prompter, adds_bos
from loralab.data.reading.json_rows import parse_row
from loralab.data.reading.readers import data_suffix, read_rows
from loralab.data.reading.rows import Row
from loralab.data.reading.sources import resolve_sources
from loralab.errors import DataError
from loralab.evaluation.distances import DISTANCES, BranchDistances, mean_intervals, measure_branches
from loralab.evaluation.perplexity import FloatArray, SplitLoss, compare_losses, perplexity_of
from loralab.evaluation.probe_texts import PROBE_NAME, PROBE_TEXTS
from loralab.layout.planner import Planner
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter

_WHERE = "option --probe"
# Files of these are prose; of others, each row is a passage.
_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md"})
_PERPLEXITY = "perplexity on unrelated text"
_Starts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Probe:
    """Passages of unrelated text.

    Attributes:
        name: of the set or file.
        texts: at least one.
    """

    name: str
    texts: tuple[str, ...]


def load_probe(name: str | None) -> Probe:
    """Return the passages of a file, or the built-in ones.

    A text file is cut at its blank lines. Of other data each row's `text` is a passage.

    Args:
        name: file or other source of rows, as in `data.train`; None takes the built-in texts.

    Raises:
        DataError: it cannot be read, or there is no text in it.
    """
    if name is None:
        return Probe(PROBE_NAME, PROBE_TEXTS)
    path = local_path(name)
    if path is not None and path.is_file() and data_suffix(path.name).removesuffix(".gz") in _TEXT_SUFFIXES:
        whole = (parse_row(row) for row in read_rows(path, name))
        texts = [part for text in _row_texts(whole) for part in paragraphs(text)]
    else:
        texts = [text for source in resolve_sources(name, where=_WHERE) for text in _row_texts(source.rows())]
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise DataError(f"no text in {name!r}", where=_WHERE, fix="give a file with text, or leave the option out")
    return Probe(name, kept)


def paragraphs(text: str) -> list[str]:
    """Return the parts of a text between blank lines."""
    groups = itertools.groupby(text.split("\n"), key=lambda line: bool(line.strip()))
    return ["\n".join(lines) for filled, lines in groups if filled]


def _row_texts(rows: Iterable[Row]) -> list[str]:
    texts = []
    for row in rows:
        try:
            example = build_example("text", row.fields, {})
        except RowError as error:
            raise DataError(
                str(error), where=f"{_WHERE}, {row.describe()}", fix="give rows with a field 'text', or a text file"
            ) from None
        if isinstance(example, Document):
            texts.append(example.text)
    return texts


def probe_branches(probe: Probe, prompter: Prompter, *, max_length: int) -> list[list[Branch]]:
    """Return the passages as tokens, each begun as the tokenizer begins text; long ones in several windows.

    No end token is put behind a passage: whether to stop there is what fine-tuning changes on purpose.

    Args:
        probe: the passages.
        prompter: knows the tokenizer.
        max_length: longest window, in tokens.

    Returns:
        The windows of each passage that has a token to predict; at least one each.

    Raises:
        DataError: no passage has a token that can be predicted.
    """
    begin = [prompter.tokenizer.bos_token_id] if adds_bos(prompter.tokenizer) else []
    passages = []
    for ids in prompter.encode(list(probe.texts)):
        whole = np.asarray([*begin, *ids], dtype=np.int32)
        # Each window begins with the last token of the one before, so every token is predicted once.
        step = max(max_length - 1, 1)
        windows = (whole[start : start + step + 1] for start in range(0, len(whole) - 1, step))
        passages.append([Branch(window[:1], window[1:]) for window in windows])
    if not any(passages):
        raise DataError(
            f"no passage of {probe.name!r} has two tokens, so there is nothing to predict",
            where=_WHERE,
            fix="give longer texts",
        )
    return [windows for windows in passages if windows]


def measure_forgetting(
    model: SupervisedPeftModel,
    probe: Probe,
    *,
    prompter: Prompter,
    planner: Planner,
    max_length: int,
    batch_size: int,
    resamples: int,
    device: torch.device,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure perplexity and distances of base and adapter on unrelated text.

    Args:
        model: base with adapter.
        probe: the passages.
        prompter: knows the tokenizer.
        planner: lays out each batch.
        max_length: longest window, in tokens.
        batch_size: windows per batch.
        resamples: bootstrap resamples.
        device: where the model is.
        reporter: told of progress.
        should_stop: asked before every batch.

    Returns:
        `name`, `rows` (passages; their windows are added up), `tokens`, `base_perplexity`, `adapter_perplexity`,
        `difference` (of the losses), `perplexity_change` (ratio - 1), every distance of `DISTANCES` with its interval,
        and `reading`: what was seen.

    Raises:
        DataError: no passage can be measured.
        Interrupted: `should_stop` answered yes.
    """
    passages = probe_branches(probe, prompter, max_length=max_length)
    windows = measure_branches(
        model,
        [branch for passage in passages for branch in passage],
        planner=planner,
        batch_size=batch_size,
        device=device,
        reporter=reporter,
        label="probe",
        should_stop=should_stop,
    )
    # What one passage says of an adapter its next window says again: a passage counts as one row.
    starts = np.cumsum([0, *map(len, passages)])[:-1]
    counts = np.add.reduceat(np.array([float(each.distances.shape[1]) for each in windows]), starts)
    base, adapter = (_split_loss(windows, counts, starts, side) for side in ("base_losses", "adapter_losses"))
    difference = compare_losses(adapter, base, resamples=resamples)
    sums = np.add.reduceat(np.array([each.distances.sum(axis=1) for each in windows]), starts)
    intervals = mean_intervals(sums, counts, resamples=resamples)
    change = {key: relative_change(difference[key]) for key in ("eval_loss", "low", "high")}
    return {
        "name": probe.name,
        "rows": len(passages),
        "tokens": int(counts.sum()),
        "base_perplexity": base.perplexity,
        "adapter_perplexity": adapter.perplexity,
        "difference": difference,
        "perplexity_change": {"value": change["eval_loss"], "low": change["low"], "high": change["high"]},
        **dict(zip(DISTANCES, intervals, strict=True)),
        "reading": read_forgetting(difference, rows=len(passages)),
    }


def _split_loss(windows: Sequence[BranchDistances], counts: FloatArray, starts: _Starts, side: str) -> SplitLoss:
    totals = np.add.reduceat(np.array([getattr(each, side).sum() for each in windows]), starts)
    return SplitLoss(totals, counts, np.zeros(0), np.zeros(0), np.zeros(0))


def relative_change(nats: float | None) -> float | None:
    """Return by what share a perplexity changes where the loss changes by `nats`: exp(nats) - 1."""
    return None if nats is None else perplexity_of(nats) - 1


def read_forgetting(difference: dict[str, Any], *, rows: int) -> str:
    """Return in words what a probe showed; nothing is claimed that the verdict does not.

    Args:
        difference: of the losses, as `compare_losses` gives it.
        rows: passages measured.
    """
    value, low, high = difference["eval_loss"], difference["low"], difference["high"]
    if low is None or high is None:
        why = "1 passage is too few to say more" if rows == 1 else difference["reason"]
        return f"{_PERPLEXITY} changed by {_percent(value)}; {why}"
    interval = f"{difference['level']:.0%} interval {_percent(low)} to {_percent(high)}"
    word = {"worse": "rose", "better": "fell"}.get(difference["verdict"])
    if word is None:
        why = "" if low <= 0 <= high else f"; {difference['reason']}"
        return f"no forgetting seen at n = {rows}: {_PERPLEXITY} changed by {_percent(value)} ({interval}{why})"
    return f"{_PERPLEXITY} {word} by {_percent(value).lstrip('+-')} ({interval}, n = {rows})"


def _percent(nats: float) -> str:
    change = 100 * (perplexity_of(nats) - 1)
    if not math.isfinite(change):
        return "more than a number can say"
    digits = 0 if round(abs(change), 1) >= 10 else 1 if round(abs(change), 2) >= 1 else 2
    return f"{change:+,.{digits}f} %"
