"""The `judge` command: a blind preference test of base and adapter, from a comparison to frozen items and sittings.

Owns which comparison is judged, and when its items may still change. What votes come to is `judge_result.py`'s.
No torch: a test that has its comparison opens at once.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loralab.errors import ConfigError, JudgingError, ModelError, StorageError
from loralab.judging.folder import PreferenceFolder
from loralab.judging.items import (
    ItemSet,
    Origin,
    build_items,
    comparison_sha256,
    draw_seed,
    missing_pictures,
    read_comparison,
)
from loralab.judging.saved_votes import check_takeable, read_saved_votes, take_votes
from loralab.judging.votes import Votes, read_votes
from loralab.models.adapter_hash import WEIGHTS_FILE, adapter_sha256
from loralab.progress import Reporter
from loralab.reports.pictures import images_in, pictures_folder
from loralab.run import RunFolder, read_json
from loralab.workflows.first_look import check_run
from loralab.workflows.thumbnails import keep_thumbnails

DEFAULT_EXAMPLES = 30


class Compare(Protocol):
    """Writes `comparison.json`; it needs torch, so the command brings it along only where it is called."""

    def __call__(self, *, data: str | None, split: str | None, max_examples: int, output: Path | None) -> None:
        """Compare base and adapter."""


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """What is to be judged, and where it lies.

    Attributes:
        examples: most prompts, evenly spread; None takes those that are frozen, or 30.
        data: file, folder or Hub id to compare on instead of the run's own rows.
        split: split of it.
        output: folder of comparison, items and votes; None takes the run folder.
        new: begin a new test, and keep the old one beside it.
    """

    examples: int | None = None
    data: str | None = None
    split: str | None = None
    output: Path | None = None
    new: bool = False


@dataclass(frozen=True, slots=True)
class PreferenceTest:
    """An open preference test.

    Attributes:
        name: what the test is called on pages; it tells nothing of sides.
        place: the folder of comparison and result.
        folder: the folder of items and votes.
        items: what is judged.
    """

    name: str
    place: RunFolder
    folder: PreferenceFolder
    items: ItemSet


def open_test(path: Path, request: JudgeRequest, *, compare: Compare, reporter: Reporter) -> PreferenceTest:
    """Open the test of a run for votes: compare where nothing is compared yet, and freeze the items.

    Args:
        path: run folder or adapter folder.
        request: what is judged.
        compare: called where there is no comparison.
        reporter: told of what is done.

    Raises:
        JudgingError: there is nothing to judge, or what is judged has changed since the first vote.
        UserError: adapter, data or base cannot be used.
    """
    _check_request(request)
    adapter, place = _find(path, request.output)
    folder = PreferenceFolder(place.preference_votes, pictures_folder(place))
    digest = adapter_sha256(adapter)
    _check_data(place, request)
    if request.new:
        if place.comparison.is_file():
            _check_adapter(read_json(place.comparison), digest, place)
        _put_aside(place, folder, reporter)
    frozen = folder.load_items()
    if not place.comparison.is_file() and (frozen is None or request.examples is not None):
        reporter.say("nothing is compared yet: base and adapter answer first")
        rows = request.examples or DEFAULT_EXAMPLES
        compare(data=request.data, split=request.split, max_examples=rows, output=request.output)
    items = _freeze(folder, place, request, digest=digest, reporter=reporter)
    return PreferenceTest(_name(path, place), place, folder, items)


def load_test(path: Path, output: Path | None) -> PreferenceTest:
    """Open the test of a run for its votes' result, as it was frozen.

    Args:
        path: run folder or adapter folder.
        output: folder of the test; None takes the run folder.

    Raises:
        JudgingError: there is no test, or it is of another adapter.
    """
    adapter, place = _find(path, output)
    folder = PreferenceFolder(place.preference_votes, pictures_folder(place))
    items = folder.load_items()
    if items is None:
        raise JudgingError(
            f"no preference test in {str(place.path)!r}: nothing was judged yet",
            where=str(folder.path),
            fix=f"judge first: loralab judge {path}" + ("" if output is None else f" --output {output}"),
        )
    if items.adapter_sha256 != adapter_sha256(adapter):
        raise _changed(folder, "the adapter is another one now")
    return PreferenceTest(_name(path, place), place, folder, items)


def _name(path: Path, place: RunFolder) -> str:
    return place.path.resolve().name or path.name


def _check_request(request: JudgeRequest) -> None:
    if request.examples is not None and request.examples < 1:
        raise ConfigError(f"examples {request.examples}", where="option --examples", fix="give 1 or more prompts")
    named = request.data is not None or request.split is not None
    if named and request.output is None:
        raise ConfigError(
            "other rows than the run's own, and no folder for them",
            where="options --data, --split",
            fix="give --output FOLDER for comparison, items and votes",
        )


def _find(path: Path, output: Path | None) -> tuple[Path, RunFolder]:
    """Return the adapter folder, and the folder that the test lies in."""
    run = RunFolder(path)
    own: RunFolder | None = run
    if run.exists():
        adapter = run.adapter
        if not (adapter / WEIGHTS_FILE).is_file():
            raise _no_adapter(run)
    elif (path / WEIGHTS_FILE).is_file():
        parent = RunFolder(path.parent)
        inside = parent.exists() and path.resolve() == parent.adapter.resolve()
        adapter, own = path, parent if inside else None
    else:
        check_run(path)
        raise ModelError(
            f"neither a run nor an adapter folder: {str(path)!r}",
            where="argument RUN",
            fix="give the folder that `loralab train` wrote",
        )
    if output is not None:
        return adapter, RunFolder(output)
    if own is None:
        raise ConfigError(
            "an adapter without its run folder, and no folder for the test",
            where="argument RUN",
            fix="give --output FOLDER for comparison, items and votes",
        )
    return adapter, own


def _no_adapter(run: RunFolder) -> ModelError:
    status = read_json(run.record).get("status", "unknown")
    return ModelError(
        f"the run {str(run.path)!r} ({status}) has no adapter",
        where="argument RUN",
        fix=f"finish it: loralab train {shlex.quote(str(run.config))} --resume",
    )


def _put_aside(place: RunFolder, folder: PreferenceFolder, reporter: Reporter) -> None:
    aside = folder.move_aside()
    if aside is None:
        return
    if place.preference.is_file():
        try:
            place.preference.rename(aside / place.preference.name)
        except OSError as error:
            raise StorageError(
                f"cannot move {place.preference.name}: {error.strerror}",
                where=str(place.preference),
                fix=f"move it to {str(aside)!r} yourself",
            ) from None
    reporter.say(f"the old test is kept in {aside}")


def _check_data(place: RunFolder, request: JudgeRequest) -> None:
    """Refuse a comparison of other rows than those that are asked for."""
    if request.data is None and request.split is None:
        return
    if not place.comparison.is_file():
        return
    found = read_json(place.comparison)
    data_fits = found.get("data") == request.data
    split_fits = request.split is None or found.get("split") == request.split
    if not (data_fits and split_fits):
        raise JudgingError(
            f"a comparison of other rows lies there: data {found.get('data')!r}, split {found.get('split')!r}",
            where=str(place.comparison),
            fix="leave --data and --split away to judge it, or name another --output FOLDER",
        )


def _freeze(
    folder: PreferenceFolder, place: RunFolder, request: JudgeRequest, *, digest: str, reporter: Reporter
) -> ItemSet:
    """Return the frozen items; take them anew where what they are from has changed and nobody has voted yet."""
    frozen = folder.load_items()
    if not place.comparison.is_file() and frozen is not None:
        if frozen.adapter_sha256 != digest:
            raise _changed(folder, "the adapter is another one now")
        return frozen
    comparison = read_json(place.comparison)
    _check_adapter(comparison, digest, place)
    origin = Origin(digest, comparison_sha256(comparison), folder.pictures)
    changed = None if frozen is None else _difference(frozen, origin)
    if frozen is not None and changed is None and request.examples is None:
        return frozen
    _keep_pictures(comparison, place, reporter)
    examples = request.examples or DEFAULT_EXAMPLES
    items = build_items(comparison, origin, examples=examples, seed=frozen.seed if frozen else draw_seed())
    if request.examples is not None and len(items.items) < request.examples:
        reporter.say(
            f"the comparison has {len(items.items)} prompts to judge, fewer than the {request.examples} asked for; "
            "loralab compare RUN --max-examples N takes more"
        )
    if frozen is not None and changed is None:
        if items.items == frozen.items:
            return frozen
        changed = f"{len(items.items)} prompts are asked for, and {len(frozen.items)} are frozen"
    if folder.has_votes():
        raise _changed(folder, str(changed))
    if changed is not None:
        reporter.say(f"nobody has votes or a page yet, so the items are taken anew: {changed}")
    folder.keep_items(items)
    return items


def _check_adapter(comparison: Mapping[str, Any], digest: str, place: RunFolder) -> None:
    """Refuse a comparison that says that it is of another adapter; older ones do not say."""
    if comparison.get("adapter_sha256") not in (None, digest):
        raise JudgingError(
            f"the comparison is of another adapter: sha256 {str(comparison['adapter_sha256'])[:12]} instead of "
            f"{digest[:12]}",
            where=str(place.comparison),
            fix="compare again: loralab compare RUN (with the same --output, if there was one)",
        )


def _difference(frozen: ItemSet, origin: Origin) -> str | None:
    if frozen.adapter_sha256 != origin.adapter_sha256:
        return "the adapter is another one now"
    return "the comparison has changed" if frozen.comparison_sha256 != origin.comparison_sha256 else None


def _changed(folder: PreferenceFolder, why: str) -> JudgingError:
    return JudgingError(
        f"the items are frozen, and {why}",
        where=str(folder.items_file),
        fix="begin a new test with --new (the old one is kept beside it)",
    )


def _keep_pictures(comparison: Mapping[str, Any], place: RunFolder, reporter: Reporter) -> None:
    """Write small copies of all pictures that raters are to see."""
    records = comparison.get("prompts")
    images = [image for record in records if isinstance(record, dict) for image in images_in(record)] if records else []
    folder = pictures_folder(place)
    try:
        keep_thumbnails(folder, images)
    except OSError as error:
        raise StorageError(
            f"cannot write pictures: {error.strerror or error}",
            where=str(folder),
            fix="make the folder writable, or name another with --output FOLDER",
        ) from None
    items = read_comparison(comparison)
    lost = sum(bool(missing_pictures([item], folder)) for item in items)
    if lost:
        reporter.say(f"{lost} of {len(items)} prompts are left out: their pictures are gone or have changed")


def import_votes(test: PreferenceTest, paths: Sequence[Path], reporter: Reporter) -> list[dict[str, Any]]:
    """Take the votes that offline pages saved; either all files are in order, or none is taken.

    Args:
        test: that the pages were made for.
        paths: of the files.
        reporter: told what was taken.

    Returns:
        Of each file: `file`, `rater`, `new` acts, and of the rater afterwards: `votes` that count, `pairs`, and whether
        the sitting is `closed`.

    Raises:
        JudgingError: a file is none of this test, or its rater has other votes here, or is judging at this moment.
    """
    saved = {path: read_saved_votes(path, test.items) for path in paths}
    check_takeable(saved, test.folder)
    return [_take(test, path, votes, reporter) for path, votes in saved.items()]


def _take(test: PreferenceTest, path: Path, votes: Votes, reporter: Reporter) -> dict[str, Any]:
    new, there = take_votes(votes, test.folder, where=str(path))
    judged, pairs = len(there.choices), len(test.items.shown)
    end = "closed" if there.closed else "not closed yet"
    added = f"{new} new act{'' if new == 1 else 's'}" if new else "nothing new"
    reporter.say(f"{there.rater}: {judged} of {pairs} pairs judged, {end} ({added})")
    return {
        "file": str(path),
        "rater": there.rater,
        "votes": judged,
        "pairs": pairs,
        "new": new,
        "closed": there.closed,
    }


def check_unvoted(test: PreferenceTest, rater: str) -> None:
    """Check that a rater has no votes here, before a page of their own is made for somewhere else.

    Raises:
        JudgingError: the rater has.
    """
    votes = read_votes(test.folder.votes_file(rater))
    if votes is not None and (votes.acts or votes.closed):
        raise JudgingError(
            f"{rater!r} has votes here already; those of a page could not be added to them",
            where="option --rater",
            fix="give the page's rater another name",
        )


def close_sitting(test: PreferenceTest, rater: str) -> None:
    """Close a rater's sitting, finished or not.

    Raises:
        JudgingError: the rater has not voted here, or is judging at this moment.
    """
    known = test.folder.raters()
    if rater not in known:
        raise JudgingError(
            f"no votes of {rater!r} here",
            where="option --close",
            fix=f"name one of {', '.join(known)}" if known else "nobody has voted yet",
        )
    with test.folder.open_sitting(test.items, rater) as sitting:
        sitting.close()
