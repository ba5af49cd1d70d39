"""A recorded run, run again: the same adapter and the same losses, or what differs first.

Owns the comparison of two run folders, its proof, and what a run folder must hold to be evidence.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.config.load import LoadedConfig, load_config
from loralab.config.metric_checks import asked_metrics, watched_metric
from loralab.config.metric_facts import is_outside
from loralab.errors import ConfigError, ModelError, Problem, ProofError, RunFolderError, excerpt
from loralab.models.adapters import WEIGHTS_FILE, adapter_sha256
from loralab.progress import Reporter
from loralab.run import Json, RunFolder, file_sha256, open_run, read_json, read_metrics
from loralab.workflows.configure import load_run_config
from loralab.workflows.evaluate import without_foreign_code
from loralab.workflows.record import CHANGED_AT_RESUME, config_differences
from loralab.workflows.resume import contract_changes
from loralab.workflows.train import train

_MACHINE = ("device", "gpu", "processor", "threads")


def replay(
    path: Path, *, output: Path | None, overrides: Sequence[str] = (), verify: bool = False, reporter: Reporter
) -> Json:
    """Run a recorded run again, into a new folder.

    Args:
        path: the run folder.
        output: where the replay goes; by default beside the run, under a name that is free.
        overrides: `section.key=value` on top of the recorded configuration, as for data that has moved.
        verify: check first that the run folder still is what was recorded; a proof needs that.
        reporter: told of progress.

    Returns:
        Both hashes, whether adapters and losses are equal, and what differs.

    Raises:
        RunFolderError: no complete run there, or the output folder is in use.
        ConfigError: started as one of several processes, or an override names the output folder.
        ProofError: the run folder has changed since the run, and `verify` is set.
    """
    folder = open_run(path)
    record = read_json(folder.record)
    _check_replayable(folder, record)
    _check_output(output, overrides)
    if verify:
        check_evidence(folder, record)
    target = output if output is not None else _free_name(path.absolute())
    # A run folder may come from someone else: its word is not enough to run code.
    # The budget never changes the loss, but it does the last bits of its sums.
    budget = record.get("token_budget", {}).get("value")
    same_cuts = [f"training.token_budget={budget}"] if budget else []
    resolved = record.get("resolved", {})
    if "gradient_checkpointing" in resolved:  # the budget was chosen for it
        same_cuts.append(f"training.gradient_checkpointing={resolved['gradient_checkpointing']['value']}")
    if resolved.get("cache_frozen_trunk", {}).get("value") == "off":
        same_cuts.append("training.cache_frozen_trunk=off")  # it may have been off for lack of room
    places = [f"output.dir={target}", "output.hub={}"]  # nothing of a replay is pushed
    chosen = ["model.trust_remote_code=false", *same_cuts, *overrides, *places]
    loaded = load_run_config(folder.config, chosen, name=str(record.get("name", path.name)))
    loaded = _without_foreign_code(loaded, overrides, reporter)
    again = train(loaded, reporter=reporter, warm_start=record.get("warm_start"))
    return compare_runs(folder, again)


def _without_foreign_code(loaded: LoadedConfig, overrides: Sequence[str], reporter: Reporter) -> LoadedConfig:
    """Leave out functions that only the run folder names.

    Raises:
        ConfigError: one of them decided on the adapter.
    """
    config, asked = without_foreign_code(loaded.config, overrides, reporter), asked_metrics(loaded.config.evaluation)
    watched, functions = watched_metric(config.training), [name for name in asked if is_outside(name)]
    if config is not loaded.config and any(name.endswith(f":{watched}") for name in functions):
        raise ConfigError(
            f"the run watched a function of its own, {watched!r}, and code that a run folder names is not run",
            where=str(loaded.config.output.dir),
            fix=f"allow it with evaluation.metrics=[{', '.join(asked)}]",
        )
    return replace(loaded, config=config)


def _check_replayable(folder: RunFolder, record: Mapping[str, Any]) -> None:
    if record.get("status") != "completed":
        raise RunFolderError(
            f"the run is not complete ({record.get('status', 'unknown')}): there is no adapter to compare with",
            where=str(folder.path),
            fix=f"finish it first: loralab train {folder.path} --resume",
        )
    processes = _process_count(record)
    if processes > 1:
        raise RunFolderError(
            f"the run was made by {processes} processes, and a replay runs in one: its steps would be smaller",
            where=str(folder.path),
            fix=f"train {folder.config} into another output.dir in {processes} processes, and compare adapter_sha256",
        )
    here = os.environ.get("WORLD_SIZE") or "1"
    if here != "1":
        raise ConfigError(
            f"the replay was started as one of {here} processes; the run was made by one",
            where="environment variable WORLD_SIZE",
            fix="start loralab replay alone, without a launcher",
        )
    if not folder.config.is_file():
        raise RunFolderError(f"missing file: {folder.config.name}", where=str(folder.path), fix="restore the file")


def _check_output(output: Path | None, overrides: Sequence[str]) -> None:
    for text in overrides:
        if text.partition("=")[0].strip() in ("output", "output.dir"):
            raise ConfigError(
                f"an override names the folder of the replay: {text!r}", where="command line", fix="use --output"
            )
    if output is None:
        return
    taken = RunFolder(output.expanduser())
    if taken.exists():
        status = read_json(taken.record).get("status", "unknown")
        raise RunFolderError(
            f"{str(output)!r} holds another run ({status})", where="option --output", fix="name a new folder"
        )


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}-replay{number}") for number in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(name for name in names if not name.exists())


def compare_runs(before: RunFolder, after: RunFolder) -> Json:
    """Compare a run with its replay.

    Returns:
        `adapter_sha256` of both, `equal`, `compared_losses` (how many), `first_difference` (step and both
        losses, or None) and `differences` (of data, model, settings, choices, versions, machine; in that order).
    """
    old, new = read_json(before.record), read_json(after.record)
    first, compared = _first_difference(before, after)
    hashes = {"run": old.get("adapter_sha256"), "replay": new.get("adapter_sha256")}
    flaws = [flaw.what for flaw in _evidence_flaws(before, old)]
    return {
        "run": str(before.path),
        "replay": str(after.path),
        "adapter_sha256": hashes,
        "equal": hashes["run"] == hashes["replay"] and first is None and not flaws,
        "compared_losses": compared,
        "first_difference": first,
        "differences": [*flaws, *_differences(before, after)],
    }


# What goes by the memory that is free; a replay takes what the run took.
_MEMORY_SETTINGS = ("training.token_budget", "training.gradient_checkpointing", "training.cache_frozen_trunk")
# What the last bits of a cached forward depend on.
_TRUNK = ("value", "token_budget", "full_at", "frozen_layers")


def _differences(before: RunFolder, after: RunFolder) -> Iterator[str]:
    """Yield what may explain a different result, the likeliest cause first."""
    old, new = read_json(before.record), read_json(after.record)
    yield from (flaw.what for flaw in _config_flaws(before, old))
    yield from contract_changes(_identity(old), _identity(new))
    yield from config_differences(
        before,
        after,
        ignored=("output.dir", "output.hub", "model.trust_remote_code", *_MEMORY_SETTINGS),
    )
    if _process_count(old) != _process_count(new):
        yield f"processes was {_process_count(old)}, now {_process_count(new)}"
    trunks = [{k: record.get("frozen_trunk", {}).get(k) for k in _TRUNK} for record in (old, new)]
    yield from _changed("frozen_trunk", *trunks)
    for part in ("resolved", "versions", "hardware"):
        yield from _changed(part, old.get(part, {}), new.get(part, {}))
    for event in old.get("events", []):  # a replay is made in one go, so it can have only one of the two
        what = str(event.get("what", ""))
        if what.startswith(CHANGED_AT_RESUME):
            yield f"the run itself was resumed on another machine or library: {what.removeprefix(CHANGED_AT_RESUME)}"


def _process_count(record: Mapping[str, Any]) -> int:
    return int(record.get("processes", 1))


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    data = record.get("data_identity") or {"fingerprint": record.get("data_fingerprint")}
    return {**{f"data.{name}": value for name, value in data.items()}, "model weights": record["model"]["sha256"]}


def _changed(part: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    names = _MACHINE if part == "hardware" else sorted({*old, *new})
    for name in names:
        pair = [value.get("value") if isinstance(value := each.get(name), Mapping) else value for each in (old, new)]
        if pair[0] != pair[1]:
            yield f"{part}.{name} was {pair[0]!r}, now {pair[1]!r}"


def _first_difference(before: RunFolder, after: RunFolder) -> tuple[Json | None, int]:
    """Return the first loss that differs, and how many were compared."""
    old, new = ({**_read_losses(each).losses, **_read_evaluation(each).losses} for each in (before, after))
    # Stable: of one step, the training loss comes before what was measured after it.
    shared = sorted((key for key in old if key in new), key=lambda key: key[1])
    for key in shared:
        if old[key] != new[key]:
            return {"step": key[1], "name": key[2], "run": old[key], "replay": new[key]}, len(shared)
    return None, len(shared)


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a file of the run holds of losses, and what is wrong with the file.

    Attributes:
        losses: by (first step, last step, name) of what they are the mean of.
        flaw: the first line or value that cannot be read, or None.
    """

    losses: dict[tuple[int, int, str], float | None]
    flaw: str | None = None


