"""The commands that measure an adapter and show what was measured: `eval`, `report`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loralab.cli.application import print_json
from loralab.cli.evaluation_text import print_evaluations
from loralab.config.paths import check_path
from loralab.console import ConsoleReporter
from loralab.errors import ConfigError
from loralab.options import (
    AnswerBy,
    AsJson,
    BaseModel,
    BatchSize,
    Device,
    MaxLength,
    Metrics,
    Overrides,
    RecordedRun,
    Split,
    option_overrides,
    usable_path,
)


def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run folder, or an adapter folder.", callback=usable_path),
    ] = None,
    overrides: Overrides = None,
    *,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", help="An adapter, as RUN is; may be repeated, for a table of several."),
    ] = None,
    model: BaseModel = None,
    data: Annotated[
        str | None, typer.Option("--data", help="File, saved data set or Hub id to evaluate on, instead of the run's.")
    ] = None,
    split: Split = None,
    metrics: Metrics = None,
    answer_by: AnswerBy = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            help="File that gets every prompt, answer and score, one JSON object a line.",
            callback=usable_path,
        ),
    ] = None,
    blank_images: Annotated[
        bool,
        typer.Option("--blank-images", help="Measure the adapter once more with every picture grey: does it look?"),
    ] = False,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and task metrics of base and adapter on a split, with paired intervals."""
    if adapter and run is not None and "=" in str(run):
        run, overrides = None, [str(run), *(overrides or [])]  # with --adapter, RUN's place holds an override
    targets = _targets(run, [check_path(path, where="option --adapter") for path in adapter or []])
    chosen = option_overrides(
        overrides,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        split=split if data is None else None,  # of other data, it names one of its own
        metrics=_as_list(metrics),
        answer_by=answer_by,
    )
    from loralab.workflows.evaluate import evaluate_adapters

    results = evaluate_adapters(
        targets,
        overrides=chosen,
        base_model=model,
        data=data,
        data_split=split,
        predictions=predictions,
        blank_images=blank_images,
        reporter=ConsoleReporter(),
    )
    _show(targets, results, as_json=as_json)


def _show(targets: list[Path], results: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        named = [{"run": str(path), **result} for path, result in zip(targets, results, strict=True)]
        print_json(results[0] if len(results) == 1 else {"adapters": named})
        return
    print_evaluations([path.name or str(path) for path in targets], results)


def _as_list(metrics: str | None) -> str | None:
    """Return `a,b` in the form of a setting's list; auto stays as it is."""
    return metrics if metrics is None or metrics.strip() == "auto" else f"[{metrics.strip().strip('[]')}]"


def _targets(run: Path | None, adapters: list[Path]) -> list[Path]:
    given = [*([run] if run is not None else []), *adapters]
    if not given:
        raise ConfigError(
            "no adapter given",
            where="arguments RUN, --adapter",
            fix="give one: loralab eval RUN, or --adapter DIR, which may be repeated",
        )
    twice = [path for index, path in enumerate(given) if path.absolute() in [each.absolute() for each in given[:index]]]
    if twice:
        raise ConfigError(
            f"adapter {str(twice[0])!r} is given twice", where="arguments RUN, --adapter", fix="give it once"
        )
    from loralab.workflows.first_look import check_run

    for path in given:
        check_run(path)
    return given


def report(
    run: RecordedRun,
    *,
    methods: Annotated[
        bool,
        typer.Option(
            "--methods", help="Print a methods paragraph with the run's numbers, and BibTeX; nothing is written."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rebuild plots, page and model card from the run folder, or print a methods paragraph."""
    from loralab.run import open_run
    from loralab.workflows.first_look import check_no_merged
    from loralab.workflows.report import build_report, methods_of

    check_no_merged(run)
    folder = open_run(run)
    if methods:
        found = methods_of(folder)
        if as_json:
            print_json({"methods": found.text, "bibtex": found.bibtex})
        else:
            print(f"{found.text}\n\n{found.bibtex}")
        return
    build_report(folder)
    if as_json:
        print_json({"report": str(folder.report)})
    else:
        print(folder.report)
