"""Examples per second on questions about pictures: loralab, its own unshared layouts, TRL's SFTTrainer.

A random Qwen2-VL in bfloat16 (text hidden 512, 8 layers, 8/2 heads, MLP 2304; vision depth 8, width 448, 7 heads;
patch 14, merge 2; vocabulary 8,192, tied) learns answers of 12 tokens and a stop token to questions of 10 words about
512 x 512 pictures, a picture and its 9 questions a step. Same rows in the same steps, LoRA of rank 8 on all linear
layers of the text model, same optimizer. Contenders take turns, each run in a process of its own with its own peak
memory; medians over repeats, ratios within each repeat. A run's first step warms up and is not timed, and neither is
loralab_kept's encoding before it, which is stated. Labels and trained parameters must be equal and first losses within
0.3 %, or the exit code is 1. The vision tower's share of a step's operations is counted from shapes, beside
Qwen2-VL-2B's. Run it on an idle machine:

    python benchmarks/vision.py [--contenders NAME ...] [--steps 5] [--repeats 3] [--questions 9] [--threads N]
        [--time-limit 900] [--work FOLDER] [--out FILE.json]

Contenders: loralab, loralab_kept, loralab_unshared, loralab_copies, loralab_one_by_one, trl; `vision_contenders.py`
says what each does. Without --contenders all but loralab_one_by_one take part.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest_report import machine
from vision_contenders import CONTENDERS, SAYS, CannotRunError, check_steps, run_once, timed_seconds
from vision_flops import QWEN2_VL_2B, step_flops
from vision_model import ANSWER_TOKENS, PICTURE_SIDE, SHAPE, Prepared, build_model, prepare_rows

# Of first losses. Seen between contenders: 0.01 %; with another picture the loss of a step differs by 0.8 %.
LARGEST_DIFFERENCE = 0.003
# (slower, faster): how much faster is asked for.
WANTED = {
    ("loralab_unshared", "loralab"): 4.0,
    ("loralab_copies", "loralab"): 4.0,
    ("loralab_one_by_one", "loralab"): 4.0,
    ("trl", "loralab"): 8.0,
    ("loralab", "loralab_kept"): 1.5,
    ("trl", "loralab_kept"): None,
}
Runs = dict[str, list[dict[str, Any]]]


def read_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--steps", type=int, default=5, help="of a run, the first of which is not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=9, help="about each picture, and rows of a step")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--time-limit", type=float, default=900, help="seconds of one run")
    parser.add_argument("--work", type=Path, help="folder of model, rows and runs, kept; by default a temporary one")
    parser.add_argument("--out", type=Path, help="JSON file; by default below the current folder")
    arguments = parser.parse_args()
    check_steps(arguments.steps)
    return arguments


def hold(names: Sequence[str], rows: Prepared, arguments: argparse.Namespace, *, work: Path) -> tuple[Runs, dict]:
    """Run every contender in turn, who goes first changing; return the runs and why others cannot run."""
    runs: Runs = {name: [] for name in names}
    failed: dict[str, str] = {}
    for repeat in range(arguments.repeats):
        turn = repeat % len(names)
        for name in [*names[turn:], *names[:turn]]:
            if name in failed:
                continue
            try:
                found = run_once(
                    name,
                    rows,
                    model=work / "model",
                    work=work / "runs" / name,
                    threads=arguments.threads,
                    limit=arguments.time_limit,
                )
            except CannotRunError as error:
                failed[name] = str(error)
                print(f"{name} does not run: {error}", flush=True)
                continue
            runs[name].append(found)
            print(f"repeat {repeat + 1}, {name}: {_rate(found, rows):.2f} examples/s", flush=True)
    return {name: found for name, found in runs.items() if found and name not in failed}, failed


def summarize(runs: Runs, rows: Prepared) -> dict[str, Any]:
    """Return each contender's medians, the ratios and what is wrong with them."""
    contenders = {name: _figures(name, found, rows) for name, found in runs.items()}
    ratios = {}
    for (slower, faster), wanted in WANTED.items():
        if slower in runs and faster in runs:
            pairs = [timed_seconds(a) / timed_seconds(b) for a, b in zip(runs[slower], runs[faster], strict=True)]
            ratios[f"{faster} is faster than {slower} by"] = {
                "median": statistics.median(pairs),
                "range": [min(pairs), max(pairs)],
                "wanted": wanted,
            }
    return {
        "contenders": contenders,
        "ratios": ratios,
        "memory": _compare_memory(contenders),
        "wrong": find_wrong(contenders, rows),
    }


def _compare_memory(contenders: dict[str, Any]) -> dict[str, Any]:
    """Return loralab's peak memory in shares of the others'; at most 1 is wanted."""
    ours = contenders.get("loralab")
    names = ("peak_rss_bytes", "peak_anonymous_bytes")
    return {
        other: {name: round(ours[name] / figures[name], 3) for name in names}
        for other, figures in contenders.items()
        if ours and other != "loralab"
    }


