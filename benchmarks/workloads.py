"""The workloads of the speed contest: which model, which rows, which adapter.

Owns shapes, rows as text and their order. Every row is rendered here, once; contenders get text alone.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loralab.data.example import Branch, TokenizedExample
from loralab.layout.grouping import find_prefix_groups
from loralab.training.sampler import StepSampler
from loralab.workflows.demo import demo_files
from planning import QWEN

Row = dict[str, str]
SEED = 42  # loralab's own default, which its order of rows comes from
GPT2_LAYERS = ("c_attn", "c_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = ("loralab", "trl", "trl_best", "plain", "litgpt", "torchtune", "llamafactory", "ms_swift")
OURS = ("loralab", "trl", "trl_best", "plain")
DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 256, 12, 32

_INTRODUCTION = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
)
_CONTEXT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Workload:
    """A model, rows and an adapter.

    Attributes:
        title: for table and chart.
        shape: gpt2, qwen or demo.
        read_rows: (data folder, tokenizer) -> all rows, without end token, in the order of the data file.
        rows: how many are taken by default.
        batch: rows of an optimizer step.
        targets: layers that get an adapter.
        contenders: who takes part unless told otherwise.
        precision: of the base's weights.
        quantization: none or nf4.
        grouped: rows with a common prefix come in groups of `batch`.
        max_length: tokens of the longest row.
        learning_rate: at the first step.
    """

    title: str
    shape: str
    read_rows: Callable[[Path | None, PreTrainedTokenizerBase], Any]
    rows: int
    batch: int
    targets: tuple[str, ...]
    contenders: tuple[str, ...] = ALL
    precision: str = "bfloat16"
    quantization: str = "none"
    grouped: bool = False
    max_length: int = 512
    learning_rate: float = 2e-4


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; not by `splitlines`, which also cuts at line separators within texts."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_alpaca(path: Path) -> list[Row]:
    """Return Alpaca rows in Stanford's wording."""
    rows = read_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    rendered = []
    for row in rows:
        context = row.get("input")
        introduction = _INTRODUCTION.format(more=_CONTEXT if context else "")
        question = f"{row['instruction']}\n\n### Input:\n{context}" if context else row["instruction"]
        prompt = f"{introduction}request.\n\n### Instruction:\n{question}\n\n### Response:\n"
        rendered.append({"prompt": prompt, "completion": row["output"]})
    return rendered


def alpaca_rows(data: Path | None, _: PreTrainedTokenizerBase) -> list[Row]:
    """Return the rows of alpaca_en_demo."""
    return read_alpaca(_needed(data) / "sft/alpaca_en_demo/alpaca_en_demo.json")


def demo_rows(_data: Path | None, _: PreTrainedTokenizerBase) -> list[Row]:
    """Return the demo's rows."""
    return read_alpaca(demo_files() / "instructions.jsonl")


def passage_rows(data: Path | None, _: PreTrainedTokenizerBase) -> list[Row]:
    """Return PubMedQA's questions about an abstract, the answer yes, no or maybe."""
    rows = []
    for row in read_lines(_needed(data) / "yesno/pubmedqa/pubmedqa_train.jsonl"):
        prompt = f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:"
        rows.append({"prompt": prompt, "completion": f" {row['answer']}"})
    return rows


def boolq_rows(data: Path | None, _: PreTrainedTokenizerBase) -> list[Row]:
    """Return BoolQ's questions, the answer one word; this version of it has no passages."""
    rows = json.loads((_needed(data) / "yesno/boolq/train.json").read_text(encoding="utf-8"))
    return [
        {"prompt": f"{row['instruction']}\n\nAnswer:", "completion": {"true": " yes", "false": " no"}[row["answer"]]}
        for row in rows
    ]


def document_rows(size: int) -> Callable[[Path | None, PreTrainedTokenizerBase], Any]:
    """Return a source of questions about documents, `size` of them about each; groups without end.

    Documents are random words of one token each, which says exactly how many tokens rows have in common.
    """

    def draw_rows(_data: Path | None, tokenizer: PreTrainedTokenizerBase) -> Any:
        words = sorted(word for word in tokenizer.get_vocab() if re.fullmatch(r"Ġ[a-z]{4,8}", word))
        draw = random.Random(0)

        def text(tokens: int) -> str:
            return "".join(f" {word[1:]}" for word in draw.choices(words, k=tokens))

        for _ in count():
            document = text(DOCUMENT_TOKENS)
            for _ in range(size):
                yield {"prompt": document + text(QUESTION_TOKENS), "completion": text(ANSWER_TOKENS - 1)}

    return draw_rows


