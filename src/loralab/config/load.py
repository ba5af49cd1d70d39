"""Reading a configuration: file, then command line, then defaults; all problems at once.

Owns the order of sources, the origin of every value and the wording of configuration errors.
"""

import copy
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from loralab.config.checks import check_config
from loralab.config.findings import Finding
from loralab.config.other_names import OTHER_NAMES
from loralab.config.paths import check_paths
from loralab.config.schema import Config, DataSource
from loralab.config.yaml_lines import dump_yaml, parse_scalar, parse_yaml
from loralab.errors import ConfigError, Problem
from loralab.lookup import nearest_name, suggest

Check = Callable[[Config], list[Finding]]
# One of the values that pydantic lists for a field that takes only certain ones.
_CHOICE = re.compile(r"'([^']*)'")


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration and where each of its values came from.

    Attributes:
        config: the configuration.
        origin: "default", "FILE:LINE" or "command line" by dotted key, for every field.
        name: name of the run: the configuration file's without suffix.
    """

    config: Config
    origin: dict[str, str]
    name: str


def load_config(
    source: Path | Mapping[str, Any] | None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    checks: Iterable[Check] = (),
    name: str | None = None,
) -> LoadedConfig:
    """Read, override and check a configuration.

    Args:
        source: a YAML file, a nested mapping, or None for overrides alone.
        overrides: `section.key=value` strings, or a mapping of dotted keys or nested sections.
        checks: rules of other layers, run beside those of `checks.py`.
        name: name of the run; the file's by default.

    Raises:
        ConfigError: with one problem per mistake.
    """
    values, lines, problems = _read_source(source)
    file_name = str(source) if isinstance(source, Path) else "config"
    origin = {key: f"{file_name}:{line}" for key, line in lines.items()}
    if not isinstance(source, Path):
        origin.update(dict.fromkeys(_given_keys(values), "argument"))
    problems += _apply_overrides(values, overrides, origin)
    config, wrong = _validate(values, origin, problems)
    if config is not None:
        rules = (check_config, check_paths, *checks)
        findings = [finding for rule in rules for finding in rule(config) if finding.key not in wrong]
        problems += [Problem(f.what, _where(f.key, origin), f.fix) for f in findings]
    if problems or config is None:
        raise ConfigError.from_problems(problems)
    default_name = source.stem if isinstance(source, Path) else "run"
    return LoadedConfig(config, _complete_origin(config, origin), name or default_name)


def _validate(
    values: dict[str, Any], origin: Mapping[str, str], problems: list[Problem]
) -> tuple[Config | None, set[str]]:
    """Return the configuration and the keys whose values were wrong; these have their defaults in it.

    With the defaults in their place, rules about the other keys can still be checked, so that
    all problems come at once. None where a required key is wrong.
    """
    try:
        return Config.model_validate(values), set()
    except ValidationError as error:
        problems += _describe_errors(error.errors(), origin)
        wrong = {_dotted_field(each["loc"]) for each in error.errors()}
    rest = copy.deepcopy(values)
    for key in wrong:
        _remove_dotted(rest, key)
    try:
        return Config.model_validate(rest), wrong
    except ValidationError:
        return None, wrong


def _remove_dotted(values: Any, key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(last, None)


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML that `load_config` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def _read_source(source: Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, int], list[Problem]]:
    if source is None:
        return {}, {}, []
    if not isinstance(source, Path):
        return copy.deepcopy(dict(source)), {}, []
    document = parse_yaml(read_config_text(source), str(source))
    if document.problems:
        raise ConfigError.from_problems(document.problems)
    if not isinstance(document.value, dict):
        got = "nothing" if document.value is None else type(document.value).__name__
        raise ConfigError(
            f"expected sections (model:, data:, ...), got {got}",
            where=str(source),
            fix="start from a recipe: loralab init gpt2-alpaca",
        )
    return document.value, document.lines, []


def read_config_text(path: Path) -> str:
    """Return the text of a configuration file.

    Raises:
        ConfigError: it is missing, a folder, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = nearest_name(path.name, siblings)
        hint = f"did you mean {str(path.parent / near)!r}?" if near else "write one with: loralab init gpt2-alpaca"
        raise ConfigError(f"no such file: {str(path)!r}", where="argument CONFIG", fix=hint) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text (byte {error.start})", where=str(path), fix="save it as UTF-8") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot read {str(path)!r}: {reason}", where="argument CONFIG", fix="give a YAML file"
        ) from None


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any], origin: dict[str, str]
) -> list[Problem]:
    problems: list[Problem] = []
    if isinstance(overrides, Mapping):
        for key, value in _flatten(overrides).items():
            if not _set_dotted(values, key, value):
                problems.append(Problem(f"{key!r} goes below a single value", "argument overrides", "use section.key"))
            _set_origin(origin, key, value, "argument")
        return problems
    for text in overrides:
        key, equals, raw = text.partition("=")
        where = f"command line: {text}"
        if not equals or not key.strip():
            problems.append(Problem(f"not an override: {text!r}", where, "write section.key=value"))
            continue
        value = _read_argument(key.strip(), raw)
        if not _set_dotted(values, key.strip(), value):
            problems.append(Problem(f"{key!r} goes below a single value", where, "write section.key=value"))
        _set_origin(origin, key.strip(), value, "command line")
    return problems


def _set_origin(origin: dict[str, str], key: str, value: Any, place: str) -> None:
    """Note where a key's value came from, and no longer where those came from that it replaced."""
    for stale in [known for known in origin if known.startswith(f"{key}.")]:
        del origin[stale]
    origin[key] = place
    if isinstance(value, Mapping):
        origin.update(dict.fromkeys(_given_keys(value, f"{key}."), place))


