"""`loralab push`: an adapter, or a merged model, to the Hub after training.

Owns what a folder is pushed as, to which repository, and what of it stands in the run's record.
"""

import secrets
import shlex
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.config.load import load_config
from loralab.config.output_schema import HubConfig
from loralab.config.schema import Config
from loralab.errors import AdapterIntegrityError, HubError, RunFolderError, StoppedBySignal, StorageError, UserError
from loralab.hub.access import identify
from loralab.hub.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    MERGE_RECORD,
    is_merged,
    pushable_files,
    stage_adapter,
)
from loralab.hub.repository import WEIGHTS, Repository, check_lineage, open_repository, resolve_name
from loralab.hub.upload import Push, Pushed, push_files
from loralab.progress import Reporter
from loralab.reports.model_card import HUB_ID, write_model_card
from loralab.run import Json, RunFolder, file_sha256, read_json, write_json
from loralab.workflows.hub_pushes import (
    KEY,
    base_on_hub,
    commit_text,
    name_own_place,
    note_push,
    push_command,
    timestamp,
)
from loralab.workflows.merge_checks import check_adapter
from loralab.workflows.output import writer_of
from loralab.workflows.session import Target, known_base


@dataclass(frozen=True, slots=True)
class PushRequest:
    """What the command line asks for; what is None comes from the run, or is the usual.

    Attributes:
        repo: OWNER/NAME, or a name below the user.
        private: whether the repository is made private where it does not exist.
        revision: branch; made where it does not exist.
        create_pr: open a pull request.
        overwrite: replace another run's weights.
    """

    repo: str | None = None
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    overwrite: bool = False

    @property
    def options(self) -> list[str]:
        """The options of `loralab push` that ask for the same."""
        return [
            *(["--repo", self.repo] if self.repo is not None else []),
            *([] if self.private is None else ["--private" if self.private else "--public"]),
            *(["--revision", self.revision] if self.revision is not None else []),
            *(["--create-pr"] if self.create_pr else []),
            *(["--overwrite"] if self.overwrite else []),
        ]


@dataclass(frozen=True, slots=True)
class _Source:
    """What is pushed.

    Attributes:
        path: folder with the files.
        name: what it is known as.
        run: the run folder that it is the adapter of, or None.
        record: `run.json` of that run, or empty.
        hub: the run's settings.
    """

    path: Path
    name: str
    run: RunFolder | None
    record: Json
    hub: HubConfig


def push(path: Path, request: PushRequest, *, reporter: Reporter) -> Json:
    """Push an adapter or a merged model, and wait until the repository has every file of it.

    Args:
        path: run folder, adapter folder or merged folder.
        request: where to, and how.
        reporter: told of progress.

    Returns:
        `repo`, `url`, `commit`, `private`, `files` (name, bytes, SHA-256), `seconds` and `attempts`.

    Raises:
        UserError: there is nothing to push, it may not be pushed there, or the push failed.
        AdapterIntegrityError: the weights are not those that were saved.
        StoppedBySignal: Ctrl-C.
    """
    source = _find_source(path)
    weights = _check_weights(source)
    if source.run is not None and not (source.path / CARD).is_file():
        write_model_card(source.run)
    where = "option --repo" if request.repo is not None else KEY if source.hub.repo else "argument RUN"
    repository, run_id = _open(source, request, where=where)
    reporter.say(f"pushing {source.path} to {repository.url}")
    try:
        with _staging(source) as staging:
            bundle = _bundle(source, staging, run_id, weights, repository=repository.name)
            pushed = push_files(repository, bundle, create_pr=request.create_pr, where=where, note=reporter.say)
            files = _describe(bundle.files)
    except KeyboardInterrupt:
        again = f"push again: {push_command(path, request.options)}; what arrived is not sent twice"
        raise StoppedBySignal(signal.SIGINT, where=f"the push to {repository.name}", fix=again) from None
    if source.run is not None:
        _keep(source.run, repository, pushed, run_id, settles=request.revision is None and not request.create_pr)
    if pushed.error is not None:
        raise pushed.error
    reporter.say(f"all {len(files)} files are in the repository as they are here, compared by hash")
    return {
        "repo": repository.name,
        "url": pushed.url,
        "commit": pushed.commit,
        "private": repository.private,
        "files": files,
        "seconds": round(pushed.seconds, 3),
        "attempts": pushed.attempts,
    }


def push_owed(folder: RunFolder, config: Config, reporter: Reporter) -> bool:
    """Push the adapter of a complete run whose last push failed or never was; a failure is said, not raised.

    Args:
        folder: of the run.
        config: as it is now.
        reporter: told of it.

    Returns:
        Whether a push was owed.
    """
    hub = config.output.hub
    if hub.repo is None or not read_json(folder.record).get("hub", {}).get("owed", True):
        return False
    try:
        result = push(folder.path, PushRequest(repo=hub.repo, private=hub.private), reporter=reporter)
    except UserError as error:
        reporter.say(f"warning: {error.problems[0].what}; push later with: {push_command(folder.path)}")
    else:
        reporter.say(f"pushed to {result['url']}")
    return True


