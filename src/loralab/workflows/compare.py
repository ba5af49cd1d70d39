"""The `compare` command: base against adapter, prompt by prompt, and what happened to unrelated text.

Owns what `comparison.json` holds.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab.config.paths import local_path
from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData
from loralab.data.example import TokenizedExample
from loralab.data.tokens.store import TokenStore
from loralab.errors import ConfigError, StorageError
from loralab.evaluation.answers import Question
from loralab.evaluation.distances import DISTANCES, BranchDistances, mean_intervals, measure_branches
from loralab.evaluation.forgetting import Probe, load_probe, measure_forgetting
from loralab.evaluation.generate import Answer, GenerationSettings, generate_answers
from loralab.evaluation.perplexity import FloatArray
from loralab.evaluation.questions import questions_of, spread
from loralab.layout.planner import Planner
from loralab.models.adapter_hash import adapter_sha256
from loralab.progress import Reporter
from loralab.reports.comparison_page import render_comparison, shown_prompts
from loralab.reports.pictures import pictures_folder, shown_images, thumbnails_in
from loralab.run import RunFolder, file_sha256, read_json, write_json, write_text
from loralab.workflows.evaluate import OWN_ROWS, find_split
from loralab.workflows.pictures import reading_pictures
from loralab.workflows.session import Session, open_session
from loralab.workflows.step_layout import resolve_planner
from loralab.workflows.thumbnails import images_of, keep_thumbnails

# What overrides can change here.
_READ = (
    "model",
    "data",
    "training.layout",
    "training.token_budget",
    "evaluation.batch_size",
    "evaluation.bootstrap_samples",
    "evaluation.max_new_tokens",
)
# Where base and adapter are compared, as `measured_at` of the file says it.
AT_PROMPT = "the last token of the prompt"
AT_TEXT = "the mean over the tokens of the text, which has no prompt"
# The plain names of a prompt's figures, and the distances that they stand for.
_PLAIN = {"kl_divergence": "kl_base_adapter", "l2_distance": "l2_logits", "top1_agreement": "top1_agreement"}


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """What is asked of a comparison, besides the adapter and its settings.

    Attributes:
        data: file, folder or Hub id to compare on; None takes the run's own split.
        split: name of the split of `data`.
        max_examples: most rows of it, evenly spread.
        probe: file of unrelated text; None takes the built-in texts.
        with_probe: whether unrelated text is measured at all.
        output: folder for the files; None writes them into the run folder, where its own data and settings are
            compared.
    """

    data: str | None = None
    split: str | None = None
    max_examples: int = 50
    probe: str | None = None
    with_probe: bool = True
    output: Path | None = None


def compare(
    path: Path,
    request: ComparisonRequest,
    *,
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Compare an adapter with its base.

    Args:
        path: run folder or adapter folder.
        request: what is compared.
        overrides: `section.key=value` on top of the run's configuration.
        base_model: base to use instead of the recorded one.
        reporter: told of progress.

    Returns:
        The content of `comparison.json`.

    Raises:
        UserError: adapter, base, data or probe cannot be used.
    """
    probe = _check_request(request)
    reads = [*_READ, *(() if request.data is not None else ("evaluation.split",))]
    ignores = () if request.data is None else OWN_ROWS
    session = open_session(
        path, overrides=overrides, base_model=base_model, reporter=reporter, reads=reads, ignores=ignores
    )
    name, split, max_length, data = find_split(session, request.data, request.split, reporter)
    planner, choices = resolve_planner(session.model, session.config, max_length=max_length, device=session.device)
    planner = reading_pictures(planner, session.prompter, session.model)
    reporter.say(f"layout {choices['layout'].value} ({choices['layout'].reason})")
    chosen = spread(len(split), request.max_examples)
    rows, windows = [split[index] for index in chosen], number_windows(split, data)
    evaluation = session.config.evaluation
    result = {
        "data": request.data,
        "split": name,
        "examples": len(rows),
        "of_examples": len(split),
        "max_length": max_length,
        "max_new_tokens": evaluation.max_new_tokens,
        "adapter_sha256": adapter_sha256(session.target.adapter),
        "definitions": dict(DISTANCES),
        **_compare_rows(session, rows, [windows[index] for index in chosen], planner=planner, reporter=reporter),
        "probe": None
        if probe is None
        else _with_origin(
            session,
            request.probe,
            measure_forgetting(
                session.model,
                probe,
                prompter=session.prompter,
                planner=planner,
                max_length=max_length,
                batch_size=evaluation.batch_size,
                resamples=evaluation.bootstrap_samples,
                device=session.device,
                reporter=reporter,
            ),
        ),
    }
    own = request.data is None and base_model is None and not overrides
    _write(result, request.output, session.target.folder if own else None, reporter)
    return result


