"""What a run has to do with the Hub: its pinned commits, and the pushes of its adapter.

Owns what happens at the start (is there a token that may write, to which repository), at each push and at the
end, and what of it stands in `run.json`. Training never waits for an upload and never fails by one.
"""

import dataclasses
import secrets
import shlex
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.config.load import LoadedConfig
from loralab.config.schema import Config
from loralab.errors import HubError, LoralabError, StoppedBySignal, excerpt
from loralab.hub.access import SILENCE_SECONDS, identify
from loralab.hub.cards import licence_fields
from loralab.hub.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, pushable_files, stage_adapter
from loralab.hub.repository import Repository, check_lineage, lineage, open_repository, resolve_name
from loralab.hub.upload import ATTEMPTS, BackgroundPushes, Push, Pushed, push_files
from loralab.models.adapters import adapter_sha256
from loralab.progress import Reporter
from loralab.reports.model_card import render_model_card
from loralab.reports.usage import name_repository
from loralab.run import Json, RunFolder, read_json, write_text
from loralab.training.callbacks import StopRequest, catching_signals
from loralab.training.distributed import Processes
from loralab.training.pushing import PushCallback
from loralab.workflows.adapter_folder import save_prompting
from loralab.workflows.pinning import data_languages, pin_revisions
from loralab.workflows.record import now
from loralab.workflows.steps import Run

KEY = "key output.hub.repo"
# Beside the checkpoints, which it is made of: another run in this folder clears both.
_SNAPSHOTS = ".pushing"
_LOOK_SECONDS = 0.2
_SAY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HubPlan:
    """What a run takes from the Hub and brings there, settled by its first process.

    Attributes:
        config: the configuration, with commits in the place of branches.
        revisions: what the record keeps of them.
        repository: where pushes go, or None.
        run_id: by which the run's commits are known.
        licence: what the base model's card says of it, in the Hub's fields; empty where it is not known.
    """

    config: Config
    revisions: Json
    repository: Repository | None
    run_id: str
    licence: dict[str, Any]


def settle_hub(
    loaded: LoadedConfig,
    folder: RunFolder,
    *,
    going_on: bool,
    overwrite: bool,
    reporter: Reporter,
    processes: Processes,
) -> tuple[LoadedConfig, HubPlan]:
    """Find out, before anything is loaded, whether the run gets what it needs and may push what it makes.

    Args:
        loaded: the configuration.
        folder: of the run.
        going_on: whether an earlier run goes on there: with its commits, and to its repository.
        overwrite: whether a push may replace another run's weights.
        reporter: told of what was chosen.
        processes: those that share the run; the first one asks.

    Returns:
        The configuration with commits in it, and the plan.

    Raises:
        UserError: no token, no right, no such model or data, no network.
    """
    plan = None
    if processes.first:
        record = read_json(folder.record) if going_on else {}
        plan = _settle(loaded, folder, record, overwrite=overwrite, reporter=reporter)
    plan = processes.share(plan)
    return dataclasses.replace(loaded, config=plan.config), plan


def _settle(loaded: LoadedConfig, folder: RunFolder, record: Json, *, overwrite: bool, reporter: Reporter) -> HubPlan:
    config, hub = loaded.config, loaded.config.output.hub
    earlier = record.get("hub", {})
    run_id = earlier.get("run_id") or secrets.token_hex(8)
    repository = None
    if hub.repo is not None:
        account = identify(where=KEY)
        same = earlier.get("asked") == hub.repo
        values = {"user": account.user, "run": folder.path.absolute().name, "timestamp": timestamp()}
        name = earlier["repo"] if same else resolve_name(hub.repo, values, where=KEY)
        repository = Repository(name, hub.private)
        open_repository(repository, account, where=KEY)
        if not overwrite:
            fix = "name another repository, such as {user}/NAME-{timestamp}; or replace them with --overwrite"
            check_lineage(repository, run_id, {}, where=KEY, fix=fix)
        reporter.say(f"hub: {repository.url} ({'as when the run began' if same else 'output.hub.repo'})")
    pinned, revisions = pin_revisions(config, record.get("revisions", {}), reporter=reporter)
    licence = licence_fields(config.model.name, pinned.model.revision)
    return HubPlan(pinned, revisions, repository, run_id, licence)