WORKLOADS = {
    "demo": Workload("the demo's model and rows", "demo", demo_rows, 200, 4, ALL_LINEAR, OURS, precision="float32"),
    "a": Workload("(a) GPT-2-small's shape, Alpaca rows, B 4", "gpt2", alpaca_rows, 64, 4, GPT2_LAYERS),
    "b": Workload("(b) Qwen2.5-0.5B's shape, Alpaca rows, B 4", "qwen", alpaca_rows, 24, 4, ALL_LINEAR),
    "c4": Workload(
        "(c) four questions about each document",
        "gpt2",
        document_rows(4),
        48,
        4,
        GPT2_LAYERS,
        ("loralab", "loralab_packed", *OURS[1:]),
        grouped=True,
    ),
    "c9": Workload(
        "(c) nine questions about each document",
        "gpt2",
        document_rows(9),
        54,
        9,
        GPT2_LAYERS,
        ("loralab", "loralab_packed", *OURS[1:]),
        grouped=True,
    ),
    "d": Workload("(d) yes or no behind an abstract", "gpt2", passage_rows, 48, 4, GPT2_LAYERS, OURS),
    "d_short": Workload("(d) yes or no behind a question", "gpt2", boolq_rows, 48, 4, GPT2_LAYERS, OURS),
    "e": Workload("(e) NF4 of Qwen2.5-0.5B's shape", "qwen", alpaca_rows, 24, 4, ALL_LINEAR, OURS, quantization="nf4"),
}


def _needed(data: Path | None) -> Path:
    if data is None:
        raise SystemExit("this workload needs --data FOLDER; without it there is the workload demo")
    return data


def build_model(workload: Workload, *, data: Path | None, work: Path, base_dropout: str) -> Path:
    """Return the folder of the model, made of random weights where it is not there yet.

    Its config says what the base's dropout is: 0 for `off`, the shape's own for `as_configured`.
    """
    if workload.shape == "demo":
        return demo_files() / "base"
    folder = work / "models" / f"{workload.shape}-{base_dropout}"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    off = {} if base_dropout == "as_configured" else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model: Any = (
        GPT2LMHeadModel(GPT2Config(**off)) if workload.shape == "gpt2" else Qwen2ForCausalLM(Qwen2Config(**QWEN))
    )
    names = {"gpt2": "gpt2", "qwen": "qwen2.5"}
    AutoTokenizer.from_pretrained(_needed(data) / "tokenizers" / names[workload.shape]).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a workload, as every contender gets them.

    Attributes:
        ordered: file of rows with their end token, in the order of loralab's steps.
        unordered: file of the same rows without it, in the data's order.
        end: text of the end token.
        tokens: prompt, completion and end token, all rows together.
        supervised: completion and end token.
        step_supervised: the same, step by step.
        longest: tokens of the longest row.
        left_out: rows that are longer than max_length.
    """

    ordered: Path
    unordered: Path
    end: str
    tokens: int
    supervised: int
    step_supervised: list[int]
    longest: int
    left_out: int

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self.step_supervised)


def prepare_rows(
    workload: Workload, *, data: Path | None, model: Path, folder: Path, limit: int | None
) -> PreparedRows:
    """Render the first rows that fit, find the order in which loralab takes them, and write both files."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    end = str(tokenizer.eos_token)
    wanted = max((limit or workload.rows) // workload.batch, 1) * workload.batch
    rows: list[Row] = []
    lengths: list[tuple[list[int], list[int]]] = []
    left_out = 0
    for row in workload.read_rows(data, tokenizer):
        ids = (
            tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            tokenizer(row["completion"] + end, add_special_tokens=False)["input_ids"],
        )
        if len(ids[0]) + len(ids[1]) > workload.max_length:
            left_out += 1
            continue
        rows.append(row)
        lengths.append(ids)
        if len(rows) == wanted:
            break
    rows = rows[: len(rows) // workload.batch * workload.batch]
    places = list(range(len(rows)))
    random.Random(0).shuffle(places)  # nothing in the file's order says which rows belong together
    rows, lengths = [rows[place] for place in places], [lengths[place] for place in places]
    steps = order_of_steps(lengths, batch=workload.batch, grouped=workload.grouped)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = [rows[place] | {"completion": rows[place]["completion"] + end} for step in steps for place in step]
    return PreparedRows(
        ordered=_write(folder / "rows.jsonl", ordered),
        unordered=_write(folder / "unordered_rows.jsonl", rows),
        end=end,
        tokens=sum(len(prompt) + len(answer) for prompt, answer in lengths),
        supervised=sum(len(answer) for _, answer in lengths),
        step_supervised=[sum(len(lengths[place][1]) for place in step) for step in steps],
        longest=max(len(prompt) + len(answer) for prompt, answer in lengths),
        left_out=left_out,
    )


def order_of_steps(rows: Sequence[tuple[list[int], list[int]]], *, batch: int, grouped: bool) -> list[list[int]]:
    """Return the rows of each step of loralab's first epoch.

    Args:
        rows: ids of prompt and answer.
        batch: rows of a step.
        grouped: whether `training.sampling` is grouped.
    """
    groups = None
    if grouped:
        examples = [
            TokenizedExample(number, 0, (Branch(np.array(prompt, np.int32), np.array(answer, np.int32)),))
            for number, (prompt, answer) in enumerate(rows, start=1)
        ]
        groups = find_prefix_groups(examples, largest=batch)
    return StepSampler(len(rows), batch, SEED, groups=groups).steps()


def _write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