def _check_request(request: ComparisonRequest) -> Probe | None:
    """Return the probe, after a check of all that can be checked before a model is loaded."""
    if request.max_examples < 1:
        raise ConfigError(
            f"max_examples {request.max_examples}", where="option --max-examples", fix="give 1 or more rows"
        )
    if request.probe is not None and not request.with_probe:
        raise ConfigError(
            f"a probe file ({request.probe}) and no probe", where="options --probe, --no-probe", fix="give one of them"
        )
    if request.output is not None:
        with _naming_folder(request.output):
            request.output.mkdir(parents=True, exist_ok=True)
    return load_probe(request.probe) if request.with_probe else None


def number_windows(split: TokenStore, data: PreparedData) -> list[int | None]:
    """Return which window of its row each example is, from 1; None where a row is one example.

    Args:
        split: examples to number.
        data: that the split is a part of; windows of one row may stand in several splits.
    """
    stores = [store for store in data.splits.values() if store.folder == split.folder]
    origins, units = (np.concatenate([getattr(store, name) for store in stores]) for name in ("origins", "units"))
    if not len(split):
        return []
    factor = int(origins[:, 1].max()) + 1
    keys, places, counts = np.unique(origins[:, 0] * factor + origins[:, 1], return_inverse=True, return_counts=True)
    first = np.full(len(keys), units.max())
    np.minimum.at(first, places, units)
    own = np.searchsorted(keys, split.origins[:, 0] * factor + split.origins[:, 1])
    return [
        int(unit - first[place]) + 1 if counts[place] > 1 else None
        for unit, place in zip(split.units, own, strict=True)
    ]


def _with_origin(session: Session, probe: str | None, measured: dict[str, Any]) -> dict[str, Any]:
    """Say of a probe that is one of the run's own files that it is no unrelated text, and so no probe of forgetting."""
    note = None if probe is None else own_file_note(session.config.data, session.target.folder, probe)
    if note is None:
        return measured | {"note": None}
    reading = str(measured["reading"]).replace("no forgetting seen", "no difference seen")
    reading = reading.replace("perplexity on unrelated text", "its perplexity")
    return measured | {"note": note, "reading": f"{note}: {reading}"}


def own_file_note(data: DataConfig, folder: RunFolder | None, probe: str) -> str | None:
    """Return that a probe is one of a run's own data files, or None where it is not, as far as is known.

    Args:
        data: section of the run's configuration.
        folder: of the run, whose data report has the hashes of its files.
        probe: file, or other source of rows.
    """
    path = local_path(probe)
    if path is None or not path.is_file():
        return None
    for split, names in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        entries = names if isinstance(names, list) else [names]
        files = [entry if isinstance(entry, str) else getattr(entry, "path", None) for entry in entries]
        own = [local_path(file) for file in files if file is not None]
        if any(file is not None and file.exists() and file.samefile(path) for file in own):
            return f"the file {path.name} is {split} data of the run, not unrelated text"
    sources = read_json(folder.data).get("sources", []) if folder is not None and folder.data.is_file() else []
    if any(source.get("sha256") == file_sha256(path) for source in sources):
        return f"the file {path.name} is data of the run, not unrelated text"
    return None


def _compare_rows(
    session: Session,
    rows: Sequence[TokenizedExample],
    windows: Sequence[int | None],
    *,
    planner: Planner,
    reporter: Reporter,
) -> dict[str, Any]:
    branches = [branch for row in rows for branch in row.branches]
    # Rows of text begin with their first token, behind which nothing was asked.
    asked = all(len(branch.prompt_ids) > 1 for branch in branches)
    measured = measure_branches(
        session.model,
        branches,
        planner=planner,
        batch_size=session.config.evaluation.batch_size,
        device=session.device,
        reporter=reporter,
        label="compare",
    )
    owners = [number for number, row in enumerate(rows) for _ in row.branches]
    resamples = session.config.evaluation.bootstrap_samples
    totals = _totals(measured, owners, resamples=resamples, asked=asked)
    if not asked:
        reporter.say("the rows have no prompt, as text has none: compared over all their tokens, nothing generated")
        records = [
            _text_record(rows[owner], session.prompter.decode([*branch.prompt_ids, *branch.answer_ids]), each)
            | {"window": windows[owner]}
            for owner, branch, each in zip(owners, branches, measured, strict=True)
        ]
        return {"measured_at": AT_TEXT, "totals": totals, "generation": None, "prompts": records}
    questions = questions_of(rows, session.prompter)
    base, adapter = _answer_both(session, questions, reporter)
    records = [
        _record(question, each, b, a) for question, each, b, a in zip(questions, measured, base, adapter, strict=True)
    ]
    generated = _generation_totals(records)
    return {"measured_at": AT_PROMPT, "totals": totals, "generation": generated, "prompts": records}