def timestamp() -> str:
    """Return the time, UTC, as a part of a repository's name."""
    return now().replace("-", "").replace(":", "").partition("+")[0].replace("T", "-")


def commit_text(name: str, run_id: str, *, step: int | None, adapter: str) -> tuple[str, str]:
    """Return title and description of a commit, by which people and later pushes know it."""
    at = f"step {step}, " if step is not None else ""
    return f"loralab: {at}adapter {adapter[:12]}", f"Run {name}\n\n{lineage(run_id)}"


def base_on_hub(record: Json) -> tuple[str | None, str | None]:
    """Return the Hub id of a run's base and its commit; None for a local folder, which alone is hashed as a whole."""
    model = record.get("model", {})
    return (None, None) if model.get("sha256") or not model.get("name") else (model["name"], model.get("revision"))


def note_push(record: Json, pushed: Pushed, repository: Repository) -> None:
    """Keep in a record how a push ended; of another repository than the run's, also which."""
    hub = record["hub"]
    entry: Json = {"step": pushed.push.step, "when": now(), "seconds": round(pushed.seconds, 3)}
    if repository.name != hub["repo"]:
        entry["repo"] = repository.name
    if pushed.error is None:
        hub["pushes"].append({**entry, "commit": pushed.commit, "attempts": pushed.attempts})
    else:
        hub["failures"].append({**entry, "error": pushed.error.problems[0].what, "attempts": pushed.attempts})


