"""The command line: arguments in, exit code out.

Owns options, exit codes and what is printed. Each command imports its workflow when it runs,
so that help and configuration errors never wait for torch.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from loralab.config.schema import Config
from loralab.console import (
    ClosedOutput,
    ConsoleReporter,
    ResultConsole,
    discard,
    nobody_reads,
    speaks,
    tolerate_characters,
)
from loralab.errors import ConfigError, LoralabError
from loralab.options import (
    AsJson,
    BaseModel,
    BatchSize,
    Device,
    MaxLength,
    MaxNewTokens,
    Overrides,
    RunPath,
    Split,
    option_overrides,
    usable_path,
)
from loralab.run import render_json

# What a shell gives for a process that ended because nobody reads its output (128 + SIGPIPE).
CLOSED_OUTPUT_CODE = 141


class _Commands(TyperGroup):
    """The commands; a closed stdout comes out as `ClosedOutput`, not as an exit code that means a bug."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the arguments; `--help` prints here."""
        with _watching_output():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _watching_output():
            return super().invoke(ctx)


@contextmanager
def _watching_output() -> Iterator[None]:
    try:
        yield
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()
    except BrokenPipeError as error:
        if nobody_reads(sys.stdout):
            raise ClosedOutput from None
        # typer would take any broken pipe for the output's, and end without a word.
        raise RuntimeError("the pipe to another process broke") from error
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how rich, which writes the help, ends
            raise ClosedOutput from None
        raise


app = typer.Typer(
    cls=_Commands,
    name="loralab",
    help="LoRA fine-tuning that proves what it claims: train, evaluate, compare, use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_json(value: Any) -> None:
    text = render_json(value)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # replacement characters would change the values; JSON has escapes
        text = json.dumps(json.loads(text), indent=2)
    print(text)


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option("--output", help="Run folder; replaced when it holds an earlier demo.", callback=usable_path),
    ] = Path("runs/demo"),
) -> None:
    """Run the whole pipeline on an embedded model and data set, offline, in about a minute."""
    from loralab.workflows.demo import run_demo

    folder, lines = run_demo(output, reporter=ConsoleReporter())
    for line in lines:
        print(line)
    print(f"report: {folder.report.absolute()}")


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from loralab.workflows.recipes import list_recipes

    found = list_recipes()
    if as_json:
        _print_json(found)
        return
    table = Table("recipe", "what it does")
    for name, summary in found.items():
        table.add_row(name, summary)
    ResultConsole().print(table)


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; `loralab recipes` lists them.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="File to write; RECIPE.yaml by default.", callback=usable_path),
    ] = None,
) -> None:
    """Write a recipe as a commented YAML file."""
    from loralab.workflows.recipes import write_recipe

    path = write_recipe(recipe, output)
    print(f"wrote {path}; next: loralab train {path} data.train=YOUR_FILE")


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    _print_json(Config.model_json_schema())


