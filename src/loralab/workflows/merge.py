"""The `merge` command: an adapter written into its base, with the proof that it answers as before.

This page is the table of contents of a merge: read `merge` top to bottom.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loralab.config.schema import Config
from loralab.data.prompts.prompter import Prompter
from loralab.errors import ModelError
from loralab.hub.cards import licence_fields
from loralab.models.allocator import returning_memory
from loralab.models.load import load_model_config
from loralab.models.merge_source import snapshot_revision
from loralab.models.merge_whole import add_parts
from loralab.models.merging import Part
from loralab.models.quiet_loading import quiet_loading
from loralab.models.vision import auto_class
from loralab.progress import Reporter
from loralab.reports.merged_card import write_merged_card
from loralab.run import file_sha256, write_json
from loralab.workflows.first_look import check_merge
from loralab.workflows.memory_watch import MemoryWatch
from loralab.workflows.merge_checks import (
    DTYPES,
    MERGE_FILE,
    check_adapter,
    check_base,
    check_contracts,
    check_kinds,
    check_same_base,
    check_weights,
)
from loralab.workflows.merge_files import copy_companions, data_facts, run_facts
from loralab.workflows.merge_proof import (
    DEFINITIONS,
    LiveAnswers,
    ProofRow,
    ask_live,
    bars_of,
    check_bars,
    compare_merged,
    find_rows,
)
from loralab.workflows.merge_weights import Written, write_weights
from loralab.workflows.merge_world import MergeWorld, open_world
from loralab.workflows.new_folder import check_free, new_folder
from loralab.workflows.record import now, versions
from loralab.workflows.session import Target, find_target, open_session

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What is asked of a merge, besides the adapter.

    Attributes:
        output: folder of the merged model; it must not exist, or be empty.
        dtype: float32, bfloat16 or float16 for all weights; None keeps what each is stored in.
        onto: for a quantized run: dequantized, the weights that it was trained on, or original, the unquantized ones.
        others: further adapters with their weights, as in `OTHER=0.5`.
        weight: of the adapter itself.
        base_model: base to use instead of the recorded one.
        device: where the proof computes, or None for the run's setting.
    """

    output: Path
    dtype: str | None = None
    onto: str = "dequantized"
    others: Sequence[tuple[Path, float]] = ()
    weight: float = 1.0
    base_model: str | None = None
    device: str | None = None


def merge(path: Path, request: MergeRequest, *, reporter: Reporter) -> dict[str, Any]:
    """Merge an adapter into its base and prove the result.

    Args:
        path: run folder or adapter folder.
        request: what is asked.
        reporter: told of choices and progress.

    Returns:
        The content of `merge.json`.

    Raises:
        UserError: something is in the way, or cannot be merged.
        AdapterIntegrityError: the adapter's tensors are not those that were saved.
        MergeParityError: the merged model does not answer as the adapter does; nothing was kept.
    """
    others = [other for other, _ in request.others]
    check_merge([path, *others], request.output, dtype=request.dtype, onto=request.onto)
    dtype = None if request.dtype is None else DTYPES[request.dtype]
    targets = [find_target(each) for each in (path, *others)]
    weights = [request.weight, *(weight for _, weight in request.others)]
    parts = [Part(target.adapter, weight) for target, weight in zip(targets, weights, strict=True)]
    check_kinds(parts)
    hashes = [check_adapter(target) for target in targets]
    notes = check_weights(targets, parts, hashes)
    world = open_world(targets, parts, onto=request.onto, request=(request.base_model, request.device), dtype=dtype)
    check_free(request.output, [*(target.adapter for target in targets), *_base_folder(world.config)])
    base_sha256 = check_base(world.config, targets, hashes)
    check_same_base(targets, parts)
    check_contracts(targets)
    for text in (*notes, *world.notes):
        reporter.say(text)
    with new_folder(request.output, work="merging") as (staging, _):
        with MemoryWatch() as watch, returning_memory():
            written = write_weights(world, staging, output=request.output, reporter=reporter)
            writing = watch.peak_bytes(_CPU)
        with MemoryWatch() as watch:
            proof, prompter, compared_on = _prove(path, world, staging, written, reporter)
            proving = watch.peak_bytes(_CPU)
        content = {
            "name": targets[0].folder.path.name if targets[0].folder is not None else path.name,
            "adapters": _describe_adapters(parts, targets, hashes),
            "base": _describe_base(world, written.checkpoint.folder, base_sha256),
            "trained_on": data_facts(targets),
            **run_facts(targets, weights),
            "onto": world.onto.value,
            "onto_reason": world.onto.reason,
            "dtype": str(written.dtype.value).removeprefix("torch."),
            "dtype_reason": written.dtype.reason,
            "way": written.way.value,
            "way_reason": written.way.reason,
            "untied": written.untied,
            "shards": written.shards,
            "compared_on": compared_on,
            "proof": proof,
            "definitions": DEFINITIONS,
            "verdict": "held",
            "peak_memory_bytes": {"writing": writing, "proof": proving},
            "reads_pictures": prompter.pictures is not None,
            "versions": versions(),
            "made_at": now(),
        }
        copy_companions(staging, prompter, targets[0], written.checkpoint.folder)
        content["files"] = {each.name: file_sha256(each) for each in sorted(staging.glob("*.safetensors"))}
        write_json(staging / MERGE_FILE, content)
        write_merged_card(staging, content)
    return content


