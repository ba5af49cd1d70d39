"""What `training.sampling: grouped` saves against `random`, and what it costs, on questions about documents.

Nine rows share a document of about 256 tokens; each asks for one fact of it. Both ways of sampling train the same
adapter on the same rows for the same epochs; validation asks about documents that were never seen. It prints the
tokens laid out (`layout_tokens` of `run.json`) and the validation loss (of `evaluation.json`), seed by seed, with a
paired interval over the seeds. Without arguments it takes the demo's embedded model:

    python benchmarks/grouped.py [--model FOLDER] [--documents 60] [--epochs 2] [--seeds 3] [--stop-token TOKEN]
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scipy.stats import t as student
from transformers import PreTrainedTokenizerBase

import loralab
from loralab.config.schema import ModelConfig
from loralab.models.load import load_tokenizer
from loralab.workflows.demo import demo_files

ROWS_PER_DOCUMENT, DOCUMENT_TOKENS = 9, 256
SAMPLINGS = ("random", "grouped")
NAMES = ["Tom", "Lily", "Tim", "Ben", "Sue", "Mia", "Max", "Sam", "Amy", "Joe", "Sara", "Bob", "Lucy", "Kim", "Pip"]
COLOURS = ["red", "blue", "green", "big", "small", "new", "old", "soft", "pink", "black"]
THINGS = ["ball", "car", "hat", "box", "book", "dog", "cat", "bird", "cake", "toy", "boat", "bear", "tree", "cup"]
PLACES = ["park", "garden", "house", "forest", "school", "kitchen", "shop", "lake"]
DOINGS = ["play", "run", "sing", "jump", "read", "sleep", "eat", "swim"]
LINES = [
    "They went to the {place} to {doing}.",
    "The sun was in the sky and they were happy.",
    "Mom said they could {doing} in the {place}.",
    "One day they saw the {place}.",
    "They liked to {doing} all day.",
]


def build_document(draw: random.Random, count_tokens: Callable[[str], int]) -> list[dict[str, str]]:
    """Return the rows of one document: the facts stand between lines that no question is about.

    Args:
        draw: where chance comes from.
        count_tokens: counts the tokens of a text.
    """
    facts = {name: f"{draw.choice(COLOURS)} {draw.choice(THINGS)}" for name in draw.sample(NAMES, k=ROWS_PER_DOCUMENT)}
    sentences = [f"{name} had a {thing}." for name, thing in facts.items()]
    while count_tokens(" ".join(sentences)) < DOCUMENT_TOKENS:
        line = draw.choice(LINES).format(place=draw.choice(PLACES), doing=draw.choice(DOINGS))
        sentences.insert(draw.randint(0, len(sentences)), line)
    document = " ".join(sentences)
    return [
        {"prompt": f"{document}\nWhat did {name} have? {name} had a", "completion": f" {thing}."}
        for name, thing in facts.items()
    ]


def build_rows(documents: int, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield the rows of one document after another; equal seeds give equal documents."""
    draw = random.Random(seed)
    for _ in range(documents):
        yield build_document(draw, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def write_rows(path: Path, documents: list[list[dict[str, str]]]) -> Path:
    """Write rows as JSON lines, shuffled: nothing in the file's order says which belong together."""
    rows = [row for document in documents for row in document]
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def describe(documents: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Return the smallest and largest number of tokens of documents, questions and answers."""

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [row for document in documents for row in document]
    borders = [row["prompt"].rindex("\n") for row in rows]
    counted = {
        "document": [tokens(row["prompt"][:border]) for row, border in zip(rows, borders, strict=True)],
        "question": [
            tokens(row["prompt"]) - tokens(row["prompt"][:border]) for row, border in zip(rows, borders, strict=True)
        ],
        "answer": [tokens(row["prompt"] + row["completion"]) - tokens(row["prompt"]) for row in rows],
    }
    return {name: [min(values), max(values)] for name, values in counted.items()}


def train(folder: Path, arguments: argparse.Namespace, *, sampling: str, seed: int) -> dict[str, Any]:
    """Train once and return what its run folder says."""
    run = loralab.train(
        {
            "model": {"name": arguments.model, "precision": "float32", "device": "cpu"},
            "data": {
                "train": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "stop_tokens": arguments.stop_token,
                "max_length": 400,
                "cache_dir": str(folder / "cache"),
            },
            "lora": {"r": 16, "alpha": 32},
            "training": {
                "num_train_epochs": arguments.epochs,
                "per_device_train_batch_size": ROWS_PER_DOCUMENT,
                "gradient_accumulation_steps": arguments.documents_per_step,
                "learning_rate": arguments.learning_rate,
                "warmup_ratio": 0.1,
                "lr_scheduler_type": "cosine",
                "logging_steps": 1,
                "save_strategy": "no",
                "seed": seed,
                "sampling": sampling,
            },
            "evaluation": {
                "strategy": "no",
                "batch_size": ROWS_PER_DOCUMENT,
                "num_samples": 0,
                "bootstrap_samples": 200,
            },
            "output": {"dir": str(folder / f"{sampling}-{seed}")},
        }
    )
    record = run.record
    evaluation = json.loads(run.folder.evaluation.read_text(encoding="utf-8"))
    return {
        "sampling": sampling,
        "seed": seed,
        "steps": record["steps"],
        "tokens_of_rows": record["layout_tokens"]["rows"],
        "tokens_laid_out": record["layout_tokens"]["laid_out"],
        "train_seconds": round(record["train_seconds"], 1),
        "last_training_loss": round(run.metrics[-1]["loss"], 4),
        "base_loss": round(evaluation["base"]["eval_loss"], 4),
        "eval_loss": evaluation["eval_loss"],
    }


def paired_interval(differences: list[float], *, level: float = 0.95) -> dict[str, Any]:
    """Return mean and Student's interval of paired differences; the bounds are None for a single pair."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return {"mean": mean, "low": None, "high": None, "level": level}
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(student.ppf((1 + level) / 2, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "level": level}


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return grouped against random: ratio of tokens and of seconds, difference of validation losses in pairs."""
    of = {name: [run for run in runs if run["sampling"] == name] for name in SAMPLINGS}
    pairs = list(zip(of["grouped"], of["random"], strict=True))
    loss = paired_interval([grouped["eval_loss"] - plain["eval_loss"] for grouped, plain in pairs])
    return {
        "tokens_ratio": max(grouped["tokens_laid_out"] / plain["tokens_laid_out"] for grouped, plain in pairs),
        "seconds_ratio": statistics.median(g["train_seconds"] / p["train_seconds"] for g, p in pairs),
        "eval_loss_difference": loss,
        # Worse would be a difference that lies above zero as a whole.
        "grouped_is_not_worse": loss["low"] is None or loss["low"] <= 0,
    }


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(demo_files() / "base"))
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--validation-documents", type=int, default=20)
    # A step has nine rows for each. Random order must find few of a document's rows in a step, or both ways share:
    # many more documents than this are needed.
    parser.add_argument("--documents-per-step", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--stop-token", action="append")
    parser.add_argument("--sampling", choices=SAMPLINGS, action="append", help="only this one; both without it")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(name=arguments.model))
    # Other seeds than training's: the documents are the same for every run.
    train_documents = list(build_rows(arguments.documents, tokenizer, seed=1))
    unseen = list(build_rows(arguments.validation_documents, tokenizer, seed=2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "train.jsonl", train_documents)
        write_rows(folder / "validation.jsonl", unseen)
        runs = [
            train(folder, arguments, sampling=sampling, seed=seed)
            for seed in range(1, arguments.seeds + 1)
            for sampling in arguments.sampling or SAMPLINGS
        ]
    result: dict[str, Any] = {"tokens": describe(train_documents, tokenizer), "runs": runs}
    if {run["sampling"] for run in runs} == set(SAMPLINGS):
        result["comparison"] = compare(runs)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
