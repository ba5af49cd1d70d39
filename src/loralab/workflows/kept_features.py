"""What a frozen vision tower makes of each picture, computed once and kept on disk: whether, and computing it.

Owns the decision with its reason. Every picture goes through the tower alone, before the first step, so that what
is kept depends on nothing but its bytes, the processor and the tower's weights.
"""

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from loralab.config.schema import DataConfig
from loralab.data.example import ImageFile
from loralab.data.images.feature_store import FeatureStore
from loralab.data.images.processor import PictureProcessor
from loralab.data.images.reader import PictureReader
from loralab.data.tokens.cache import cache_folder
from loralab.errors import ConfigError, StorageError
from loralab.models.picture_features import encode_pictures, trains_vision
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.vision import check_reads_pictures, vision_modules
from loralab.training.arguments import count_steps
from loralab.training.callbacks import StopRequest
from loralab.workflows.record import describe_choices
from loralab.workflows.steps import Run

RECORD = "kept_features"
_SHARE_OF_DISK = 0.5
_WHERE = "key data.image.cache_features"


class _NotKept(Exception):
    """Why nothing is kept."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What would be kept.

    Attributes:
        files: the pictures of all splits, each once.
        store: where.
        wanted: bytes that are not there yet.
        missing: the pictures that are not there yet.
    """

    files: Sequence[ImageFile]
    store: FeatureStore
    wanted: int
    missing: Sequence[ImageFile]


def keep_features(run: Run, request: StopRequest) -> None:
    """Decide whether a run keeps the features of its pictures, compute them, and let its planner read them.

    The choice goes into the run's choices and record. Nothing is said of a run without pictures.

    Args:
        run: the run.
        request: asks the run to stop; what is computed until then is kept.

    Raises:
        ConfigError: features were to be kept, and cannot be.
    """
    reader, before = run.planner.pictures, run.record.content.get(RECORD)
    if not isinstance(reader, PictureReader) or not any(split.has_images for split in run.data.splits.values()):
        return
    image = run.config.data.image
    try:
        # One process looks and makes room: what is missing changes as soon as another one writes.
        found = run.processes.share(_try(run, reader.processor) if run.processes.first else "")
        if not isinstance(found, _Work):
            raise _NotKept(str(found))
        work = found
    except _NotKept as reason:
        if image.cache_features is True:
            raise ConfigError(
                f"features cannot be kept: {reason}", where=_WHERE, fix="set data.image.cache_features: auto"
            ) from None
        _note(run, Resolved("off", str(reason)), before)
        return
    kept = len(work.files) - len(work.missing)
    shown = f"{len(work.files):,} pictures, {kept:,} of them from an earlier run; loss and gradients are the same"
    _note(run, Resolved("on", f"the vision tower is frozen: {shown}"), before)
    started = time.perf_counter()
    if _encode(run, reader.processor, work, request):
        run.planner = replace(run.planner, pictures=reader.knowing(work.store))
    run.record.update(
        **{
            RECORD: {"value": "on", "pictures": len(work.files), "encoded": len(work.missing), "bytes": work.wanted}
            | {"seconds": round(time.perf_counter() - started, 3)}
        }
    )


def _note(run: Run, choice: Resolved[str], before: Mapping[str, Any] | None) -> None:
    """Tell of the choice and record it, and warn where a resumed run began with the other one."""
    run.choices["cache_features"] = choice
    run.reporter.say(f"cache_features: {choice.value} ({choice.reason})")
    if before is not None and before["value"] != choice.value:
        what = f"the run began with cache_features {before['value']}: the adapter may differ in its last digits"
        run.reporter.say(f"warning: {what}")
        run.record.add_event(f"warning: {what}")
    run.record.update(resolved=describe_choices(run.choices), **{RECORD: {"value": choice.value}})


def _try(run: Run, processor: PictureProcessor) -> _Work | str:
    """Return what is kept, or why nothing is: both can be told to other processes."""
    try:
        return _decide(run, processor)
    except _NotKept as reason:
        return str(reason)