def _read_losses(folder: RunFolder) -> _Measured:
    """Read `metrics.jsonl`.

    A run that was resumed with other logging_steps has means over other windows; those compare with nothing.
    """
    try:
        lines: list[Any] = list(read_metrics(folder.metrics))
    except (RunFolderError, UnicodeDecodeError, OSError) as error:
        what = error.problems[0].what if isinstance(error, RunFolderError) else excerpt(error)
        return _Measured({}, f"cannot read metrics.jsonl: {what}")
    losses: dict[tuple[int, int, str], float | None] = {}
    flaw, last = None, 0
    for number, line in enumerate(lines, start=1):
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not _is_number(line.get("loss", 0.0)):
            flaw = flaw or f"cannot read metrics.jsonl: line {number} has no step, or a loss that is no number"
            continue
        if "loss" in line:
            losses[last, step, "loss"] = line["loss"]
            last = step
        if "eval_loss" in line:
            losses[step, step, "eval_loss"] = line["eval_loss"]
    return _Measured(losses, flaw)


def _read_evaluation(folder: RunFolder) -> _Measured:
    """Read the final losses of adapter and base; a run without validation or test split has none."""
    if not folder.evaluation.is_file():
        return _Measured({})
    try:
        found = read_json(folder.evaluation)
    except RunFolderError as error:
        return _Measured({}, f"cannot read evaluation.json: {error.problems[0].what}")
    except OSError as error:
        return _Measured({}, f"cannot read evaluation.json: {excerpt(error)}")
    step, base = read_json(folder.record).get("steps", 0), found.get("base")
    values = {"eval_loss": found.get("eval_loss", ""), "base.eval_loss": ""}
    if isinstance(base, dict):
        values["base.eval_loss"] = base.get("eval_loss", "")
    for name, value in values.items():
        if value is not None and not _is_number(value):  # null stands for a loss that was not finite
            return _Measured({}, f"cannot read evaluation.json: it has no {name}")
    return _Measured({(0, step, f"evaluation.json {name}"): value for name, value in values.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_evidence(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Check that a run folder still is what was recorded; a replay proves nothing about one that is not.

    Args:
        folder: the run folder.
        record: its `run.json`.

    Raises:
        RunFolderError: there is no adapter in it.
        ProofError: configuration, adapter or losses are not the recorded ones.
    """
    for flaw in _config_flaws(folder, record):
        raise ProofError(flaw.what, where=flaw.where, fix=flaw.fix)
    if not (folder.adapter / WEIGHTS_FILE).is_file():
        raise RunFolderError(
            f"missing file: {folder.adapter.name}/{WEIGHTS_FILE}", where=str(folder.path), fix="restore the file"
        )
    for flaw in _evidence_flaws(folder, record):
        raise ProofError(flaw.what, where=flaw.where, fix=flaw.fix)


def _config_flaws(folder: RunFolder, record: Mapping[str, Any]) -> Iterator[Problem]:
    recorded = record.get("config_sha256")  # an older record has none
    if recorded is not None and file_sha256(folder.config) != recorded:
        yield Problem("config.yaml was edited since the run", str(folder.config), "restore the file")


def _evidence_flaws(folder: RunFolder, record: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what of a run's results is missing, damaged or not the recorded one."""
    weights = folder.adapter / WEIGHTS_FILE
    try:
        same = adapter_sha256(folder.adapter) == record.get("adapter_sha256")
    except ModelError:  # missing or damaged
        same = False
    if not same:
        yield Problem("the adapter in the run folder is not the recorded one", str(weights), "restore the file")
    measured = _read_losses(folder)
    gap = measured.flaw or _gap(folder, record, measured)
    if gap is not None:
        yield Problem(gap, str(folder.metrics), "restore metrics.jsonl; the losses that it lacks cannot be compared")
    flaw = _read_evaluation(folder).flaw
    if flaw is not None:
        yield Problem(flaw, str(folder.evaluation), "restore the file, or write it again with loralab eval")


def _gap(folder: RunFolder, record: Mapping[str, Any], measured: _Measured) -> str | None:
    """Return where the training losses do not cover the run, or None."""
    steps, every = record.get("steps"), load_config(folder.config).config.training.logging_steps
    if type(steps) is not int:
        return "run.json does not say how many steps the run has"
    # An early stop comes between two lines; every other run logs its last step.
    last = steps - steps % every if record.get("stopped_because") else steps
    found = {step for _, step, name in measured.losses if name == "loss"}
    end = max(found, default=0)
    if end < last:
        return f"the training losses in metrics.jsonl end at step {end}, the run at step {steps}"
    resumed = any(str(event.get("what", "")).startswith("resumed") for event in record.get("events", []))
    lacking = sorted(set(range(every, last + 1, every)) - found)
    if lacking and not resumed:  # a resumed run may have been logged at other steps before
        return f"metrics.jsonl has no training loss of step {lacking[0]}"
    return None


def check_replay(result: Mapping[str, Any]) -> None:
    """Check that a replay gave the run's adapter and losses.

    Raises:
        ProofError: it did not; what differs first is named.
    """
    if result["equal"]:
        return
    hashes, first = result["adapter_sha256"], result["first_difference"]
    what = f"the replay differs from the run: {_hash_difference(hashes, losses_differ=first is not None)}"
    if first is not None:
        what += f"; first at step {first['step']}: {first['name']} was {first['run']!r}, now {first['replay']!r}"
    causes = "; ".join(result["differences"])
    nothing = "nothing else differs in the records; a computation here is not deterministic"
    raise ProofError(what, where=str(result["replay"]), fix=f"restore what differs: {causes}" if causes else nothing)


def _hash_difference(hashes: Mapping[str, str | None], *, losses_differ: bool) -> str:
    if hashes["run"] != hashes["replay"]:
        return f"adapter_sha256 was {_cut(hashes['run'])}, now {_cut(hashes['replay'])}"
    return "the adapter is equal; losses differ" if losses_differ else "the run folder is not what was recorded"


def _cut(digest: str | None) -> str:
    return f"{digest[:12]}.." if digest else "unknown"
