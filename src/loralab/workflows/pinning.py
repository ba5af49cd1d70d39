"""The commits that a run's base model and data stand for: found at its start, kept in `run.json`, used ever after.

A branch that moves on changes neither the run nor what measures it: the run folder's configuration names commits,
and a resumed run takes those that it began with.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loralab.config.load import LoadedConfig
from loralab.config.schema import Config, DataSource, ModelConfig
from loralab.data.pools import is_split_name
from loralab.data.reading.sources import find_hub_id
from loralab.hub.access import is_offline
from loralab.hub.cache import is_commit, is_fetched
from loralab.hub.cards import languages
from loralab.hub.revisions import Pin, fetch_model, find_commit
from loralab.models.load import check_local_model
from loralab.progress import Reporter
from loralab.run import Json

_DATA_KEYS = ("train", "validation", "test")
# Kind, name, and the revision that was asked for.
_Key = tuple[str, str, str | None]
Find = Callable[[str, str, str | None, str], Pin]


def pin_revisions(config: Config, recorded: Mapping[str, Any], *, reporter: Reporter) -> tuple[Config, Json]:
    """Name the commit of everything that comes from the Hub, and fetch the base model's files.

    Args:
        config: as the user wrote it.
        recorded: `revisions` of the run's record, which go before what the branches are now; empty for a new run.
        reporter: told of commits and of files that are fetched.

    Returns:
        The configuration with commits in the place of branches, and what the record keeps.

    Raises:
        UserError: something is not there, not allowed, or the Hub cannot be reached.
    """
    check_local_model(config.model.name)
    pinned, found = _find_all(config, _known(recorded), reporter)
    for (kind, name, _), pin in found.items():
        if kind == "model" and pin.commit is not None:
            _fetch(name, pin.commit, reporter)
    kinds: dict[str, list[Json]] = {"model": [], "data": []}
    for (kind, _, _), pin in found.items():
        kinds[kind].append(dataclasses.asdict(pin))
    return pinned, {kind: pins for kind, pins in kinds.items() if pins}


def name_commits(loaded: LoadedConfig, reporter: Reporter) -> LoadedConfig:
    """Name the commit of everything that comes from the Hub, for work that needs no weights and keeps no record.

    Each is asked for once: by its commit, what lies in the cache is taken from there.

    Args:
        loaded: the configuration, as the user wrote it.
        reporter: told of commits.

    Raises:
        UserError: something is not there, not allowed, or the Hub cannot be reached.
    """
    name = loaded.config.model.name
    if not Path(name).expanduser().exists():  # a folder may hold a tokenizer alone
        check_local_model(name)
    return dataclasses.replace(loaded, config=_find_all(loaded.config, {}, reporter)[0])


def _find_all(config: Config, known: Mapping[_Key, Pin], reporter: Reporter) -> tuple[Config, dict[_Key, Pin]]:
    found: dict[_Key, Pin] = {}

    def find(kind: str, name: str, asked: str | None, where: str) -> Pin:
        key = (kind, name, asked)
        if key not in found:
            pin = known.get(key)
            if pin is None:
                pin = find_commit("model" if kind == "model" else "dataset", name, asked, where=where)
                reporter.say(f"{name}: commit {pin.commit or 'unknown'} ({pin.reason})")
            found[key] = pin
        return found[key]

    return _apply(config, find), found


def as_pinned(config: Config, recorded: Mapping[str, Any]) -> Config:
    """Return a configuration with the commits that a run's record names; the Hub is not asked."""
    known = _known(recorded)

    def find(kind: str, name: str, asked: str | None, where: str) -> Pin:
        return known.get((kind, name, asked)) or Pin(name, asked, None, where)

    return _apply(config, find)


def fetch_base(model: ModelConfig, reporter: Reporter) -> None:
    """Fetch what the cache lacks of a base from the Hub; a local folder, and what is there already, ask nothing.

    Args:
        model: names it.
        reporter: told of files that are fetched.

    Raises:
        HubError: it is not there, not allowed, or the Hub cannot be reached.
    """
    if Path(model.name).expanduser().exists() or is_offline():
        return
    if not is_commit(model.revision) and is_fetched(model.name, model.revision):
        return
    commit = find_commit("model", model.name, model.revision, where="key model.name").commit
    if commit is not None:
        _fetch(model.name, commit, reporter)


def _fetch(name: str, commit: str, reporter: Reporter) -> None:
    label = f"fetch {name}"
    try:
        fetch_model(
            name, commit, where="key model.name", progress=lambda done, total: reporter.progress(label, done, total)
        )
    finally:
        reporter.finish(label)


def _known(recorded: Mapping[str, Any]) -> dict[_Key, Pin]:
    return {
        (kind, pin["name"], asked): Pin(pin["name"], pin["asked"], pin["commit"], pin["reason"])
        for kind, pins in recorded.items()
        for pin in pins
        # The run folder's own configuration asks for the commit.
        for asked in (pin["asked"], pin["commit"])
    }


def _apply(config: Config, find: Find) -> Config:
    model, data = config.model, config.data
    if not Path(model.name).expanduser().exists():
        pin = find("model", model.name, model.revision, "key model.name")
        model = model.model_copy(update={"revision": pin.commit or model.revision})
    values = {key: _pinned_names(getattr(data, key), key, find) for key in _DATA_KEYS}
    return config.model_copy(update={"model": model, "data": data.model_copy(update=values)})


def _pinned_names(value: Any, key: str, find: Find) -> Any:
    if isinstance(value, list):
        return [_pinned_names(each, key, find) for each in value]
    if isinstance(value, DataSource):
        return value.model_copy(update={"path": _pinned_names(value.path, key, find)})
    if not isinstance(value, str) or (key != "train" and is_split_name(value)):
        return value
    hub_id = find_hub_id(value)
    if hub_id is None:
        return value
    pin = find("data", hub_id.name, hub_id.revision, f"key data.{key}")
    if pin.commit is None:
        return value
    config = f":{hub_id.config}" if hub_id.config else ""
    split = f"#{hub_id.split}" if hub_id.split else ""
    return f"{hub_id.name}{config}@{pin.commit}{split}"


def hub_data_names(recorded: Mapping[str, Any]) -> Iterator[str]:
    """Yield the Hub ids of a run's data."""
    yield from dict.fromkeys(pin["name"] for pin in recorded.get("data", ()))


def data_languages(config: Config, recorded: Mapping[str, Any]) -> list[str]:
    """Return the languages of the training data, where all of it comes from the Hub and every card names some."""
    names: list[str] = []

    def note(kind: str, name: str, asked: str | None, where: str) -> Pin:
        names.append(name)
        return Pin(name, asked, None, where)

    sources = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    for source in sources:
        before = len(names)
        _pinned_names(source, "train", note)
        if len(names) == before:
            return []  # a file here says nothing of its language
    commits = {pin["name"]: pin["commit"] for pin in recorded.get("data", ())}
    found = [languages(name, commits.get(name)) for name in names]
    return list(dict.fromkeys(language for each in found for language in each)) if all(found) else []
