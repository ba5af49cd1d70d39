"""The Python interface: `train` and the `Run` that it returns.

Owns nothing but the shape of the interface; the workflows do the work.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.config.paths import check_path
from loralab.errors import ConfigError
from loralab.evaluation.generate import GenerationSettings
from loralab.progress import Reporter
from loralab.run import Json, RunFolder, open_run, read_json, read_metrics
from loralab.workflows.compare import ComparisonRequest
from loralab.workflows.compare import compare as compare_workflow
from loralab.workflows.configure import load_run_config
from loralab.workflows.evaluate import evaluate as evaluate_workflow
from loralab.workflows.generate import generate as generate_workflow
from loralab.workflows.train import train as train_workflow


class Run:
    """A finished run.

    Args:
        path: the run folder.

    Raises:
        ConfigError: no path can be like that.
        RunFolderError: there is no run in that folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder: RunFolder = open_run(check_path(Path(path), where="argument path"))

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def record(self) -> Json:
        """The content of `run.json`."""
        return read_json(self.folder.record)

    @property
    def metrics(self) -> list[Json]:
        """The lines of `metrics.jsonl`."""
        return read_metrics(self.folder.metrics)

    @property
    def preference(self) -> Json | None:
        """The content of `preference.json`, the result of a blind preference test; None where nobody has judged."""
        return read_json(self.folder.preference) if self.folder.preference.is_file() else None

    def adapter(self) -> Path:
        """Return the adapter folder, in PEFT's layout."""
        return self.folder.adapter

    def evaluate(self, *, data: str | None = None, overrides: Sequence[str] = ()) -> Json:
        """Compare base and adapter on the run's own split, or on other data.

        Args:
            data: file, folder or Hub id instead of the run's split.
            overrides: `section.key=value` on top of the run's configuration.

        Returns:
            The content of `evaluation.json`.
        """
        return evaluate_workflow(self.path, overrides=overrides, data=data, reporter=Reporter())

    def compare(
        self,
        *,
        data: str | None = None,
        max_examples: int = 50,
        probe: str | None = None,
        with_probe: bool = True,
        overrides: Sequence[str] = (),
    ) -> Json:
        """Compare what base and adapter predict and answer, and what the adapter did to unrelated text.

        Args:
            data: file, folder or Hub id instead of the run's split.
            max_examples: most rows of it, evenly spread.
            probe: file of unrelated text; None takes the built-in texts.
            with_probe: whether unrelated text is measured.
            overrides: `section.key=value` on top of the run's configuration.

        Returns:
            The content of `comparison.json`.
        """
        request = ComparisonRequest(data=data, max_examples=max_examples, probe=probe, with_probe=with_probe)
        return compare_workflow(self.path, request, overrides=overrides, reporter=Reporter())

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[str | Path] = (),
    ) -> list[str]:
        """Answer prompts with the adapter.

        Args:
            prompts: one user turn, or several.
            max_new_tokens: longest answer, in tokens; None takes the run's own limit.
            temperature: 0 takes the most likely token.
            seed: of sampling.
            images: files of pictures that every prompt begins with.

        Returns:
            One answer per prompt, without its stop token.
        """
        chosen = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        shown = [str(image) for image in images]
        results = generate_workflow(self.path, chosen, settings=settings, images=shown, reporter=Reporter())
        return [result["adapter"]["text"] for result in results]


def train(
    config: str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    warm_start: str | Path | Run | None = None,
    reporter: Reporter | None = None,
    **overrides: Any,
) -> Run:
    """Train an adapter and evaluate it.

    Args:
        config: path of a YAML file, or its content as a nested mapping.
        resume: go on from the newest checkpoint of the output folder.
        overwrite: replace an earlier run in the output folder.
        warm_start: run, or run or adapter folder, whose weights the new run starts from.
        reporter: told of progress; silent by default.
        **overrides: sections (`training={"seed": 1}`) or dotted keys (`**{"training.seed": 1}`).

    Returns:
        The finished run.

    Raises:
        UserError: the configuration, data, model or folder cannot be used.
        StoppedBySignal: SIGINT or SIGTERM came; a checkpoint was written.
    """
    source = config if isinstance(config, Mapping) else check_path(Path(config), where="argument config")
    loaded = load_run_config(source, overrides)
    start = None if warm_start is None else _start_path(warm_start)
    folder = train_workflow(
        loaded, reporter=reporter or Reporter(), resume=resume, overwrite=overwrite, warm_start=start
    )
    return Run(folder.path)


def _start_path(value: object) -> Path:
    """Return the folder that `warm_start` names.

    Raises:
        ConfigError: it is no run and no path.
    """
    if isinstance(value, Run):
        return value.path
    if not isinstance(value, (str, Path)) or value == "":  # the empty path would be the current folder
        raise ConfigError(
            f"not a run or a path: {value!r}",
            where="argument warm_start",
            fix="give a Run, or the path of a run or adapter folder",
        )
    return check_path(Path(value), where="argument warm_start")
