"""Language modelling of WikiText-2: perplexity, learning rates and curves against a plain computation.

What they are held against comes from transformers, PEFT and bitsandbytes' functions alone: windows by
their definition, logits of all positions, sums in float64.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import loralab
from loralab.api import Run
from loralab.training.sampler import StepSampler
from loralab.workflows.configure import load_run_config

TOLERANCE = 1e-5
BLOCK = 64


@dataclass(frozen=True)
class Job:
    """A run on WikiText-2 and what is known of it.

    Attributes:
        base: folder of the base model with its tokenizer.
        quantization: model.quantization.
        texts: file of each split.
        training: the training section.
        max_length: tokens of a window in training.
        eval_every: steps between two evaluations.
    """

    base: Path
    quantization: str
    texts: dict[str, Path]
    training: dict[str, Any]
    max_length: int
    eval_every: int

    def run(self, folder: Path) -> Run:
        """Train; every step is logged."""
        config = {
            "model": {
                "name": str(self.base),
                "quantization": self.quantization,
                "precision": "float32",
                "device": "cpu",
            },
            "data": {
                **{name: str(path) for name, path in self.texts.items()},
                "format": "text",
                "max_length": self.max_length,
                "cache_dir": str(folder / "cache"),
            },
            "lora": {"r": 16, "alpha": 32},
            "training": {"logging_steps": 1, "save_strategy": "no", **self.training},
            "evaluation": {"strategy": "steps", "steps": self.eval_every, "batch_size": 4, "num_samples": 0},
            "output": {"dir": str(folder / "run")},
        }
        return loralab.train(config)

    def plain_model(self, adapter: Path | None) -> nn.Module:
        """Return the base as transformers loads it, its linear weights rounded to NF4 where the run's are."""
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        if self.quantization == "nf4":
            for module in model.modules():
                if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
                    transposed = isinstance(module, Conv1D)  # (in, out); blocks run along the inputs of an output
                    weight = module.weight.data.T if transposed else module.weight.data
                    module.weight.data = (round_to_nf4(weight).T if transposed else round_to_nf4(weight)).contiguous()
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()

    def ids(self, split: str) -> list[int]:
        """Return the tokens of a split's text as one document: as the tokenizer begins it, and its end token."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        text = self.texts[split].read_text(encoding="utf-8")
        return [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight after NF4 and back, in blocks of 64 with doubly quantized scales."""
    blocks = weight.contiguous().reshape(-1, BLOCK)
    packed, state = bnb_functional.quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    return bnb_functional.dequantize_4bit(packed, state).reshape(weight.shape)


def windows_of(ids: list[int], max_length: int) -> Iterator[list[int]]:
    """Yield windows that each begin with the last token of the one before: every token but the first is predicted."""
    start = 0
    while start + 1 < len(ids):
        yield ids[start : start + max_length]
        start += max_length - 1


def plain_nats(model: nn.Module, window: list[int]) -> tuple[float, int]:
    """Return the negative log-likelihood of a window's tokens but the first, and their number."""
    tokens = torch.tensor([window])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1].double()
    return -float(logits.log_softmax(dim=-1).gather(1, tokens[0, 1:, None]).sum()), len(window) - 1


def plain_perplexity(model: nn.Module, ids: list[int], max_length: int) -> tuple[float, int]:
    """Return exp(total nats / predicted tokens) over the windows, one at a time, and the number of tokens."""
    sums = [plain_nats(model, window) for window in windows_of(ids, max_length)]
    count = sum(count for _, count in sums)
    assert count == len(ids) - 1
    return math.exp(sum(nats for nats, _ in sums) / count), count


def expected_rate(training: dict[str, Any], step: int) -> float:
    """Return the learning rate of step s = 0, 1, ... by the printed formula."""
    steps, peak = training["max_steps"], training["learning_rate"]
    warmup = math.ceil(training["warmup_ratio"] * steps)
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    shapes = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return peak * shapes[training["lr_scheduler_type"]]


def head_of(source: Path, characters: int, target: Path) -> Path:
    """Write the first lines of a text, at most so many characters."""
    text = source.read_text(encoding="utf-8")[:characters]
    target.write_text(text[: text.rindex("\n") + 1], encoding="utf-8")
    return target


def slices(data_folder: Path, folder: Path, *, train: int, held_out: int) -> dict[str, Path]:
    source = data_folder / "text/wikitext-2"
    return {
        "train": head_of(source / "train_60_articles.txt", train, folder / "train.txt"),
        "validation": head_of(source / "valid.txt", held_out, folder / "valid.txt"),
        "test": head_of(source / "test.txt", held_out, folder / "test.txt"),
    }


