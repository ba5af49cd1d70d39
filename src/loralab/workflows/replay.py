"""A recorded run, run again: the same adapter and the same losses, or what differs first.

Owns the comparison of two run folders and its proof.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import ProofError, RunFolderError
from loralab.models.adapters import WEIGHTS_FILE, adapter_sha256
from loralab.progress import Reporter
from loralab.run import Json, RunFolder, open_run, read_json, read_metrics
from loralab.workflows.configure import load_run_config
from loralab.workflows.record import config_differences
from loralab.workflows.resume import contract_changes
from loralab.workflows.train import train

_MACHINE = ("device", "gpu", "processor", "threads")


def replay(path: Path, *, output: Path | None, overrides: Sequence[str] = (), reporter: Reporter) -> Json:
    """Run a recorded run again, into a new folder.

    Args:
        path: the run folder.
        output: where the replay goes; by default beside the run, under a name that is free.
        overrides: `section.key=value` on top of the recorded configuration, as for data that has moved.
        reporter: told of progress.

    Returns:
        Both hashes, whether adapters and losses are equal, and what differs.

    Raises:
        RunFolderError: no complete run there, or the output folder is in use.
    """
    folder = open_run(path)
    record = read_json(folder.record)
    if record.get("status") != "completed":
        raise RunFolderError(
            f"the run is not complete ({record.get('status', 'unknown')}): there is no adapter to compare with",
            where=str(path),
            fix=f"finish it first: loralab train {path} --resume",
        )
    processes = int(record.get("processes", 1))
    if processes > 1:
        raise RunFolderError(
            f"the run was made by {processes} processes, and a replay runs in one: its steps would be smaller",
            where=str(path),
            fix=f"train {folder.config} into another output.dir in {processes} processes, and compare adapter_sha256",
        )
    target = output if output is not None else _free_name(path.absolute())
    # A run folder may come from someone else: its word is not enough to run code.
    # The budget never changes the loss, but it does the last bits of its sums.
    budget = record.get("token_budget", {}).get("value")
    same_cuts = [f"training.token_budget={budget}"] if budget else []
    chosen = ["model.trust_remote_code=false", *same_cuts, *overrides, f"output.dir={target}"]
    loaded = load_run_config(folder.config, chosen, name=str(record.get("name", path.name)))
    again = train(loaded, reporter=reporter, warm_start=record.get("warm_start"))
    return compare_runs(folder, again)


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
    return {
        "run": str(before.path),
        "replay": str(after.path),
        "adapter_sha256": hashes,
        "equal": hashes["run"] == hashes["replay"] and first is None,
        "compared_losses": compared,
        "first_difference": first,
        "differences": list(_differences(before, after)),
    }


def _differences(before: RunFolder, after: RunFolder) -> Iterator[str]:
    """Yield what may explain a different result, the likeliest cause first."""
    old, new = read_json(before.record), read_json(after.record)
    if (before.adapter / WEIGHTS_FILE).is_file() and adapter_sha256(before.adapter) != old.get("adapter_sha256"):
        yield "the adapter in the run folder is not the recorded one any more (the recorded hash was compared)"
    yield from contract_changes(_identity(old), _identity(new))
    yield from config_differences(
        before, after, ignored=("output.dir", "model.trust_remote_code", "training.token_budget")
    )
    for part in ("resolved", "versions", "hardware"):
        yield from _changed(part, old.get(part, {}), new.get(part, {}))


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
    old, new = _losses(before), _losses(after)
    shared = sorted(old.keys() & new.keys(), key=lambda key: (key[1], key[2]))
    for key in shared:
        if old[key] != new[key]:
            return {"step": key[1], "name": key[2], "run": old[key], "replay": new[key]}, len(shared)
    return None, len(shared)


def _losses(folder: RunFolder) -> dict[tuple[int, int, str], float]:
    """Return losses by (first step, last step, name) of what they are the mean of.

    A run that was resumed with other logging_steps has means over other windows; those compare with nothing.
    """
    losses, last = {}, 0
    for line in read_metrics(folder.metrics):
        step = int(line["step"])
        if "loss" in line:
            losses[last, step, "loss"] = line["loss"]
            last = step
        if "eval_loss" in line:
            losses[step, step, "eval_loss"] = line["eval_loss"]
    return losses


def check_replay(result: Mapping[str, Any]) -> None:
    """Check that a replay gave the run's adapter and losses.

    Raises:
        ProofError: it did not; what differs first is named.
    """
    if result["equal"]:
        return
    hashes, first = result["adapter_sha256"], result["first_difference"]
    what = f"the replay differs from the run: adapter_sha256 was {_cut(hashes['run'])}, now {_cut(hashes['replay'])}"
    if first is not None:
        what += f"; first at step {first['step']}: {first['name']} was {first['run']!r}, now {first['replay']!r}"
    causes = "; ".join(result["differences"])
    nothing = "nothing else differs in the records; a computation here is not deterministic"
    raise ProofError(what, where=str(result["replay"]), fix=f"restore what differs: {causes}" if causes else nothing)


def _cut(digest: str | None) -> str:
    return f"{digest[:12]}.." if digest else "unknown"