def _base_folder(config: Config) -> list[Path]:
    folder = Path(config.model.name).expanduser()
    return [folder] if folder.is_dir() else []


def _describe_adapters(parts: Sequence[Part], targets: Sequence[Target], hashes: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": target.folder.path.name if target.folder is not None else part.folder.name,
            "sha256": sha256,
            "weight": part.weight,
            "kind": str(getattr(part.config.peft_type, "value", part.config.peft_type)).lower(),
        }
        for part, target, sha256 in zip(parts, targets, hashes, strict=True)
    ]


def _describe_base(world: MergeWorld, folder: Path, sha256: str | None) -> dict[str, Any]:
    model = world.config.model
    licence = licence_fields(model.name, model.revision)
    return {
        "name": model.name if sha256 is None else Path(model.name).name,
        "revision": snapshot_revision(folder) if sha256 is None else None,
        "sha256": sha256,
        **({"licence": licence} if licence else {}),
    }


def _prove(
    path: Path, world: MergeWorld, staging: Path, written: Written, reporter: Reporter
) -> tuple[dict[str, Any], Prompter, str]:
    """Compare the merged model with the live adapter; one model is in memory at a time."""
    rows, live, prompter, compared_on = _ask(path, world, world.overrides, reporter, precision_reason=world.live_reason)
    trained = None
    if world.trained is not None:  # the adapter was trained on other numbers than it is merged onto
        _, trained, _, _ = _ask(
            path, world, world.trained.value, reporter, rows=rows, precision_reason="as in training"
        )
    merged, dtype = _reload(staging, written, world), getattr(torch, world.live_precision)

    def compare(answers: LiveAnswers) -> dict[str, Any]:
        return compare_merged(
            merged, rows, answers, dtype=dtype, pictures=prompter.pictures, where=str(path), reporter=reporter
        )

    figures = compare(live)
    bars = bars_of(figures, written.dtype.value)
    check_bars(figures, bars, str(path))
    figures |= {"bars": bars, "live_precision": world.live_precision, "kl_trained_merged": None}
    if trained is not None and world.trained is not None:
        far = compare(trained)["kl_adapter_merged"]
        figures |= {"kl_trained_merged": far, "kl_trained_merged_reason": world.trained.reason}
        reporter.say(
            f"KL(adapter as it was trained || merged) {far:.3g} nats: how far the merged model is from what was "
            f"trained; {world.trained.reason}"
        )
    return figures, prompter, compared_on


def _ask(
    path: Path,
    world: MergeWorld,
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    rows: list[ProofRow] | None = None,
    precision_reason: str,
) -> tuple[list[ProofRow], LiveAnswers, Prompter, str]:
    session = open_session(
        path,
        overrides=overrides,
        base_model=world.base_model,
        reporter=reporter,
        precision_reason=precision_reason,
    )
    add_parts(session.model, world.parts)
    name = ""
    if rows is None:
        name, rows = find_rows(session, reporter)
    live = ask_live(session, rows, reporter)
    prompter = session.prompter
    del session
    release_models()
    return rows, live, prompter, name


def _reload(staging: Path, written: Written, world: MergeWorld) -> Any:
    """Load the merged model as its users will."""
    config = load_model_config(world.config.model.model_copy(update={"name": str(staging), "revision": None}))
    try:
        with quiet_loading():
            merged: Any = auto_class(config).from_pretrained(
                str(staging), dtype=written.dtype.value, trust_remote_code=world.config.model.trust_remote_code
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the merged model cannot be loaded: {error}", where=str(staging), fix="report this with the base's name"
        ) from error
    return merged.to(world.device).eval()


def release_models() -> None:
    """Give the memory of models back that nothing names any more: their parts name each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