def _decide(run: Run, processor: PictureProcessor) -> _Work:
    """Return what is kept.

    Raises:
        _NotKept: nothing is.
    """
    image = run.config.data.image
    base = run.model.language_model
    if image.cache_features is False:
        raise _NotKept("set in data.image.cache_features")
    if trains_vision(base):
        raise _NotKept(f"lora.vision is {run.config.lora.vision}: the vision tower learns")
    if run.config.model.base_dropout == "as_configured":
        raise _NotKept("model.base_dropout is as_configured: the tower may give something else each time")
    files = list({file.sha256: file for split in run.data.splits.values() for file in split.images()}.values())
    if image.cache_features == "auto":
        _check_use(run, len(files))
    store = FeatureStore(
        _features_folder(run.config.data, run.model, processor),
        width=int(base.config.get_text_config().hidden_size),
        dtype=run.model.embedding.weight.dtype,
    )
    counts = {file.sha256: processor.feature_count(file) for file in files}
    missing = [file for file in files if not store.holds(file, counts[file.sha256])]
    wanted = sum(store.bytes_of(counts[file.sha256]) for file in missing)
    whole = sum(store.bytes_of(count) for count in counts.values())
    _check_room(store, whole, wanted, most=int(image.cache_gib * 2**30))
    return _Work(files, store, wanted, missing)


def _check_use(run: Run, pictures: int) -> None:
    """Check that pictures are read more than once."""
    training, rows = run.config.training, len(run.data.splits["train"])
    step_rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * run.processes.count
    passes = count_steps(training, -(-rows // step_rows)) * step_rows / max(rows, 1)
    uses = sum(split.image_uses() * (passes if name == "train" else 2) for name, split in run.data.splits.items())
    if uses <= pictures:
        raise _NotKept("each picture is read once")


def _check_room(store: FeatureStore, whole: int, wanted: int, *, most: int) -> None:
    """Check that the features fit, and remove those of other weights where they must go for it."""
    there = next(each for each in (store.folder, *store.folder.parents) if each.exists())
    free = int(shutil.disk_usage(there).free * _SHARE_OF_DISK)
    if whole > most:
        raise _NotKept(f"they would take {whole / 2**30:.1f} GiB, and data.image.cache_gib is {most / 2**30:g}")
    if wanted > free:
        raise _NotKept(f"they would take {wanted / 2**30:.1f} GiB, and half of the free disk is {free / 2**30:.1f}")
    if not store.make_room(wanted, most=most):
        raise _NotKept(
            f"{wanted / 2**30:.1f} GiB more would not fit beside what this tower has kept of other data "
            f"(data.image.cache_gib: {most / 2**30:g}; folder {store.folder})"
        )


def _features_folder(data: DataConfig, model: SupervisedPeftModel, processor: PictureProcessor) -> Path:
    """Return the folder whose name says what features are a function of, but for the picture."""
    base, weight = model.language_model, model.embedding.weight
    attention = base.config.vision_config._attn_implementation
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "torchvision", "pillow")]
    parts = [processor.fingerprint, vision_sha256(base), str(weight.dtype), weight.device.type, attention, *versions]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return cache_folder(data).parent / "features" / key[:32]


def vision_sha256(base: PreTrainedModel) -> str:
    """Return a hash over everything of a model that reads pictures: weights and buffers, as they are held."""
    settings = {name: value for name, value in base.config.to_dict().items() if name != "text_config"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for part in vision_modules(base, check_reads_pictures(base.config)):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encode(run: Run, processor: PictureProcessor, work: _Work, request: StopRequest) -> bool:
    """Compute what is not there yet, each process its share; return whether all of it is there."""
    own = list(work.missing)[run.processes.rank :: run.processes.count]
    label, was_training, done = "encode pictures", run.model.training, 0
    run.model.eval()
    try:
        with torch.no_grad():
            for file in own:
                if request:
                    break
                tensors = {name: value.to(run.device) for name, value in processor.read([file]).items()}
                work.store.save(file, encode_pictures(run.model.language_model, tensors))
                done += 1
                run.reporter.progress(label, done, len(own))
    finally:
        run.model.train(was_training)
    if own:
        run.reporter.finish(label)
    run.processes.wait()
    if request.agree(run.processes):
        return False
    absent = [file for file in work.missing if not work.store.holds(file, processor.feature_count(file))]
    if run.processes.largest(len(absent)):
        raise StorageError(
            f"features of {len(absent)} pictures that another process computed are not here",
            where=str(work.store.folder),
            fix="give all machines one data.cache_dir, or set data.image.cache_features: false",
        )
    return True
