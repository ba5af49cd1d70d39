"""The arguments and options that several commands share.

Owns their types and help texts. An option that stands for a setting is declared from the
configuration's own field, never twice. No torch here.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from loralab.config.load import describe_field
from loralab.config.paths import check_path


def usable_path(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Return the path that an argument or option gave, if it can be one.

    Raises:
        ConfigError: it cannot.
    """
    name = str(param.name)
    where = f"option --{name.replace('_', '-')}" if param.param_type_name == "option" else f"argument {name.upper()}"
    return value if value is None else check_path(value, where=where)


Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, on top of the configuration.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or an adapter folder.", callback=usable_path)]
RecordedRun = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", callback=usable_path)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]

# How answers are made; the settings' own defaults are those of `GenerationSettings`, which needs torch.
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus of sampled tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
System = Annotated[
    str | None,
    typer.Option("--system", help="System message; by default the prompt contract's, and '' sends none."),
]

# The options that stand for a setting: name and help are the field's own.
SETTINGS = {
    "batch_size": "evaluation.batch_size",
    "max_length": "data.max_length",
    "device": "model.device",
    "max_new_tokens": "evaluation.max_new_tokens",
    "split": "evaluation.split",
    "model": "model.name",
    "metrics": "evaluation.metrics",
    "answer_by": "evaluation.answer_by",
}


def schema_option(name: str) -> Any:
    """Return the option for a setting in `SETTINGS`."""
    key = SETTINGS[name]
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{describe_field(key)} ({key})", show_default=False)


BatchSize = Annotated[int | None, schema_option("batch_size")]
MaxLength = Annotated[int | None, schema_option("max_length")]
Device = Annotated[str | None, schema_option("device")]
Split = Annotated[str | None, schema_option("split")]
MaxNewTokens = Annotated[int | None, schema_option("max_new_tokens")]
Metrics = Annotated[str | None, schema_option("metrics")]
AnswerBy = Annotated[str | None, schema_option("answer_by")]
BaseModel = Annotated[str | None, schema_option("model")]


def option_overrides(given: list[str] | None, **options: Any) -> list[str]:
    """Return overrides as given, then those of options that stand for a setting and were used."""
    return [*(given or []), *(f"{SETTINGS[name]}={value}" for name, value in options.items() if value is not None)]