def _totals(
    measured: Sequence[BranchDistances], owners: Sequence[int], *, resamples: int, asked: bool
) -> dict[str, Any]:
    """Return means with intervals over rows: at the last prompt token, and over all tokens of the answers."""
    rows = owners[-1] + 1

    def interval(sums: list[FloatArray], counts: list[float]) -> dict[str, Any]:
        by_row, count = np.zeros((rows, len(DISTANCES))), np.zeros(rows)
        np.add.at(by_row, owners, np.array(sums))
        np.add.at(count, owners, np.array(counts))
        found = mean_intervals(by_row, count, resamples=resamples)
        return {"count": int(count.sum()), **dict(zip(DISTANCES, found, strict=True))}

    answer = interval([m.distances.sum(axis=1) for m in measured], [float(m.distances.shape[1]) for m in measured])
    prompt = interval([m.distances[:, 0] for m in measured], [1.0] * len(measured)) if asked else None
    plain = prompt or answer
    return {
        **{name: plain[distance]["mean"] for name, distance in _PLAIN.items()},
        "rows": rows,
        "last_prompt_token": prompt,
        "answer": answer,
        "level": 0.95,
        "method": f"percentile bootstrap over rows, {resamples} resamples" if rows > 1 else "none: one row",
    }


def _figures(each: BranchDistances, *, asked: bool) -> dict[str, Any]:
    means = dict(zip(DISTANCES, each.distances.mean(axis=1).tolist(), strict=True))
    first = dict(zip(DISTANCES, each.distances[:, 0].tolist(), strict=True))
    plain = first if asked else means
    return {
        **{name: plain[distance] for name, distance in _PLAIN.items()},
        "last_prompt_token": first if asked else None,
        "answer": {
            "tokens": each.distances.shape[1],
            "base_loss": float(each.base_losses.mean()),
            "adapter_loss": float(each.adapter_losses.mean()),
            **means,
        },
    }


def _record(question: Question, each: BranchDistances, base: Answer, adapter: Answer) -> dict[str, Any]:
    return {
        "source": question.source,
        "row": question.row,
        "prompt": question.prompt,
        **images_of(question.images),
        "reference": question.reference,
        **_figures(each, asked=True),
        "base_output": base.text,
        "adapter_output": adapter.text,
        "base_stopped": base.stopped,
        "adapter_stopped": adapter.stopped,
        "first_difference": first_difference(base.text, adapter.text),
    }


def _text_record(row: TokenizedExample, text: str, each: BranchDistances) -> dict[str, Any]:
    return {
        "source": row.source,
        "row": row.row,
        "prompt": "",
        "reference": text,
        **_figures(each, asked=False),
        "base_output": None,
        "adapter_output": None,
        "base_stopped": None,
        "adapter_stopped": None,
        "first_difference": None,
    }


def first_difference(base: str, adapter: str) -> int | None:
    """Return the first character where two answers differ, from 0, or None where they are the same."""
    if base == adapter:
        return None
    pairs = enumerate(zip(base, adapter, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(base), len(adapter)))


def _answer_both(
    session: Session, questions: Sequence[Question], reporter: Reporter
) -> tuple[list[Answer], list[Answer]]:
    evaluation = session.config.evaluation

    def answer(label: str) -> list[Answer]:
        return generate_answers(
            session.model,
            [question.prompt_ids for question in questions],
            images=[question.images for question in questions],
            prompter=session.prompter,
            settings=GenerationSettings(max_new_tokens=evaluation.max_new_tokens),
            batch_size=evaluation.batch_size,
            reporter=reporter,
            label=label,
        )

    adapter = answer("answer with adapter")
    with session.model.disable_adapter():
        return answer("answer without"), adapter


def _generation_totals(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    count = len(records)
    return {
        "prompts": count,
        "same_answer": sum(record["first_difference"] is None for record in records) / count,
        "base_stopped": sum(record["base_stopped"] for record in records) / count,
        "adapter_stopped": sum(record["adapter_stopped"] for record in records) / count,
    }


def _write(result: dict[str, Any], output: Path | None, folder: RunFolder | None, reporter: Reporter) -> None:
    """Write file and page: where `output` says, else into the run folder, if there is one to write to."""
    chosen = RunFolder(output) if output is not None else folder
    if chosen is None:
        reporter.say("other data or settings than the run's own: no files were written (--output DIR writes them)")
        return
    with _naming_folder(chosen.path):
        write_json(chosen.comparison, result)
        pictures = pictures_folder(chosen)
        keep_thumbnails(pictures, shown_images(shown_prompts(result)))
        write_text(chosen.comparison_page, render_comparison(result, thumbnails_in(pictures)))
    reporter.say(f"wrote {chosen.comparison} and {chosen.comparison_page.name}")


@contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Name the folder that cannot be written.

    Raises:
        StorageError: what is written within cannot be.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write the comparison: {error.strerror or error}",
            where=str(folder),
            fix="name another folder with --output DIR",
        ) from error
