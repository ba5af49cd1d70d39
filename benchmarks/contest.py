"""Runs contenders on the same rows, in turn, each in a process of its own.

Owns the table of contenders, their processes and what is made of their results.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matrix_rate import linear_parameters
from peers.job import Job
from workloads import PreparedRows, Workload, build_model, prepare_rows

HERE = Path(__file__).resolve().parent
RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        script: below `peers/`.
        options: what tells it from others of the same script.
        environment: name of its own Python environment; None takes this one.
    """

    script: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str | None = None


CONTENDERS = {
    "loralab": Contender("train_loralab.py"),
    "loralab_packed": Contender("train_loralab.py", {"layout": "packed"}),
    "trl": Contender("train_trl.py"),
    "trl_best": Contender("train_trl.py", {"best": True}),
    "trl_by_length": Contender("train_trl.py", {"best": True, "unpacked": True}),
    "plain": Contender("train_plain.py"),
    "litgpt": Contender("train_litgpt.py", environment="litgpt"),
    "torchtune": Contender("train_torchtune.py", environment="torchtune"),
    "llamafactory": Contender("train_llamafactory.py", environment="llamafactory"),
    "ms_swift": Contender("train_ms_swift.py", environment="ms_swift"),
}


@dataclass(frozen=True)
class Settings:
    """How the contest is held.

    Attributes:
        data: folder of rows and tokenizers; None has the demo's alone.
        work: folder of models, rows and runs.
        environments: folder of the contenders' own Python environments, or None.
        threads: of every contender.
        repeats: runs of each.
        rows: how many rows; None takes the workload's own number.
        base_dropout: off or as_configured.
        time_limit: seconds of one run.
    """

    data: Path | None
    work: Path
    environments: Path | None
    threads: int
    repeats: int
    rows: int | None
    base_dropout: str
    time_limit: float