def check_curves(job: Job, run: Run, *, fall: float) -> None:
    """Check learning rates at every step, that both losses fall, and that the plots are there."""
    steps = [line for line in run.metrics if "loss" in line]
    count = job.training["max_steps"]
    assert [line["step"] for line in steps] == list(range(1, count + 1))
    expected = [expected_rate(job.training, step) for step in range(count)]
    assert [line["learning_rate"] for line in steps] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    losses = [line["loss"] for line in steps]
    part = max(count // 5, 2)
    assert sum(losses[-part:]) / part < sum(losses[:part]) / part - fall
    validation = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert len(validation) >= 2
    assert validation[-1] < validation[0]
    for name in ("loss", "learning_rate", "gradient_norm"):
        assert (run.path / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")


def compare(
    job: Job, run: Run, *, lengths: tuple[int, ...], sizes: tuple[int, ...], layouts: tuple[str, ...] = ("auto",)
) -> list[str]:
    """Check perplexities of base and adapter for each length, batch size and layout; return a line for each."""
    plain = {"base": job.plain_model(None), "adapter": job.plain_model(run.adapter())}
    ids, lines = job.ids("test"), []
    for length in lengths:
        expected = {name: plain_perplexity(model, ids, length) for name, model in plain.items()}
        for size, layout in itertools.product(sizes, layouts):
            overrides = [f"data.max_length={length}", f"evaluation.batch_size={size}", f"training.layout={layout}"]
            found = run.evaluate(overrides=overrides)
            assert (found["max_length"], found["batch_size"], found["split"]) == (length, size, "test")
            for name, ours in (("base", found["base"]), ("adapter", found)):
                perplexity, count = expected[name]
                difference = abs(ours["perplexity"] - perplexity) / perplexity
                lines.append(
                    f"{job.quantization} length {length} batch {size} layout {layout} {name}: "
                    f"{ours['perplexity']:.6f} plain {perplexity:.6f} relative {difference:.1e}"
                )
                assert ours["supervised_tokens"] == count
                assert difference < TOLERANCE, lines[-1]
    last = [line for line in run.metrics if "eval_loss" in line][-1]
    assert last["step"] == job.training["max_steps"]
    measured = plain_perplexity(plain["adapter"], job.ids("validation"), job.max_length)[0]
    assert last["eval_perplexity"] == pytest.approx(measured, rel=TOLERANCE)
    return lines


def check_losses(job: Job, run: Run, *, steps: tuple[int, ...]) -> None:
    """Check logged losses against a plain one: rows of the step under the weights of the checkpoint before it."""
    windows = list(windows_of(job.ids("train"), job.max_length))
    size = job.training["per_device_train_batch_size"] * job.training["gradient_accumulation_steps"]
    order = StepSampler(rows=len(windows), rows_per_step=size, seed=load_seed(run)).steps()
    logged = {line["step"]: line["loss"] for line in run.metrics if "loss" in line}
    for step in steps:
        model = job.plain_model(run.path / f"checkpoints/checkpoint-{step - 1}")
        sums = [plain_nats(model, windows[row]) for row in order[step - 1]]
        expected = sum(nats for nats, _ in sums) / sum(count for _, count in sums)
        assert logged[step] == pytest.approx(expected, rel=TOLERANCE), step


def load_seed(run: Run) -> int:
    return load_run_config(run.folder.config).config.training.seed


def show(run: Run, lines: list[str]) -> None:
    losses = [round(line["loss"], 3) for line in run.metrics if "loss" in line]
    validation = [(line["step"], round(line["eval_loss"], 4)) for line in run.metrics if "eval_loss" in line]
    print("", run.path, *lines, f"loss by step: {losses}", f"validation: {validation}", sep="\n")
    print(json.dumps(run.record["model"].get("quantization", {}).get("error", {})), run.record["train_seconds"], "s")


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "schedule"), [("nf4", "cosine"), ("none", "linear")])
def test_small_pretrained_model(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quantization: str, schedule: str
) -> None:
    job = Job(
        base=data_folder / "models/stories260k",
        quantization=quantization,
        texts=slices(data_folder, tmp_path, train=150_000, held_out=25_000),
        training={
            "max_steps": 40,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-3,
            "lr_scheduler_type": schedule,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": None,
        },
        max_length=256,
        eval_every=10,
    )
    run = job.run(tmp_path)
    lines = compare(job, run, lengths=(100, 256), sizes=(1, 3, 16), layouts=("shared", "packed", "padded"))
    with capsys.disabled():
        show(run, lines)
    check_curves(job, run, fall=0.3)
    check_losses(job, run, steps=(2, 21, 40))
    evaluation = json.loads(run.folder.evaluation.read_text(encoding="utf-8"))
    assert evaluation["perplexity"] < evaluation["base"]["perplexity"]


@pytest.mark.slow
def test_gpt2_small_shape(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 layers of 768 over 50,257 tokens, random weights, NF4; few steps on a slice, for two cores."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config()).save_pretrained(base)
    AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2").save_pretrained(base)
    job = Job(
        base=base,
        quantization="nf4",
        texts=slices(data_folder, tmp_path, train=30_000, held_out=2_500),
        training={
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.2,
            "weight_decay": 0.01,
        },
        max_length=128,
        eval_every=5,
    )
    run = job.run(tmp_path)
    lines = compare(job, run, lengths=(64, 128), sizes=(2, 8))
    with capsys.disabled():
        show(run, lines)
    check_curves(job, run, fall=0.3)