def _find_source(path: Path) -> _Source:
    folder = RunFolder(path)
    if not folder.exists() and path.resolve() == RunFolder(path.resolve().parent).adapter:
        folder = RunFolder(path.resolve().parent)  # a run's adapter
    if folder.exists():
        record = read_json(folder.record)
        if record.get("status") != "completed":
            writer, finish = (
                writer_of(folder),
                f"finish it first: loralab train {shlex.quote(str(folder.config))} --resume",
            )
            raise RunFolderError(
                f"the run is not complete ({record.get('status', 'unknown')}): its adapter is not final"
                + (f"; process {writer} is at work there" if writer else ""),
                where=str(folder.path),
                fix=("wait until it has ended" if writer else finish) + "; or push one of its checkpoints' folders",
            )
        if not (folder.adapter / ADAPTER_WEIGHTS).is_file():
            raise RunFolderError(
                f"the run has no {ADAPTER_WEIGHTS}",
                where=str(folder.adapter),
                fix="restore its adapter folder, or train again",
            )
        hub = load_config(folder.config).config.output.hub if folder.config.is_file() else HubConfig()
        return _Source(folder.adapter, folder.path.absolute().name, folder, record, hub)
    if is_merged(path) or (path / ADAPTER_CONFIG).is_file():
        return _Source(path, path.absolute().name, None, {}, HubConfig())
    what = "no such folder" if not path.exists() else "neither a run nor an adapter nor a merged model"
    raise RunFolderError(
        f"{what}: {str(path)!r}",
        where="argument RUN",
        fix="give a run folder, an adapter folder, or a folder that `loralab merge` wrote",
    )


def _open(source: _Source, request: PushRequest, *, where: str) -> tuple[Repository, str]:
    account = identify(where=where)
    earlier = source.record.get("hub", {})
    private = source.hub.private if request.private is None else request.private
    asked = source.hub.repo or "{user}/{run}"
    template = asked if request.repo is None else request.repo
    if earlier and template == earlier["asked"]:  # the time of the start is the run's
        name = earlier["repo"]
    else:
        values = {"user": account.user, "run": source.name, "timestamp": timestamp()}
        name = resolve_name(template, values, where=where)
    repository = Repository(name, private, request.revision)
    open_repository(repository, account, where=where)
    run_id = earlier.get("run_id") or _own_id(source)
    if not request.overwrite:
        weights = {each: file_sha256(source.path / each) for each in WEIGHTS if (source.path / each).is_file()}
        fix = "name another repository with --repo, or replace them with --overwrite"
        check_lineage(repository, run_id, weights, where=where, fix=fix)
    return repository, run_id


def _own_id(source: _Source) -> str:
    """Return by what the commits of a folder are known that no run has pushed before."""
    if source.run is not None:
        return secrets.token_hex(8)
    weights = [path for path in sorted(source.path.glob("*.safetensors")) if path.name in pushable_files(source.path)]
    if not weights:
        raise HubError(
            "there are no safetensors weights to push", where=str(source.path), fix="give a folder that has them"
        )
    return file_sha256(weights[0])[:16]


def _check_weights(source: _Source) -> str:
    """Check that the weights are those that were saved, as far as that was recorded; return the adapter's hash."""
    if not is_merged(source.path):
        return check_adapter(Target(source.path, source.run))
    record = read_json(source.path / MERGE_RECORD)
    for name, sha256 in (record.get("files") or {}).items():
        file = source.path / name
        if not file.is_file() or file_sha256(file) != sha256:
            raise AdapterIntegrityError(
                f"{name} is not the file that the merge wrote and proved",
                where=str(source.path),
                fix="restore it from a copy, or merge again",
            )
    adapters = record.get("adapters") or [{}]
    return str(adapters[0].get("sha256") or "unknown")


@contextmanager
def _staging(source: _Source) -> Iterator[Path]:
    """Yield a folder for what is pushed: beside the files, which can be linked there, else where temporary files go."""
    prefix = ".adapter-push-"  # what a kill leaves goes when the run's folder is used again
    try:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=source.path.absolute().parent))
    except OSError:
        path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _bundle(source: _Source, staging: Path, run_id: str, adapter: str, *, repository: str) -> Push:
    if is_merged(source.path):
        title, description = commit_text(source.name, run_id, step=None, adapter=adapter)
        files = pushable_files(source.path)
        if CARD in files:
            shutil.copyfile(files[CARD], staging / CARD)
            name_own_place(staging, repository)
            files[CARD] = staging / CARD
        return Push(files, title.replace("adapter", "merged from adapter"), description)
    base, commit = base_on_hub(source.record) if source.run is not None else _named_base(source.path)
    try:
        stage_adapter(source.path, staging, base_name=base, base_commit=commit)
    except OSError as error:
        raise StorageError(
            f"the files to push cannot be laid out: {error.strerror}",
            where=str(staging),
            fix="free space there, or push from a folder on another disk",
        ) from error
    name_own_place(staging, repository)
    step = source.record.get("steps")
    title, description = commit_text(source.name, run_id, step=step, adapter=adapter)
    return Push(pushable_files(staging), title, description, step)


def _named_base(path: Path) -> tuple[str | None, str | None]:
    """Return Hub id and commit of a lone adapter's base; None for a folder, as its facts say, else its name's form."""
    config, known = read_json(path / ADAPTER_CONFIG), known_base(Target(path, None))
    name = str(config.get("base_model_name_or_path") or "")
    is_folder = not HUB_ID.fullmatch(name) or Path(name).exists()
    return (None, None) if known.sha256 or is_folder else (name, config.get("revision") or known.revision)


def _describe(files: Mapping[str, Path]) -> list[dict[str, Any]]:
    return [
        {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in sorted(files.items())
    ]


def _keep(folder: RunFolder, repository: Repository, pushed: Pushed, run_id: str, *, settles: bool) -> None:
    record = read_json(folder.record)
    hub = record.setdefault(
        "hub",
        {
            "repo": repository.name,
            "asked": None,
            "url": repository.url,
            "private": repository.private,
            "run_id": run_id,
            "pushes": [],
            "failures": [],
            "owed": False,
        },
    )
    note_push(record, pushed, repository)
    if settles and pushed.error is None and repository.name == hub["repo"]:
        hub["owed"] = False
    try:
        write_json(folder.record, record)
    except OSError:
        return  # a run folder that can only be read: the push itself stands
