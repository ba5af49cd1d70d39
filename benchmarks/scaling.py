"""How time and memory of `loralab train` grow with rows and with length, and where the time to the first step goes.

Random weights in bfloat16, real rows, each run a process of its own, one after the other:

    python benchmarks/scaling.py [--data FOLDER] [--parts rows lengths start] [--work FOLDER] [--out FOLDER]
        [--rows 1000 4000 16000] [--row-steps 60] [--lengths 256 ... 8192] [--budgets 8192 auto] [--length-steps 3]
        [--repeats 3]

FOLDER of --data holds `sft/alpaca_en_demo/alpaca_en_demo.json` and `tokenizers/gpt2`; without it the demo's rows and
tokenizer are taken. Run it on an idle machine.

- rows: GPT-2-small's shape, rows of about 40 tokens of which no two are equal, the same number of steps for each size.
- lengths: a Llama of 85 million parameters, steps of the same tokens in longer and fewer rows; `LENGTH_NOTE` says what
  is counted.
- start: GPT-2-small's shape, Alpaca rows that are tokenized already, one step.

Where time goes is sampled: a thread of the trained process looks every few milliseconds which stage it is in, as the
functions on its stack say. Nothing of loralab is changed for that.
"""

import argparse
import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

STEP_TOKENS = 8192
SUPERVISED_SHARE = 4  # one token in four carries loss
RANK = 8
LLAMA = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10}
WARM_UP_STEPS = 5  # of the part rows; one step of that of lengths
LENGTH_NOTE = (
    "Counted a token: 4 P for the frozen linear layers (forward and gradient of their input), 6 r (in + out) a layer "
    "for LoRA (two products forward, four backward), 4 V D for the head where a token is supervised (logits and "
    "gradient of its input), and 14 H E a layer for each pair that attention sees (two products forward, five "
    "backward, of 2 H E each). Norms, rotary positions, softmax and activations are not counted."
)
# Stage: the functions that begin it, by the end of their file and their name. What lies deepest on the stack decides.
STAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "configuration": (("workflows/configure.py", "load_run_config"),),
    "data": (("data/dataset.py", "prepare_data"), ("models/load.py", "load_tokenizer")),
    "base": (("models/load.py", "load_base_model"),),
    "hash of the base": (("models/load.py", "describe_model"),),
    "adapter": (("models/adapters.py", "build_adapter"),),
    "checks": (("workflows/step_layout.py", "resolve_planner"), ("models/determinism.py", "resolve_determinism")),
    "planning": (
        ("workflows/step_layout.py", "sketch_blueprint"),
        ("workflows/step_layout.py", "count_token_memory"),
        ("workflows/recomputation.py", "settle_recomputation"),
        ("workflows/memory_record.py", "predict_run_memory"),
    ),
    "record": (("workflows/train.py", "_begin_record"),),
    "building the trainer": (("workflows/steps.py", "run_steps"),),
    "steps": (("transformers/trainer.py", "train"),),
    "checkpoint": (("training/callbacks.py", "on_save"),),
    "final evaluation": (("workflows/final_evaluation.py", "evaluate_at_end"),),
    "report": (("workflows/report.py", "build_report"),),
}
_STAGE_OF = {place: stage for stage, places in STAGES.items() for place in places}
_IMPORT, _LATER = "<frozen importlib._bootstrap>", "imports on the way"
_BEGUN, _REST = "interpreter and imports", "rest"
_SAMPLE_SECONDS = 0.004


def stage_of(frame: FrameType | None) -> str:
    """Return the stage that a stack is in, by its innermost known function."""
    importing = False
    while frame is not None:
        code = frame.f_code
        importing |= code.co_filename == _IMPORT
        place = ("/".join(Path(code.co_filename).parts[-2:]), code.co_name)
        if place in _STAGE_OF:
            return _LATER if importing else _STAGE_OF[place]
        frame = frame.f_back
    return _LATER if importing else _REST


class StageClock(threading.Thread):
    """Adds up the seconds that the main thread spends in each stage.

    Args:
        launched_at: time.time() just before the process was started.
    """

    def __init__(self, launched_at: float) -> None:
        super().__init__(daemon=True)
        self.launched_at = launched_at
        self.seconds: dict[str, float] = {}
        self.first_seen: dict[str, float] = {}
        self._before = launched_at
        self._ended = threading.Event()

    def note(self, stage: str) -> None:
        """Count the time since the last note as a stage's."""
        now = time.time()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._before
        self.first_seen.setdefault(stage, self._before - self.launched_at)
        self._before = now

    def run(self) -> None:
        """Look until the end."""
        main = threading.main_thread().ident or 0
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.note(stage_of(sys._current_frames().get(main)))

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self.join()


def train_here(launched_at: float, target: Path, command: Sequence[str]) -> None:
    """Run `python -m loralab.cli` in this process, and write down where its time went."""
    import loralab.workflows.train  # noqa: F401 - what the command imports, timed apart

    clock = StageClock(launched_at)
    clock.note(_BEGUN)
    clock.start()
    sys.argv = ["loralab", *command]
    try:
        runpy.run_module("loralab.cli", run_name="__main__", alter_sys=True)
    finally:
        clock.stop()
        target.write_text(json.dumps({"seconds": clock.seconds, "first_seen": clock.first_seen}), encoding="utf-8")