def _read_argument(key: str, raw: str) -> Any:
    """Read the value of an override; one for a setting that takes text alone is text, whatever it looks like."""
    if "#" in raw:  # a shell argument has no comments: what follows a # is part of the value
        return raw
    try:
        value = parse_scalar(raw)
    except (yaml.YAMLError, ValueError, RecursionError):
        return raw
    field = field_by_key(key)
    kinds = _kinds(field.annotation) if field else ()
    if str not in kinds or isinstance(value, (str, *(typing.get_origin(kind) or kind for kind in kinds))):
        return value
    return None if value is None and type(None) in kinds else raw


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> bool:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            return False
    values[last] = value
    return True


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and dotted.count(".") < 1:
            flat.update(_flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def _given_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of all fields that a mapping gives; of a section, those of its fields."""
    keys: list[str] = []
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        inner = isinstance(value, Mapping) and (not prefix or _is_section(dotted))
        keys += _given_keys(value, f"{dotted}.") if inner else [dotted]
    return keys


def _is_section(key: str) -> bool:
    field = field_by_key(key)
    return field is not None and section_of(field.annotation) is not None


def _where(key: str, origin: Mapping[str, str]) -> str:
    probe = key
    while probe:
        if probe in origin:
            place = origin[probe]
            file_name, _, line = place.rpartition(":")
            return f"{file_name} line {line}, key {key}" if line.isdigit() else f"{place}, key {key}"
        probe = probe.rpartition(".")[0]
    return f"key {key}"


def _describe_errors(errors: Sequence[ErrorDetails], origin: Mapping[str, str]) -> list[Problem]:
    grouped: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_dotted_field(error["loc"]), []).append(error)
    return [_describe_field(key, group, origin) for key, group in grouped.items()]


def _dotted_field(location: Sequence[str | int]) -> str:
    """Return the dotted key of an error's location, without the names of union members behind it."""
    model: type[BaseModel] | None = Config
    parts: list[str] = []
    for part in location:
        if model is None:
            break
        parts.append(str(part))
        field = model.model_fields.get(str(part))
        model = section_of(field.annotation) if field else None
    return ".".join(parts)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class that an annotation (`X` or `X | None`) names, or None."""
    return next((o for o in _kinds(annotation) if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _describe_field(key: str, errors: Sequence[ErrorDetails], origin: Mapping[str, str]) -> Problem:
    first, where = errors[0], _where(key, origin)
    if first["type"] == "extra_forbidden":
        return Problem(f"unknown key: {key!r}", where, _suggest_key(key))
    if first["type"] == "missing":
        section, _, name = key.rpartition(".")
        return Problem(
            f"missing key: {key!r}",
            where,
            f"add it: {section + ': {' if section else ''}{name}: ...{'}' if section else ''}",
        )
    inside = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    if inside is not None:  # of a section within a list
        name = str(inside["loc"][-1])
        return Problem(f"unknown key in {key}: {name!r}", where, suggest(name, DataSource.model_fields))
    wanted = " or ".join(dict.fromkeys(_lower_first(error["msg"]) for error in errors))
    choices = [name for e in errors for name in _CHOICE.findall(e.get("ctx", {}).get("expected", ""))]
    near = nearest_name(str(first["input"]), choices) if choices else None
    hint = f"did you mean {near!r}? " if near else ""
    return Problem(f"{key} got {first['input']!r}: {wanted}", where, f"{hint}{key}: {describe_field(key)}")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def field_by_key(key: str) -> Any:
    """Return the pydantic field of a dotted key, or None where there is none."""
    model: type[BaseModel] | None = Config
    field = None
    for part in key.split("."):
        field = model.model_fields.get(part) if model else None
        model = section_of(field.annotation) if field else None
    return field


def describe_field(key: str) -> str:
    """Return the one-sentence description of the field at a dotted key ("" where there is none)."""
    field = field_by_key(key)
    return (field.description or "") if field else ""


def schema_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return the dotted keys of all fields that hold a value, in the order of declaration."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        keys += schema_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def _suggest_key(key: str) -> str:
    section, _, name = key.rpartition(".")
    if name in OTHER_NAMES:
        return f"here it is {OTHER_NAMES[name]!r}"
    known = schema_keys()
    known += dict.fromkeys(parent for k in known if "." in (parent := k.rpartition(".")[0]))  # sections in sections
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    if same_name:
        return f"did you mean {same_name[0]!r}?"
    siblings = _names_in(section)
    near = nearest_name(name, siblings)
    # A key of another section has to be more alike than one beside it.
    anywhere = nearest_name(name, [*Config.model_fields, *(k.rpartition(".")[2] for k in known)], cutoff=0.75)
    if anywhere and anywhere != near and anywhere not in Config.model_fields:
        return f"did you mean {next(k for k in known if k.endswith('.' + anywhere))!r}?"
    if near:
        return f"did you mean {near!r}?"
    return f"known in {section or 'the file'}: {', '.join(siblings)}"


def _names_in(section: str) -> list[str]:
    """Return the names of all fields of a section, of the whole file for "" and for one that does not exist."""
    field = field_by_key(section)
    return list(((section_of(field.annotation) if field else None) or Config).model_fields)


def _complete_origin(config: Config, origin: Mapping[str, str]) -> dict[str, str]:
    complete = {}
    for key in _flatten_fields(config):
        probe = key
        # A section that was given gives its other fields no value.
        while probe and (probe not in origin or (probe != key and _is_section(probe))):
            probe = probe.rpartition(".")[0]
        complete[key] = origin[probe] if probe else "default"
    return complete


def _flatten_fields(model: BaseModel, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        keys += _flatten_fields(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [f"{prefix}{name}"]
    return keys