def environment(threads: int) -> dict[str, str]:
    """Return the variables of a contender's process: its threads, and no network."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    return os.environ | offline | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def python_of(contender: Contender, settings: Settings) -> Path | None:
    """Return the interpreter of a contender, or None where its environment is missing."""
    if contender.environment is None:
        return Path(sys.executable)
    if settings.environments is None:
        return None
    python = settings.environments / contender.environment / "bin" / "python"
    return python if python.exists() else None


def run_in_group(command: Sequence[str], *, log: Path, settings: Settings) -> int | None:
    """Run a command beside its log; return its exit code, or None where it was stopped at the time limit.

    It leads a process group of its own, so that what it has started ends with it, on Ctrl-C too.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(settings.threads),
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        return process.wait(settings.time_limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_contender(name: str, job: Job, *, settings: Settings) -> dict[str, Any]:
    """Train one epoch in a new process; return its result, or `cannot_run` with the reason in one line."""
    contender, work = CONTENDERS[name], Path(job.work)
    python = python_of(contender, settings)
    if python is None:
        made = f"python benchmarks/peers/environments.py {contender.environment} --into FOLDER"
        return {"cannot_run": f"no environment of its own ({made}, then --environments FOLDER)"}
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    result, log = work / "result.json", work / "log.txt"
    job.launched_at = time.time()
    (work / "job.json").write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
    command = [str(python), str(HERE / "peers" / contender.script), str(work / "job.json"), str(result)]
    started = time.perf_counter()
    code = run_in_group(command, log=log, settings=settings)
    if code is None:
        return {"cannot_run": f"not done after {settings.time_limit:.0f} s"}
    wall_seconds = time.perf_counter() - started
    if code or not result.is_file():
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return {"cannot_run": f"exit code {code}: {lines[-1][:300] if lines else 'no output'} (see {log})"}
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found if "cannot_run" in found else found | {"wall_seconds": wall_seconds}


def matrix_rate(model: Path, *, tokens: int, precision: str, threads: int) -> dict[str, float]:
    """Return the machine's matrix rates in GFLOP/s, measured in a process of its own."""
    command = [sys.executable, str(HERE / "matrix_rate.py"), "--model", str(model), "--tokens", str(tokens)]
    command += ["--precision", precision, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(threads))
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def quantized_gradients(model: Path, rows: Path, *, threads: int) -> list[dict[str, Any]]:
    """Return what `qlora_gradients.py` finds, in a process of its own."""
    command = [sys.executable, str(HERE / "qlora_gradients.py"), "--model", str(model), "--rows", str(rows)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(threads))
    if done.returncode:
        return [{"error": done.stderr.strip().splitlines()[-1]}]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def build_job(name: str, workload: Workload, *, rows: PreparedRows, model: Path, settings: Settings) -> Job:
    """Return what a contender is given."""
    return Job(
        model=str(model),
        rows=str(rows.ordered),
        unordered_rows=str(rows.unordered),
        end=rows.end,
        batch=workload.batch,
        steps=rows.steps,
        max_length=workload.max_length,
        r=RANK,
        alpha=ALPHA,
        targets=list(workload.targets),
        learning_rate=workload.learning_rate,
        precision=workload.precision,
        quantization=workload.quantization,
        base_dropout=settings.base_dropout,
        grouped=workload.grouped,
        threads=settings.threads,
        launched_at=0.0,
        work=str(settings.work / "runs" / rows.ordered.parent.name / name),
        options=dict(CONTENDERS[name].options),
    )


def hold(key: str, workload: Workload, *, names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run every contender `repeats` times in turn; return the figures of the workload.

    Who goes first changes from repeat to repeat; one that cannot run is not tried again.
    """
    model = build_model(workload, data=settings.data, work=settings.work, base_dropout=settings.base_dropout)
    rows = prepare_rows(
        workload, data=settings.data, model=model, folder=settings.work / "rows" / key, limit=settings.rows
    )
    jobs = {name: build_job(name, workload, rows=rows, model=model, settings=settings) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    rates = []
    gradients = []
    if workload.quantization != "none":  # equal gradients first: speed without them would say nothing
        gradients = quantized_gradients(model, rows.ordered, threads=settings.threads)
        print("\n".join(f"{key}: {json.dumps(line)}" for line in gradients), flush=True)
    for repeat in range(settings.repeats):
        turn = repeat % len(names)
        for name in [*names[turn:], *names[:turn]]:
            if name in failed:
                continue
            found = run_contender(name, jobs[name], settings=settings)
            if "cannot_run" in found:
                failed[name] = found["cannot_run"]
                print(f"{key}: {name} does not run: {failed[name]}", flush=True)
                continue
            runs[name].append(found)
            rate = rows.tokens / found["train_seconds"]
            print(f"{key}: repeat {repeat + 1}, {name}: {rate:,.0f} tokens/s", flush=True)
        per_step = max(rows.tokens // rows.steps, 1)
        rates.append(matrix_rate(model, tokens=per_step, precision=workload.precision, threads=settings.threads))
    found = summarize(key, workload, rows=rows, model=model, runs=runs, failed=failed, rates=rates)
    return found | {"gradients": gradients}


def summarize(
    key: str,
    workload: Workload,
    *,
    rows: PreparedRows,
    model: Path,
    runs: dict[str, list[dict[str, Any]]],
    failed: dict[str, str],
    rates: list[dict[str, float]],
) -> dict[str, Any]:
    """Return medians, ratios, shares of the matrix rate and how far losses differ."""
    rate = {name: statistics.median(each[name] for each in rates) for name in ("square", "model")}
    parameters = linear_parameters(model)
    contenders = {
        name: _figures(found, rows, rate=rate["model"], parameters=parameters) for name, found in runs.items() if found
    }
    reference = contenders.get("loralab")
    for name, figures in contenders.items():
        if reference is None:
            continue
        pairs = [b / a for a, b in zip(_train_seconds(runs["loralab"]), _train_seconds(runs[name]), strict=False)]
        figures["loralab_is_faster_by"] = [min(pairs), statistics.median(pairs), max(pairs)]
        for loss in ("first_loss", "mean_loss"):
            figures[f"{loss}_difference"] = abs(figures[loss] - reference[loss]) / reference[loss]
    return {
        "workload": key,
        "title": workload.title,
        "rows": sum(1 for _ in rows.ordered.open(encoding="utf-8")),
        "batch": workload.batch,
        "steps": rows.steps,
        "tokens": rows.tokens,
        "supervised_tokens": rows.supervised,
        "longest_row": rows.longest,
        "rows_left_out": rows.left_out,
        "frozen_linear_parameters": parameters,
        "matrix_gflops": rate,
        "matrix_gflops_of_repeats": rates,
        "contenders": contenders,
        "cannot_run": failed,
    }


def _train_seconds(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [run["train_seconds"] for run in runs]


def _figures(runs: Sequence[dict[str, Any]], rows: PreparedRows, *, rate: float, parameters: int) -> dict[str, Any]:
    speeds = [rows.tokens / seconds for seconds in _train_seconds(runs)]
    first = runs[0]
    weights = first["step_tokens"] or rows.step_supervised
    losses = first["losses"]
    # One loss for each step is what the mean is of; a contender that logs otherwise gets a plain mean.
    weights = weights if len(weights) == len(losses) else [1] * len(losses)
    figures: dict[str, Any] = {
        "tokens_per_second": statistics.median(speeds),
        "range": [min(speeds), max(speeds)],
        "first_loss": losses[0],
        "mean_loss": sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights),
        "supervised_tokens": first["supervised_tokens"],
        "layout_tokens": first["layout_tokens"],
        "versions": first["versions"],
        "notes": first["notes"],
        "runs": list(runs),
    }
    for name in ("train_seconds", "start_seconds", "wall_seconds", "peak_rss_bytes", "peak_anonymous_bytes"):
        figures[name] = statistics.median(run[name] for run in runs)
    if first["layout_tokens"]:
        work = 4.0 * parameters * first["layout_tokens"]
        figures["share_of_matrix_rate"] = work / figures["train_seconds"] / 1e9 / rate
    return figures
