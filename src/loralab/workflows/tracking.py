"""The trackers of a run: opened before its first step, closed behind its final evaluation."""

import functools
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loralab.run import read_json, read_metrics
from loralab.training.trackers import Beginning, Trackers
from loralab.workflows.steps import Run

# Numbers of an evaluation that are settings, no figures.
_NO_FIGURES = frozenset({"batch_size", "max_length"})


@contextmanager
def tracking(run: Run) -> Iterator[None]:
    """Send the figures of a run to its trackers meanwhile; only the first process does."""
    if not run.config.output.trackers or not run.processes.first:
        yield
        return
    run.trackers = Trackers(
        run.config.output.trackers,
        run.folder.trackers,
        beginning=functools.partial(_beginning, run),
        note=functools.partial(_note, run),
    )
    failed = True
    try:
        yield
        failed = False
    finally:
        step = int(run.record.content.get("steps") or 0)
        run.trackers.close(None if failed else final_figures(run), step=step, failed=failed)


def _beginning(run: Run) -> Beginning:
    resolved = {name: str(choice.value) for name, choice in run.choices.items()}
    identity = run.record.content.setdefault("tracked_as", secrets.token_hex(8))
    run.record.update()
    return Beginning(
        run=identity,
        name=run.folder.path.absolute().name,
        config=run.config.model_dump(mode="json") | {"resolved": resolved},
        lines=read_metrics(run.folder.metrics),
    )


def final_figures(run: Run) -> dict[str, Any]:
    """Return the figures of the final evaluation: the adapter's as `final/NAME`, the base's as `base/NAME`."""
    if not run.folder.evaluation.is_file():
        return {}
    found = read_json(run.folder.evaluation)
    base = found.get("base", {})
    return {f"final/{key}": value for key, value in _figures(found)} | {
        f"base/{key}": value for key, value in _figures(base)
    }


def _figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in evaluation.items():
        if key not in _NO_FIGURES and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value


def _note(run: Run, what: str) -> None:
    run.reporter.say(f"warning: {what}")
    run.record.add_event(f"warning: {what}")
    run.record.update()
