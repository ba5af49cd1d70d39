"""The record of a run: `run.json` and `config.yaml`.

Owns what is recorded of versions, machine and choices, and how a run ended.
"""

import errno
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows has none; the peak is then not recorded
    resource = None  # type: ignore[assignment]

from loralab.config.load import LoadedConfig, dump_config, load_config
from loralab.config.schema import Config
from loralab.errors import LoralabError, RunFolderError, StoppedBySignal, StorageError
from loralab.models.precision import Resolved
from loralab.run import RunFolder, file_sha256, read_json, write_json, write_text
from loralab.workflows.output import STARTING, clear_run, sweep_leftovers
from loralab.workflows.pinning import as_pinned

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
# Those that decide on the order of sums; a patch release may not.
_MATHS_LIBRARIES = ("torch", "transformers", "peft")
# Where a run is and what it worked with, which may change under a complete run.
_PLACES = ("output.dir", "output.hub", "data.cache_dir", "data.num_workers")
# A disk with less than this left is taken for full when a write fails without saying why.
_FULL_BYTES = 1 << 20


def check_same_config(folder: RunFolder, config: Config) -> None:
    """Check that a complete run was made with `config`.

    Raises:
        RunFolderError: a setting differs; each is named with both values.
    """
    pinned = as_pinned(config, read_json(folder.record).get("revisions", {}))
    differing = _differing(load_config(folder.config).config, anchored(pinned, folder), _PLACES)
    if differing:
        raise RunFolderError(
            f"the run is complete, with other settings: {'; '.join(differing)}",
            where=str(folder.path),
            fix="start a new run in another output.dir, or replace this one with --overwrite",
        )


def config_differences(before: RunFolder, after: RunFolder, *, ignored: Collection[str] = ()) -> list[str]:
    """Return the settings in which two runs differ, each with both values, but for the `ignored` keys."""
    return _differing(load_config(before.config).config, load_config(after.config).config, ignored)


def _differing(before: Config, wanted: Config, ignored: Collection[str] = ()) -> list[str]:
    old, new = before.model_dump(mode="json"), wanted.model_dump(mode="json")
    return [
        f"{section}.{key} was {old[section][key]!r}, now {value!r}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value and f"{section}.{key}" not in ignored
    ]


# How the event of `add_environment_change` begins, by which `replay` knows it.
CHANGED_AT_RESUME = "changed at a resume: "


@dataclass
class RunRecord:
    """The content of `run.json`, written at every change.

    Attributes:
        folder: the run folder.
        content: what is written.
    """

    folder: RunFolder
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, folder: RunFolder, loaded: LoadedConfig, facts: Mapping[str, Any]) -> "RunRecord":
        """Make the folder a new run's: configuration and first record, in the place of an earlier run.

        The record comes first, marked as starting: a kill between the files leaves a folder that is
        known as a run's, and as one without a step.

        Raises:
            StorageError: a file cannot be written.
        """
        record = cls(folder)
        record.content = {
            "loralab_version": importlib.metadata.version("loralab"),
            "name": loaded.name,
            "status": STARTING,
            "started_at": now(),
            "origin": loaded.origin,
            "seeds": {"training": loaded.config.training.seed, "split": loaded.config.data.split_seed},
            "events": [],
            **facts,
        }
        try:
            record.update()
        except OSError as error:
            raise _unwritable(folder, error) from None  # an earlier run is still whole
        try:
            clear_run(folder, keep_record=True)
            write_text(folder.config, dump_config(anchored(loaded.config, folder)))
            record.update(status="running", config_sha256=file_sha256(folder.config))
        except OSError as error:
            clear_run(folder)
            raise _unwritable(folder, error) from None
        return record

    @classmethod
    def reopen(cls, folder: RunFolder, loaded: LoadedConfig, facts: Mapping[str, Any]) -> "RunRecord":
        """Go on with the record of an interrupted run, with the settings and machine of now."""
        sweep_leftovers(folder)
        record = cls(folder, read_json(folder.record))
        changed = _differing(load_config(folder.config).config, anchored(loaded.config, folder))
        for key in ("finished_at", "stopped_because"):
            record.content.pop(key, None)
        record.add_event("; ".join(["resumed", *changed]))
        write_text(folder.config, dump_config(anchored(loaded.config, folder)))
        record.update(status="running", origin=loaded.origin, config_sha256=file_sha256(folder.config), **facts)
        return record

    def add_environment_change(self, change: str) -> None:
        """Note what of libraries or machine is another one from a resume on."""
        self.add_event(f"{CHANGED_AT_RESUME}{change}")

    def add_event(self, what: str) -> None:
        """Note something that happened; the next write keeps it."""
        self.content.setdefault("events", []).append({"at": now(), "what": what})

    def update(self, **values: Any) -> None:
        """Set `values` and write the file."""
        self.content.update(values)
        write_json(self.folder.record, self.content)


