"""Rows per second of loralab's data preparation and of TRL's on the same rows, side by side.

loralab reads the file, renders the `alpaca` template, tokenizes and writes its cache. TRL's
`SFTTrainer` gets the rows as prompts and completions that are rendered already and read into Arrow
already; only its own preparation is timed. Both work with the same number of processes, each
tokenizer with one thread; a run of one follows a run of the other, and the ratio of each pair is
reported. Then loralab starts again, with its cache. Run it on an idle machine:

    python benchmarks/preparation.py --data FILE.jsonl --tokenizer FOLDER [--workers 1 2]
        [--repeats 3] [--max-length 1024] [--rows N]
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.example import Conversation
from loralab.data.formats.table import FORMATS
from loralab.data.reading.sources import resolve_sources
from loralab.progress import Reporter


class TimedTrainer(SFTTrainer):
    """Notes how long the preparation of the data took."""

    seconds = 0.0

    def _prepare_dataset(self, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **options)
        self.seconds = time.perf_counter() - started
        return prepared


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer, without a template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    return tokenizer


def prepare(path: Path, cache: Path, arguments: argparse.Namespace, *, workers: int) -> tuple[PreparedData, float]:
    """Prepare the rows with loralab; return them and the seconds it took."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    data = DataConfig(
        train=str(path),
        template="alpaca",
        max_length=arguments.max_length,
        num_workers=workers,
        max_dropped_fraction=1.0,
        cache_dir=str(cache),
    )
    started = time.perf_counter()
    prepared = prepare_data(data, tokenizer, reporter=Reporter())
    return prepared, time.perf_counter() - started


def render_rows(path: Path, prepared: PreparedData, target: Path) -> datasets.Dataset:
    """Return the rows as prompts and completions, as loralab renders them, in Arrow files."""
    (source,) = resolve_sources(str(path), where="--data")
    with (target / "rendered.jsonl").open("w", encoding="utf-8") as stream:
        for row in source.rows():
            example = FORMATS["alpaca"].build(row.fields)
            assert isinstance(example, Conversation)
            prompt = prepared.prompter.render(example.messages[:-1], add_generation_prompt=True)
            line = {"prompt": prompt, "completion": example.messages[-1].content}
            stream.write(json.dumps(line) + "\n")
    loaded = datasets.Dataset.from_json(str(target / "rendered.jsonl"), cache_dir=str(target / "arrow"))
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def prepare_with_trl(rows: datasets.Dataset, folder: Path, arguments: argparse.Namespace, *, workers: int) -> float:
    """Prepare the rows with TRL; return the seconds it took."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=8)
    settings = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_length=arguments.max_length,
        dataset_num_proc=workers if workers > 1 else None,
        completion_only_loss=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = TimedTrainer(GPT2LMHeadModel(config), settings, train_dataset=rows, processing_class=tokenizer)
    return trainer.seconds


def take_rows(path: Path, target: Path, count: int | None) -> Path:
    """Return a file with the first rows of a JSON lines file."""
    if count is None:
        return path
    with path.open("rb") as lines:
        (target / "rows.jsonl").write_bytes(b"".join(itertools.islice(lines, count)))
    return target / "rows.jsonl"


def main() -> None:
    """Run it and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with instruction, input and output")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, help="take the first ones only")
    arguments = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = take_rows(arguments.data, folder, arguments.rows)
        first, _ = prepare(path, folder / "first", arguments, workers=0)
        rows = render_rows(path, first, folder)
        figures: dict[str, Any] = {"rows": len(rows)}
        for workers in arguments.workers:
            pairs = []
            for repeat in range(arguments.repeats):
                _, ours = prepare(path, folder / f"{workers}-{repeat}", arguments, workers=workers)
                pairs.append((ours, prepare_with_trl(rows, folder / "trl", arguments, workers=workers)))
            ratios = [theirs / ours for ours, theirs in pairs]
            figures[f"{workers} workers"] = {
                "loralab_rows_per_second": [round(len(rows) / ours) for ours, _ in pairs],
                "trl_rows_per_second": [round(len(rows) / theirs) for _, theirs in pairs],
                "ratio": [round(ratio, 2) for ratio in ratios],
                "median_ratio": round(statistics.median(ratios), 2),
            }
        figures["second_start_seconds"] = round(prepare(path, folder / "first", arguments, workers=0)[1], 3)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