def find_wrong(contenders: dict[str, Any], rows: Prepared) -> list[str]:
    """Return what makes the figures worthless: other labels, or other losses than the first contender's."""
    wrong = []
    reference = next(iter(contenders.values()), None)
    for name, figures in contenders.items():
        if figures["labels"] != rows.labels:
            wrong.append(f"{name} trains on {figures['labels']} labels, the rows have {rows.labels}")
        if reference and figures["trained_parameters"] != reference["trained_parameters"]:
            wrong.append(f"{name} trains {figures['trained_parameters']} parameters, not as the first")
        if len(figures["losses"]) != rows.steps:
            wrong.append(f"{name} took {len(figures['losses'])} steps, not {rows.steps}")
        expected = reference["losses"][0] if reference else 0.0
        difference = abs(figures["losses"][0] - expected) / max(abs(expected), 1e-9)
        figures["first_loss_difference"] = difference
        if not difference <= LARGEST_DIFFERENCE:
            wrong.append(f"{name}'s first loss is {figures['losses'][0]:.4f}, another's {expected:.4f}")
    return wrong


def _rate(run: dict[str, Any], rows: Prepared) -> float:
    return rows.batch * (rows.steps - 1) / timed_seconds(run)


def _figures(name: str, runs: Sequence[dict[str, Any]], rows: Prepared) -> dict[str, Any]:
    rates = [_rate(run, rows) for run in runs]
    first = runs[0]
    figures: dict[str, Any] = {
        "does": SAYS[name],
        "examples_per_second": statistics.median(rates),
        "range": [min(rates), max(rates)],
        "encoding_seconds": None,
        "runs": list(runs),
    }
    if first.get("encoding_seconds"):
        figures["encoding_seconds"] = statistics.median(run["encoding_seconds"] for run in runs)
    for key in ("peak_rss_bytes", "peak_anonymous_bytes", "wall_seconds"):
        figures[key] = statistics.median(run[key] for run in runs)
    return figures | {
        key: first[key] for key in ("losses", "labels", "laid_out", "trained_parameters", "versions", "notes")
    }


def count_work(rows: Prepared) -> dict[str, Any]:
    """Return the operations of a step, of this shape and of Qwen2-VL-2B."""
    given = {
        "side": PICTURE_SIDE,
        "questions": rows.batch,
        "own": round(rows.text_tokens),
        "labels": ANSWER_TOKENS + 1,
    }
    return {name: step_flops(shape, **given) for name, shape in (("this shape", SHAPE), ("Qwen2-VL-2B", QWEN2_VL_2B))}


def render(document: dict[str, Any]) -> str:
    """Return table, ratios and shares as Markdown."""
    header = ("contender", "examples/s (range)", "step, s", "peak RSS, GiB", "without mapped files, GiB")
    header += ("first loss (difference)", "last loss", "labels", "laid out")
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for name, figures in document["contenders"].items():
        rate, (low, high) = figures["examples_per_second"], figures["range"]
        cells = [
            name,
            f"{rate:.2f} ({low:.2f} to {high:.2f})",
            f"{document['rows']['batch'] / rate:.2f}",
            f"{figures['peak_rss_bytes'] / 2**30:.2f}",
            f"{figures['peak_anonymous_bytes'] / 2**30:.2f}",
            f"{figures['losses'][0]:.4f} ({figures['first_loss_difference']:.1e})",
            f"{figures['losses'][-1]:.4f}",
            f"{figures['labels']:,}",
            f"{figures['laid_out']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, ratio in document["ratios"].items():
        low, high = ratio["range"]
        wanted = "" if ratio["wanted"] is None else f", wanted {ratio['wanted']:g}"
        lines.append(f"- {name} {ratio['median']:.2f} ({low:.2f} to {high:.2f}){wanted}")
    for name, shares in document["memory"].items():
        rss, anonymous = shares["peak_rss_bytes"], shares["peak_anonymous_bytes"]
        lines.append(f"- loralab's peak RSS is {rss:.2f} of {name}'s, without mapped files {anonymous:.2f}")
    for name, figures in document["contenders"].items():
        spent = figures["encoding_seconds"]
        before = "" if spent is None else f"; {spent:.2f} s of encoding before the first step"
        lines.append(f"- {name}: {figures['does']}. {'; '.join(figures['notes'])}{before}")
    lines += [f"- {name} does not run: {reason}" for name, reason in document["cannot_run"].items()]
    for shape, ways in document["operations"].items():
        lines += [
            f"- {shape}, {way}: tower {each['tower_gflop']:,.0f} GFLOP, text {each['text_gflop']:,.0f}, the tower's "
            f"share {each['tower_share']:.0%}; {each['times_loralab']:.2f} times the shared step"
            for way, each in ways.items()
        ]
    return "\n".join([*lines, *(f"- WRONG: {each}" for each in document["wrong"])])


def main() -> None:
    """Hold the contest, print its report and write its JSON file."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running contender is ended too
    names = arguments.contenders or [name for name in CONTENDERS if name != "loralab_one_by_one"]
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        model = build_model(work / "model")
        rows = prepare_rows(work / "rows", model, steps=arguments.steps, questions=arguments.questions)
        runs, failed = hold(names, rows, arguments, work=work)
    settings = {name: getattr(arguments, name) for name in ("threads", "repeats", "steps", "questions")}
    document = {"machine": machine(), "settings": settings, "shape": asdict(SHAPE), "rows": _described(rows)}
    document |= summarize(runs, rows) | {"cannot_run": failed, "operations": count_work(rows)}
    out = arguments.out or Path("runs") / "bench" / "vision.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(f"\n{render(document)}\n\nwritten: {out}")
    if document["wrong"] or failed:
        sys.exit(1)


def _described(rows: Prepared) -> dict[str, Any]:
    return {name: value for name, value in asdict(rows).items() if not isinstance(value, Path)}


if __name__ == "__main__":
    main()