def _start_path(text: str) -> Path:
    if not text:  # as from an unset variable; as a path it would be the current folder
        raise ConfigError(
            "no path: ''", where="option --warm-start", fix="give a run or adapter folder, or leave the option out"
        )
    return Path(text)


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML file, or the run folder to go on with.", callback=usable_path),
    ],
    overrides: Overrides = None,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    warm_start: Annotated[
        Path | None,
        typer.Option(
            "--warm-start",
            help="Start from the weights of this run or adapter.",
            metavar="<path>",
            parser=_start_path,
            callback=usable_path,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter: configuration in, run folder out."""
    from loralab.workflows.configure import load_run_config

    if resume and overwrite:
        raise ConfigError(
            "--resume and --overwrite exclude each other", where="command line", fix="keep the one that you mean"
        )
    chosen, source = list(overrides or []), config
    if (config / "config.yaml").is_file():  # a run folder, which may have been moved or copied
        source, chosen = config / "config.yaml", [f"output.dir={config.absolute()}", *chosen]
    loaded = load_run_config(source, chosen)
    from loralab.workflows.train import train as run_training

    folder = run_training(loaded, reporter=ConsoleReporter(), resume=resume, overwrite=overwrite, warm_start=warm_start)
    if not speaks():
        return
    if as_json:
        _print_json(json.loads(folder.record.read_text(encoding="utf-8")))
    else:
        print(folder.path)


@app.command()
def replay(
    run: RunPath,
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

    result = run_replay(run, output=output, overrides=overrides or (), verify=verify, reporter=ConsoleReporter())
    if as_json:
        _print_json(result)
    else:
        for name in ("run", "replay"):
            print(f"{name + ':':<8}{result['adapter_sha256'][name]}  {result[name]}")
    if verify:
        check_replay(result)
        if not as_json:
            print(f"equal: the adapter and {result['compared_losses']} losses, to the last bit")


@app.command(name="eval")
def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run folder, or an adapter folder.", callback=usable_path),
    ] = None,
    overrides: Overrides = None,
    *,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="The same as RUN, as an option.", callback=usable_path)
    ] = None,
    model: BaseModel = None,
    data: Annotated[
        str | None, typer.Option("--data", help="File, saved data set or Hub id to evaluate on, instead of the run's.")
    ] = None,
    split: Split = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss and perplexity of base and adapter on a split."""
    if adapter is not None and run is not None and "=" in str(run):
        run, overrides = None, [str(run), *(overrides or [])]  # with --adapter, RUN's place holds an override
    target = _one_target(run, adapter)
    own_split = split if data is None else None  # of other data, `split` names one of its own
    chosen = option_overrides(overrides, batch_size=batch_size, max_length=max_length, device=device, split=own_split)
    from loralab.workflows.evaluate import evaluate as run_evaluation

    result = run_evaluation(
        target, overrides=chosen, base_model=model, data=data, data_split=split, reporter=ConsoleReporter()
    )
    if as_json:
        _print_json(result)
        return
    table = Table("", "base", "adapter")
    for name in ("eval_loss", "perplexity", "eval_loss_batch_mean", "supervised_tokens", "num_examples", "num_batches"):
        table.add_row(name, _figure(result["base"][name]), _figure(result[name]))
    console = ResultConsole()
    console.print(table)
    console.print(_difference(result["difference"]))


def _one_target(run: Path | None, adapter: Path | None) -> Path:
    given = [path for path in (run, adapter) if path is not None]
    if len(given) != 1:
        what = "two adapters given" if given else "no adapter given"
        raise ConfigError(what, where="arguments RUN, --adapter", fix="give one: loralab eval RUN, or --adapter DIR")
    return given[0]


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _difference(difference: dict[str, Any]) -> str:
    text = f"adapter - base: {difference['eval_loss']:+.4f} nats per token"
    if difference["low"] is None:
        return text
    interval = f"{difference['level']:.0%} interval {difference['low']:+.4f} to {difference['high']:+.4f}"
    verdict = "" if difference["low"] > 0 or difference["high"] < 0 else "; no difference seen"
    return f"{text}, {interval}{verdict}"


@app.command()
def generate(
    run: RunPath,
    overrides: Overrides = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A user turn; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="File with one prompt per line.", callback=usable_path)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message before every prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Let the base model answer too.")] = False,
    model: BaseModel = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus of sampled tokens.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prompt the adapter under its prompt contract."""
    from loralab.workflows.prompts import read_prompts

    prompts = read_prompts(prompt or [], file, None if sys.stdin is None or sys.stdin.isatty() else sys.stdin)
    from loralab.evaluation.generate import GenerationSettings
    from loralab.workflows.generate import generate as run_generation

    results = run_generation(
        run,
        prompts,
        settings=GenerationSettings(temperature=temperature, top_p=top_p, seed=seed),
        system=system,
        with_base=base,
        overrides=option_overrides(overrides, device=device, max_new_tokens=max_new_tokens),
        base_model=model,
        reporter=ConsoleReporter(),
    )
    if as_json:
        _print_json({"answers": results})
        return
    for result in results:
        _print_answer(result, labelled=base or len(results) > 1)


def _print_answer(result: dict[str, Any], *, labelled: bool) -> None:
    if not labelled:
        print(result["adapter"]["text"])
        return
    print(f"=== {result['prompt']}")
    if "base" in result:
        print(f"--- base\n{result['base']['text']}\n--- adapter")
    print(f"{result['adapter']['text']}\n")


@app.command()
def report(run: RunPath) -> None:
    """Rebuild plots, page and model card from the run folder."""
    from loralab.run import open_run
    from loralab.workflows.report import build_report

    folder = open_run(run)
    build_report(folder)
    print(folder.report)


def main() -> None:
    """Run the command line and exit with its code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("loralab").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses
    tolerate_characters()
    try:
        app()
    except LoralabError as error:
        ConsoleReporter.close()
        if speaks(error):
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except ClosedOutput:
        ConsoleReporter.close()
        discard(sys.stdout)
        sys.exit(CLOSED_OUTPUT_CODE)


if __name__ == "__main__":
    main()