def launch(config: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Train in a process of its own.

    Returns:
        `seconds` of the process, `first_step_seconds` from its start to the first line of metrics where there is only
        one, `peak_rss_bytes` (VmHWM), `record` (run.json), `metrics`, and `stages`.
    """
    path, stages, output = work / "config.json", work / "stages.json", work / "run"
    path.write_text(json.dumps({**config, "output": {"dir": str(output)}}), encoding="utf-8")
    command = [sys.executable, __file__, "--train-here", str(stages), "train", str(path), "--overwrite"]
    started = time.time()
    with (work / "stderr.txt").open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=_environment(started))
        peak = 0
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.02)
    seconds = time.time() - started
    if process.returncode:
        raise SystemExit(f"loralab train failed:\n{(work / 'stderr.txt').read_text(encoding='utf-8')}")
    metrics, spent = output / "metrics.jsonl", json.loads(stages.read_text(encoding="utf-8"))
    spent["seconds"]["end of the process"] = seconds - sum(spent["seconds"].values())
    return {
        "seconds": seconds,
        "first_step_seconds": metrics.stat().st_mtime - started,
        "peak_rss_bytes": peak,
        "record": json.loads((output / "run.json").read_text(encoding="utf-8")),
        "metrics": [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()],
        "stages": spent,
    }


def _environment(launched_at: float) -> dict[str, str]:
    return {**os.environ, "SCALING_LAUNCHED_AT": repr(launched_at), "TOKENIZERS_PARALLELISM": "false"}


def _high_water(process: int) -> int:
    """Return the most resident memory of a process so far; of its own, where getrusage counts its parent's."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def rows_file(data: Path | None) -> Path:
    """Return the file of Alpaca rows."""
    if data is not None:
        return data / "sft/alpaca_en_demo/alpaca_en_demo.json"
    from loralab.workflows.demo import demo_files

    return demo_files() / "instructions.jsonl"


def read_rows(data: Path | None) -> list[dict[str, str]]:
    """Return those rows."""
    text = rows_file(data).read_text(encoding="utf-8")
    found: list[dict[str, str]] = (
        json.loads(text) if data is not None else [json.loads(line) for line in text.split("\n") if line]
    )
    return found


def build_model(shape: str, data: Path | None, work: Path) -> Path:
    """Return the folder of a random model, gpt2 or llama, with its tokenizer."""
    folder = work / shape
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = rows_file(None).parent / "base" if data is None else data / "tokenizers/gpt2"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    llama: dict[str, Any] = {**LLAMA, "num_key_value_heads": 2, "max_position_embeddings": 16_384}
    model: Any = (
        GPT2LMHeadModel(GPT2Config(**size))
        if shape == "gpt2"
        else LlamaForCausalLM(LlamaConfig(**size, **llama, tie_word_embeddings=True))
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def base_config(model: Path, train: Path, work: Path, *, steps: int) -> dict[str, Any]:
    """Return what all parts have in common; one process tokenizes and nothing is recomputed, so that sizes compare."""
    return {
        "model": {"name": str(model), "precision": "bfloat16", "device": "cpu"},
        "data": {"train": str(train), "cache_dir": str(work / "cache"), "num_workers": 0, "max_length": 512},
        "lora": {"r": RANK},
        "training": {
            "max_steps": steps,
            "save_strategy": "no",
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
        "evaluation": {"num_samples": 0},
    }


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measure_rows(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Train the same number of steps on data sets of growing size."""
    model, real = build_model("gpt2", arguments.data, work), read_rows(arguments.data)
    for count in arguments.rows:
        rows = []
        for number, row in zip(range(count), itertools.cycle(real), strict=False):
            question, answer = row["instruction"].split()[:14], row["output"].split()[:16]
            rows.append({"prompt": f"{number}. {' '.join(question)}\n", "completion": f"{' '.join(answer)} ({number})"})
        path = _write(work / f"rows-{count}.jsonl", rows)
        config = base_config(model, path, work, steps=arguments.row_steps)
        config["data"] |= {"cache_dir": str(work / f"cache-{time.time_ns()}")}  # nothing is tokenized yet
        found = launch(config, work)
        memory, seconds = found["record"]["memory"], found["stages"]["seconds"]
        behind = found["metrics"][min(WARM_UP_STEPS, len(found["metrics"]) - 1) :]
        yield {
            "rows": count,
            "file_bytes": path.stat().st_size,
            "data_seconds": seconds["data"],
            "planning_seconds": seconds["planning"],
            "to_training_seconds": found["stages"]["first_seen"]["steps"],
            "seconds_per_1000_tokens": statistics.median(1000 / line["tokens_per_second"] for line in behind),
            "memory_bytes": memory["measured_bytes"],
            "predicted_bytes": memory["predicted_bytes"],
            "level_bytes": memory["level_bytes"],
            "parts": memory["parts"],
            "peak_rss_bytes": found["peak_rss_bytes"],
        }


def cut_stream(data: Path | None, model: Path, *, length: int, count: int) -> list[dict[str, list[int]]]:
    """Return rows of exactly `length` tokens, cut out of the real rows as one text; the end of each is supervised."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"{row['instruction']}\n{row['output']}\n\n" for row in read_rows(data)]
    stream = itertools.chain.from_iterable(
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in itertools.cycle(texts)
    )
    rows = []
    for _ in range(count):
        ids = list(itertools.islice(stream, length))
        masked = length - length // SUPERVISED_SHARE
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


def flops_per_token(model: Path, length: int) -> dict[str, float]:
    """Return the counted operations of a token in a row of `length`; see `LENGTH_NOTE`."""
    from matrix_rate import linear_shapes

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shapes, hidden = linear_shapes(model), config["hidden_size"]
    return {
        "linear": 4.0 * sum(size * wide * number for (size, wide), number in shapes.items()),
        "lora": 6.0 * RANK * sum((size + wide) * number for (size, wide), number in shapes.items()),
        "head": 4.0 * config["vocab_size"] * hidden / SUPERVISED_SHARE,
        "attention": 14.0 * hidden * config["num_hidden_layers"] * (length + 1) / 2,
    }


def measure_lengths(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Train steps of the same tokens in rows of growing length."""
    model, steps = build_model("llama", arguments.data, work), 1 + arguments.length_steps
    for budget, length in itertools.product(arguments.budgets, arguments.lengths):
        batch = max(STEP_TOKENS // length, 1)
        rows = cut_stream(arguments.data, model, length=length, count=batch * steps)
        config = base_config(model, _write(work / f"length-{length}.jsonl", rows), work, steps=steps)
        config["data"] |= {"format": "tokenized", "max_length": length}
        config["training"] |= {
            "per_device_train_batch_size": batch,
            "token_budget": budget if budget == "auto" else int(budget),
        }
        found = launch(config, work)
        record, counted = found["record"], flops_per_token(model, length)
        speeds = [line["tokens_per_second"] for line in found["metrics"][1:]]  # steps of the same tokens
        speed = statistics.median(speeds)
        yield {
            "length": length,
            "batch": batch,
            "budget": budget,
            "token_budget": record["token_budget"]["value"],
            "attention": record["resolved"]["attention"]["value"],
            "tokens_per_second": speed,
            "range": [min(speeds), max(speeds)],
            "mflop_per_token": {part: amount / 1e6 for part, amount in counted.items()},
            "gflops": speed * sum(counted.values()) / 1e9,
            "memory_bytes": record["memory"]["measured_bytes"],
            "predicted_bytes": record["memory"]["predicted_bytes"],
            "peak_rss_bytes": found["peak_rss_bytes"],
        }


def measure_start(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Train one step on rows that are tokenized already; the median of some runs."""
    model = build_model("gpt2", arguments.data, work)
    config = base_config(model, rows_file(arguments.data), work, steps=1)
    config["data"] |= {"template": "alpaca"}
    config["training"] |= {"per_device_train_batch_size": 4}
    launch(config, work)  # fills the cache
    runs = [launch(config, work) for _ in range(arguments.repeats)]
    chosen = sorted(runs, key=lambda run: float(run["first_step_seconds"]))[len(runs) // 2]
    yield {
        "to_first_step_seconds": chosen["first_step_seconds"],
        "range": [min(r["first_step_seconds"] for r in runs), max(r["first_step_seconds"] for r in runs)],
        "process_seconds": chosen["seconds"],
        "stages": chosen["stages"]["seconds"],
    }


PARTS = {"rows": measure_rows, "lengths": measure_lengths, "start": measure_start}


def read_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1000, 4000, 16_000])
    parser.add_argument("--row-steps", type=int, default=60)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--budgets", nargs="+", default=[str(STEP_TOKENS), "auto"], help="tokens, or auto")
    parser.add_argument("--length-steps", type=int, default=3, help="besides one that is not counted")
    parser.add_argument("--repeats", type=int, default=3, help="of the part start")
    parser.add_argument("--work", type=Path, help="folder of models, rows and runs, kept; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="where JSON, table and plot go")
    return parser.parse_args()


def main() -> None:
    """Measure and report, or be the process that trains."""
    if sys.argv[1:2] == ["--train-here"]:
        train_here(float(os.environ["SCALING_LAUNCHED_AT"]), Path(sys.argv[2]), sys.argv[3:])
        return
    arguments = read_arguments()
    from scaling_report import render_tables, write_report

    found: dict[str, Any] = {"threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        arguments.data = arguments.data and arguments.data.absolute()
        for part in arguments.parts:
            found[part] = []
            for line in PARTS[part](arguments, work):
                found[part].append(line)
                print(json.dumps({"part": part, **line}), file=sys.stderr, flush=True)
    write_report(found, note=LENGTH_NOTE, folder=arguments.out)
    print(render_tables(found, note=LENGTH_NOTE))


if __name__ == "__main__":
    main()
