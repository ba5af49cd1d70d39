"""The commands that train: `train`, and `replay`, which trains again."""

import json
from pathlib import Path
from typing import Annotated

import typer

from loralab.cli.application import print_json, result_alone_on_stdout
from loralab.console import ConsoleReporter, speaks
from loralab.errors import ConfigError
from loralab.options import AsJson, Overrides, RecordedRun, usable_path


def _start_path(text: str) -> Path:
    if not text:  # as from an unset variable; as a path it would be the current folder
        raise ConfigError(
            "no path: ''", where="option --warm-start", fix="give a run or adapter folder, or leave the option out"
        )
    return Path(text)


CONFIG_ARGUMENT = typer.Argument(
    metavar="CONFIG", help="YAML file, or the run folder to go on with.", callback=usable_path
)
WarmStart = Annotated[
    Path | None,
    typer.Option(
        "--warm-start",
        help="Start from the weights of this run or adapter.",
        metavar="<path>",
        parser=_start_path,
        callback=usable_path,
    ),
]


def check_train_options(*, resume: bool, overwrite: bool) -> None:
    """Refuse options of `train` that exclude each other.

    Raises:
        ConfigError: both were given.
    """
    if resume and overwrite:
        raise ConfigError(
            "--resume and --overwrite exclude each other", where="command line", fix="keep the one that you mean"
        )


def run_source(config: Path, overrides: list[str] | None) -> tuple[Path, list[str]]:
    """Return the configuration file of the argument CONFIG, and the overrides on top of it."""
    chosen = list(overrides or [])
    if (config / "config.yaml").is_file():  # a run folder, which may have been moved or copied
        return config / "config.yaml", [f"output.dir={config.absolute()}", *chosen]
    return config, chosen


def train(
    config: Annotated[Path, CONFIG_ARGUMENT],
    overrides: Overrides = None,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    warm_start: WarmStart = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter: configuration in, run folder out."""
    from loralab.workflows.configure import load_run_config

    check_train_options(resume=resume, overwrite=overwrite)
    loaded = load_run_config(*run_source(config, overrides))
    from loralab.workflows.train import train as run_training

    with result_alone_on_stdout():
        folder = run_training(
            loaded, reporter=ConsoleReporter(), resume=resume, overwrite=overwrite, warm_start=warm_start
        )
    if not speaks():
        return
    if as_json:
        print_json(json.loads(folder.record.read_text(encoding="utf-8")))
    else:
        print(folder.path)


def replay(
    run: RecordedRun,
    overrides: Overrides = None,
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="Exit with 3 where adapter or losses differ, and name what does.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of the replay; by default beside RUN.", callback=usable_path),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recorded run again, into a new folder, and compare the adapters."""
    from loralab.workflows.replay import check_replay
    from loralab.workflows.replay import replay as run_replay

    with result_alone_on_stdout():
        result = run_replay(run, output=output, overrides=overrides or (), verify=verify, reporter=ConsoleReporter())
    if as_json:
        print_json(result)
    else:
        for name in ("run", "replay"):
            print(f"{name + ':':<8}{result['adapter_sha256'][name]}  {result[name]}")
    if verify:
        check_replay(result)
        if not as_json:
            print(f"equal: the adapter and {result['compared_losses']} losses, to the last bit")
