"""A configuration with the rules of all layers, checked before anything heavy is imported.

Owns which checks run together. No torch here: configuration errors must be quick.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.config.load import LoadedConfig, load_config
from loralab.data.formats.table import check_format_names
from loralab.data.prompts.templates import check_template_name


def load_run_config(
    source: Path | Mapping[str, Any] | None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    name: str | None = None,
) -> LoadedConfig:
    """Read and check a configuration; see `load_config`."""
    return load_config(source, overrides, checks=(check_format_names, check_template_name), name=name)


def run_path(loaded: LoadedConfig) -> Path:
    """Return where the run folder goes."""
    return Path(loaded.config.output.dir or f"runs/{loaded.name}").expanduser()