class UnwrittenRecord(RunRecord):
    """The record in a process that does not write."""

    def update(self, **values: Any) -> None:
        """Set `values`."""
        self.content.update(values)


def _unwritable(folder: RunFolder, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write to {str(folder.path)!r}: {error.strerror}",
        where="key output.dir",
        fix="free space, or name another output.dir",
    )


def anchored(config: Config, folder: RunFolder) -> Config:
    """Return the configuration with local paths made absolute, so that it means the same anywhere."""
    data = {name: _absolute(getattr(config.data, name)) for name in ("train", "validation", "test", "cache_dir")}
    if Path(config.data.template).is_file():  # a folder of that name is no template
        data["template"] = _absolute(config.data.template)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": _absolute(config.model.name)}),
            "data": config.data.model_copy(update=data),
            "output": config.output.model_copy(update={"dir": str(folder.path.absolute())}),
        }
    )


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    if any(mark in value for mark in "*?[") and path.parent.exists():
        return str(path.absolute())
    return str(path.absolute()) if path.exists() else value


def now() -> str:
    """Return the time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment_changes(before: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Return what of libraries and machine changes the last digits of a sum, and has changed since a record.

    Args:
        before: an earlier `run.json`.
        facts: the "versions" and "hardware" to compare with.
    """
    changes = []
    for name in _MATHS_LIBRARIES:
        old, new = (str(each.get("versions", {}).get(name, "")) for each in (before, facts))
        if old and old.split(".")[:2] != new.split(".")[:2]:
            changes.append(f"{name} was {old}, now {new}")
    for name in ("processor", "gpu", "threads"):
        old, new = (each.get("hardware", {}).get(name) for each in (before, facts))
        if old is not None and old != new:
            changes.append(f"{name} was {old}, now {new}")
    return changes


def versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), "loralab": importlib.metadata.version("loralab"), **found}


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what the machine is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    processor = str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "device": str(device),
        "gpu": name,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "platform": platform.platform(),
    }


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory that was in use: of the GPU, else of this process; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_choices(choices: Mapping[str, Resolved[Any]]) -> dict[str, dict[str, str]]:
    """Return automatic choices as `run.json` holds them."""
    return {name: {"value": str(c.value).removeprefix("torch."), "reason": c.reason} for name, c in choices.items()}


@contextmanager
def closing_record(record: RunRecord) -> Iterator[None]:
    """Note in the record how a run ended; turn failed writes on a full disk into a clear error."""
    try:
        yield
    except BaseException as error:
        full = _disk_full(error, record.folder.path)
        try:
            _note_end(record, error)
        except OSError:
            full = True
        if full and not isinstance(error, LoralabError):
            raise StorageError(
                f"the disk is full: {str(record.folder.path)!r}",
                where=f"while writing the run ({_first_line(error)})",
                fix="free space, then go on with --resume; checkpoints that were written are whole",
            ) from error
        raise


def _note_end(record: RunRecord, error: BaseException) -> None:
    if record.content.get("status") == "completed":  # only what came after failed: the report
        record.add_event(f"report not written: {_first_line(error)}")
        record.update()
        return
    status = "interrupted" if isinstance(error, (StoppedBySignal, KeyboardInterrupt)) else "failed"
    record.update(status=status, finished_at=now(), stopped_because=_first_line(error))


def _first_line(error: BaseException) -> str:
    problems = getattr(error, "problems", None)
    if problems:
        return str(problems[0].what)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _disk_full(error: BaseException, path: Path) -> bool:
    # safetensors and torch wrap the system's error in their own; its text stays.
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error) or "No space left" in str(error):
        return True
    if isinstance(error, LoralabError) or not isinstance(error, Exception):
        return False
    try:
        return shutil.disk_usage(path).free < _FULL_BYTES
    except OSError:
        return False