class HubPushes:
    """The pushes of one run; without a repository, or in a process other than the first, it does nothing.

    Args:
        run: the run; its record has begun.
        plan: what was settled.
    """

    def __init__(self, run: Run, plan: HubPlan) -> None:
        self._run = run
        self._plan = plan
        self._snapshots = run.folder.checkpoints / _SNAPSHOTS
        self._background = BackgroundPushes(self._bring_up)
        self._record_start()
        hub = run.config.output.hub
        if plan.repository is not None:  # in every process: all of them save when one does
            run.pushing = PushCallback(
                self._push_checkpoint if run.processes.first else lambda _: None,
                self._look,
                every_save=hub.strategy == "every_save",
                steps=hub.steps if hub.strategy == "steps" else None,
            )

    def _record_start(self) -> None:
        run, repository = self._run, self._plan.repository
        if not run.processes.first:
            return
        content = run.record.content
        if self._plan.revisions:
            content["revisions"] = self._plan.revisions
        if self._plan.licence:
            content["model"]["licence"] = self._plan.licence
        spoken = data_languages(run.config, self._plan.revisions)
        if spoken:
            content["model"]["languages"] = spoken
        if repository is not None:
            before = content.get("hub", {})
            content["hub"] = {
                "repo": repository.name,
                "asked": run.config.output.hub.repo,
                "url": repository.url,
                "private": repository.private,
                "run_id": self._plan.run_id,
                "pushes": before.get("pushes", []),
                "failures": before.get("failures", []),
                "owed": True,
            }
            shutil.rmtree(self._snapshots, ignore_errors=True)  # of a process that was killed in a push
        run.record.update()

    def _bring_up(self, push: Push, stop: threading.Event) -> Pushed:
        if self._plan.repository is None:
            raise HubError("no repository", where=KEY, fix="set output.hub.repo")
        return push_files(self._plan.repository, push, where=KEY, stop=stop)

    def _push_checkpoint(self, step: int) -> None:
        """Take a snapshot of a sealed checkpoint and hand it to the thread that pushes."""
        source, target = self._run.folder.checkpoints / f"checkpoint-{step}", self._snapshots / f"step-{step}"
        try:
            push = self._snapshot(source, target, step, only=(ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        except Exception as error:  # noqa: BLE001 - a full disk, a card: whatever it is, training goes on
            self._note(f"step {step} is not pushed: {_reason(error)}")
            return
        replaced = self._background.offer(push)
        if replaced is not None:
            self._note(f"the push of step {replaced.step} had not begun: step {step} takes its place")
        self._look()

    def _snapshot(self, source: Path, target: Path, step: int | None, *, only: tuple[str, ...] = ()) -> Push:
        run = self._run
        shutil.rmtree(target, ignore_errors=True)
        base, commit = base_on_hub(run.record.content)
        stage_adapter(source, target, base_name=base, base_commit=commit, only=only)
        if only:  # a checkpoint has no tokenizer, and no card yet
            save_prompting(target, run.data.prompter)
            write_text(target / CARD, render_model_card(run.folder))
        if self._plan.repository is not None:
            name_own_place(target, self._plan.repository.name)
        name = run.folder.path.absolute().name
        title, description = commit_text(name, self._plan.run_id, step=step, adapter=adapter_sha256(source))
        return Push(pushable_files(target), title, description, step, own_folder=target)

    def _look(self) -> list[Pushed]:
        """Record and return the pushes that ended; the run's own thread writes its record, no other."""
        ended, repository = self._background.ended(), self._plan.repository
        if repository is None:
            return ended
        for pushed in ended:
            note_push(self._run.record.content, pushed, repository)
            at = f"step {pushed.push.step}"
            if pushed.error is None:
                self._run.reporter.say(f"pushed {at} to {pushed.url} ({pushed.seconds:.1f} s)")
                self._run.record.update()
            else:
                self._note(f"push of {at} failed after {_times(pushed.attempts)}: {pushed.error.problems[0].what}")
        return ended

    def _note(self, what: str) -> None:
        self._run.reporter.say(what)
        self._run.record.add_event(what)
        self._run.record.update()

    def finish(self) -> None:
        """Push the final adapter with its card, and wait for it; the run is complete whatever comes of it.

        Raises:
            StoppedBySignal: SIGINT or SIGTERM came while it waited.
        """
        run, repository = self._run, self._plan.repository
        if repository is None or not run.processes.first:
            return
        run.reporter.say(
            f"pushing the adapter to {repository.url}: {ATTEMPTS} attempts, each given up when the Hub is silent for "
            f"{SILENCE_SECONDS:.0f} s; Ctrl-C leaves the run complete"
        )
        with catching_signals(lambda _: None) as request:
            try:
                self._push_final(request)
            finally:
                shutil.rmtree(self._snapshots, ignore_errors=True)
        if run.record.content["hub"]["owed"]:
            run.reporter.say(f"the run is complete; push later with: {push_command(run.folder.path)}")

    def _push_final(self, request: StopRequest) -> None:
        run = self._run
        try:
            push = self._snapshot(run.folder.adapter, self._snapshots / "final", run.record.content.get("steps"))
        except Exception as error:  # noqa: BLE001 - the run is complete, whatever is in the way of sharing it
            self._note(f"the adapter is not pushed: {_reason(error)}")
            return
        self._background.offer(push, hurry=True)
        self._wait(request)
        if any(pushed.push is push and pushed.error is None for pushed in self._look()):
            run.record.content["hub"]["owed"] = False
            run.record.update()

    def _wait(self, request: StopRequest) -> None:
        started = said = time.monotonic()
        while not self._background.wait(_LOOK_SECONDS):
            if request.signal_number is not None:
                self._look()
                raise StoppedBySignal(
                    request.signal_number,
                    where=f"the push to {self._plan.repository and self._plan.repository.name}",
                    fix=f"the run is complete; push later with: {push_command(self._run.folder.path)}",
                )
            if time.monotonic() - said >= _SAY_SECONDS:
                said = time.monotonic()
                self._run.reporter.say(f"still pushing, {said - started:.0f} s")


def _reason(error: Exception) -> str:
    return error.problems[0].what if isinstance(error, LoralabError) else excerpt(error)


def _times(count: int) -> str:
    return f"{count} attempt" + ("s" if count > 1 else "")


def name_own_place(folder: Path, repository: str) -> None:
    """Let the card of an adapter that is pushed name its repository.

    Args:
        folder: what is pushed, laid out; the adapter's own card stays as it is.
        repository: OWNER/NAME.
    """
    card = folder / CARD
    if card.is_file():  # in one step, so that the file that it may be linked to is not written into
        write_text(card, name_repository(card.read_text(encoding="utf-8"), repository))


def push_command(path: Path, options: Sequence[str] = ()) -> str:
    """Return the command that pushes what lies in a folder, with the options that were given."""
    return shlex.join(["loralab", "push", str(path), *options])
