"""The settings as a page to read: one table for each section, from the schema alone.

Owns the words for types and bounds. Does not own what a setting means, which its field says (`schema.py`).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from loralab.config.checks import SCHEDULE_TERMS, TRAINER_ARGS
from loralab.config.schema import Config

_HEAD = """# Settings

Every setting of a configuration file: `section: {key: value}` in YAML, `section.key=value` on the command line. Unknown
keys are errors. This page is what `loralab schema --markdown` prints; `loralab schema` gives the same as a JSON schema,
for editors that complete YAML.
"""
_PLAIN = {"string": "text", "boolean": "`true`, `false`", "null": "`null`", "integer": "integer", "number": "number"}


def render_reference() -> str:
    """Return the reference of all settings as Markdown, one table for each section."""
    schema = Config.model_json_schema()
    return "\n".join([_HEAD, *_sections(schema, schema, ""), _trainer_args()])


def _trainer_args() -> str:
    """Return the allow-list of `advanced.trainer_args` as a table."""
    terms = "; ".join(f"{schedule}: {', '.join(known)}" for schedule, known in SCHEDULE_TERMS.items())
    reasons = {**TRAINER_ARGS, "lr_scheduler_kwargs": f"{TRAINER_ARGS['lr_scheduler_kwargs']} ({terms})"}
    rows = "".join(f"| `advanced.trainer_args.{name}` | {reason} |\n" for name, reason in reasons.items())
    return f"What may be passed through:\n\n| key | what it is |\n|---|---|\n{rows}"


def _sections(schema: Mapping[str, Any], model: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield one heading and table for each section, sections within sections after their own."""
    inner: list[tuple[str, Mapping[str, Any]]] = []
    lines: list[str] = []
    for name, node in model["properties"].items():
        section = _section(schema, node)
        if section is not None:
            inner.append((f"{prefix}{name}", section))
        if section is None or "default" in node:  # null, where a section may be left out
            lines.append(_row(schema, f"{prefix}{name}", node, required=name in model.get("required", ())))
    if lines:
        yield "| key | value | default | what it does |\n|---|---|---|---|"
        yield "\n".join(lines) + "\n"
    for key, section in inner:
        yield f"## `{key}`\n\n{section['description'].splitlines()[0]}\n"
        yield from _sections(schema, section, f"{key}.")


def _section(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the section that a key holds (`X` or `X | None`), or None where it holds a value."""
    named = [node, *node.get("anyOf", ())]
    reference = next((entry["$ref"] for entry in named if "$ref" in entry), None)
    found: Mapping[str, Any] | None = None if reference is None else _resolve(schema, reference)
    return found


def _resolve(schema: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return found


def _row(schema: Mapping[str, Any], key: str, node: Mapping[str, Any], *, required: bool) -> str:
    default = "required" if required else f"`{json.dumps(node.get('default', _empty(node)), ensure_ascii=False)}`"
    cells = (f"`{key}`", _value(schema, node), default, node["description"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _empty(node: Mapping[str, Any]) -> list[object] | dict[str, object]:
    """Return the default of a field that makes a new, empty value each time."""
    return [] if node.get("type") == "array" else {}


def _value(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return in words what a key takes."""
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_value(schema, entry) for entry in node["anyOf"]))
    if "$ref" in node:
        return f"{{{', '.join(_resolve(schema, node['$ref'])['properties'])}}}"
    if "const" in node or "enum" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        return f"list of {_value(schema, node['items'])}"
    if node.get("type") == "object":
        values = node.get("additionalProperties")
        return f"mapping to {_value(schema, values)}" if isinstance(values, dict) and values else "mapping"
    return f"{_PLAIN[node['type']]}{_bounds(node)}" if "type" in node else "any value"


def _bounds(node: Mapping[str, Any]) -> str:
    """Return the range of a number, as it stands behind the word for it."""
    words = [
        f"{text} {int(node[name]) if node[name] == int(node[name]) else node[name]}"
        for name, text in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if name in node
    ]
    return f" {' and '.join(words)}" if words else ""
