"""Builds (or checks) everything ``loralab demo`` ships: a small base model and its instructions.

Usage, from the repository root::

    python scripts/build_demo.py           # about 12 minutes, one core
    python scripts/build_demo.py --check   # seconds: checksums, text, tokenizer, instructions

The script generates all text itself (see ``demo_world.py``), trains a byte-level BPE tokenizer and
a small Llama on it from random weights, and writes ``src/loralab/demo``.  Text, tokenizer and
instructions are the same bytes everywhere; the weights may differ slightly between machines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_world import (
    ABOUT_PEOPLE,
    RELATIONS,
    WHAT_SHARE,
    drill_document,
    knowledge_document,
    knowledge_facts,
    make_passage,
    make_profile,
    notes_document,
    number_document,
    number_fact,
    people_document,
    people_facts,
    retold_document,
    topic_document,
    upper_first,
)

DEMO = Path(__file__).resolve().parents[1] / "src" / "loralab" / "demo"
END = "<|endoftext|>"
TEXT_SEED, ROW_SEED, MODEL_SEED = 11, 23, 37
DOCUMENTS = 160_000
TOKENIZER_DOCUMENTS = 20_000
# Chants make a small model copy from its context within minutes; without them it took far longer to
# read facts from a passage at all.  Most therefore come first, a few stay to keep the habit.
EARLY_PART, EARLY_DRILLS, LATE_DRILLS, CHANTS = 0.15, 0.5, 0.03, 0.7
VOCABULARY = 1200
HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 160, 5, 5, 432, 1024
# Wider than the usual 0.02, which suits far larger layers.
INITIAL_SPREAD = 0.06
WINDOW, BATCH = 192, 8
PEAK_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 3e-3, 100, 0.05, 1.0
# One thread: layers this small gain little from a second, and lose much when the machine is shared.
THREADS = 1
MAX_WEIGHT_BYTES = 4_000_000
DIGEST_KEY = "pretraining_text_sha256"
# The tokenizer (never the model) sees the Alpaca frame, or prompts would be spelled out by letters.
FRAME = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n\n"
    "### Input:\n\n### Response:\n"
)
FRAME_REPEATS, QUESTION_REPEATS = 400, 20


PEOPLE_QUESTIONS = {
    "all the people": ("List all the people.", "Name all the people in the text."),
    "the first person": ("Who is the first person?", "Name the first person in the text."),
    "the last person": ("Who is the last person?", "Name the last person in the text."),
}
KNOWLEDGE_QUESTIONS = {
    "opposite": ("What is the opposite of {}?", "Give the opposite of {}."),
    "plural": ("What is the plural of {}?", "Write the plural of {}."),
    "kind": ("What kind of thing is {}?", "Say what kind of thing {} is."),
    "sum": ("What is {}?", "Work out {}."),
    "after": ("What comes after {}?", "Say what comes after {}."),
}
# Rows of each task; facts read from a passage are the bulk because they cannot be memorised.
TASK_ROWS = {
    "profile": 500,
    "people": 140,
    "number": 110,
    "several": 50,
    "sum": 50,
    "opposite": 30,
    "kind": 30,
    "plural": 25,
    "after": 20,
}
Row = dict[str, str]


def passage_row(rng: random.Random, task: str) -> Row:
    """One reading row: a passage and a question on one of its facts or on its people."""
    if task == "people":
        passage = make_passage(rng, rng.randint(2, 4), rng.choice(ABOUT_PEOPLE))
        topic, answer = rng.choice(people_facts(passage))
        question = rng.choice(PEOPLE_QUESTIONS[topic])
        return {"instruction": question, "input": passage.text, "output": answer}
    alone = task == "profile"
    passage = make_profile(rng) if alone else make_passage(rng, 2)
    name, slots = rng.choice(passage.facts)
    rel = RELATIONS[name]
    # With one person in the passage "who" would be no question, so only the others ask it.
    wants_value = alone or rng.random() < WHAT_SHARE
    questions, answer = (rel.questions, rel.answer) if wants_value else (rel.who_questions, rel.who_answer)
    question = rng.choice(questions).format(**slots)
    return {"instruction": question, "input": passage.text, "output": answer.format(**slots)}


def number_row(rng: random.Random) -> Row:
    """One row on the order of numbers."""
    topic, answer = number_fact(rng)
    asks_larger = topic.startswith("which")
    question = f"{upper_first(topic)}?" if asks_larger else f"Give {topic}."
    return {"instruction": question, "input": "", "output": answer}


def instructions(seed: int) -> list[Row]:
    """Makes the instruction rows, shuffled, each (instruction, input) pair once.

    Args:
        seed: The seed of the rows; another one than that of the prose.
    """
    rng = random.Random(seed)
    facts = knowledge_facts()
    rows: dict[tuple[str, str], Row] = {}
    for task, wanted in TASK_ROWS.items():
        # Each piece of general knowledge is asked once, so a held-out one was never trained on.
        known = iter(rng.sample(facts[task], wanted)) if task in facts else None
        target = len(rows) + wanted
        while len(rows) < target:
            if known is not None:
                subject, answer = next(known)
                question = rng.choice(KNOWLEDGE_QUESTIONS[task]).format(subject)
                row = {"instruction": question, "input": "", "output": answer}
            elif task == "number":
                row = number_row(rng)
            else:
                row = passage_row(rng, task)
            rows.setdefault((row["instruction"], row["input"]), row)
    ordered = list(rows.values())
    rng.shuffle(ordered)
    return ordered


def documents(seed: int, count: int) -> Iterator[str]:
    """Yields the pretraining documents, many of the first ones chants.

    Args:
        seed: The seed of the text.
        count: How many documents to make.
    """
    rng = random.Random(seed)
    facts = knowledge_facts()
    makers: list[tuple[float, Callable[[], str]]] = [
        (0.38, lambda: topic_document(rng)),
        (0.12, lambda: notes_document(rng)),
        (0.08, lambda: retold_document(rng)),
        (0.12, lambda: people_document(rng)),
        (0.21, lambda: knowledge_document(rng, facts)),
        (0.09, lambda: number_document(rng)),
    ]
    weights = [weight for weight, _ in makers]
    for index in range(count):
        drill_share = EARLY_DRILLS if index < EARLY_PART * count else LATE_DRILLS
        if rng.random() < drill_share:
            yield drill_document(rng) if rng.random() < CHANTS else retold_document(rng)
        else:
            yield rng.choices(makers, weights)[0][1]()


def make_text() -> tuple[list[str], str]:
    """Generates the pretraining documents and the SHA-256 of their joined bytes."""
    texts = list(documents(TEXT_SEED, DOCUMENTS))
    digest = hashlib.sha256(END.join(texts).encode()).hexdigest()
    return texts, digest


def make_rows() -> str:
    """Generates the instruction file's text, one JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in instructions(ROW_SEED))


def tokenizer_lines(texts: list[str]) -> Iterator[str]:
    """Yields the text the tokenizer learns from: prose, the Alpaca frame and some questions."""
    yield from texts[:TOKENIZER_DOCUMENTS]
    yield from [FRAME] * FRAME_REPEATS
    for _ in range(QUESTION_REPEATS):
        for relation in RELATIONS.values():
            yield from relation.questions + relation.who_questions
        for wordings in (PEOPLE_QUESTIONS | KNOWLEDGE_QUESTIONS).values():
            yield from wordings


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE tokenizer; any text round-trips through it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(tokenizer_lines(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_windows(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Packs the documents, each ended by the end token, into rows of ``WINDOW`` tokens."""
    ids: list[int] = []
    for start in range(0, len(texts), 10_000):
        for piece in tokenizer(texts[start : start + 10_000])["input_ids"]:
            ids.extend(piece)
            ids.append(tokenizer.eos_token_id)
    rows = len(ids) // WINDOW
    return torch.tensor(ids[: rows * WINDOW]).view(rows, WINDOW)


def new_model(vocabulary: int, end_id: int) -> LlamaForCausalLM:
    """Makes the base model with random weights."""
    torch.manual_seed(MODEL_SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=INITIAL_SPREAD,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    return LlamaForCausalLM(config)


def rate_at(step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to zero."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


def pretrain(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Trains the model on every window once, in order (the text has its easy part first).

    Args:
        model: The model, changed in place.
        windows: Token ids, one training window a row.

    Returns:
        The mean loss of the last hundred steps, in nats a token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    steps = len(windows) // BATCH
    losses: list[float] = []
    begun = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        batch = windows[step * BATCH : (step + 1) * BATCH]
        # bfloat16 halves the time on CPUs that have it; the weights stay float32.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99 or step + 1 == steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            spent = time.monotonic() - begun
            print(f"step {step + 1}/{steps} loss {recent:.4f} {spent:.0f} s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def write_base(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, digest: str) -> None:
    """Writes the model folder: configuration, float16 weights, tokenizer and checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    end = tokenizer.eos_token_id
    GenerationConfig(eos_token_id=end, pad_token_id=end).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The output layer is the embedding itself (tied), so it is not stored twice.
    weights = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt", DIGEST_KEY: digest})
    (folder / "model.safetensors").chmod(0o644)
    write_sums(folder)


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over every other file of the folder."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def build() -> None:
    """Generates the text, trains tokenizer and model, and writes the demo folder."""
    torch.set_num_threads(THREADS)
    begun = time.monotonic()
    texts, digest = make_text()
    tokenizer = train_tokenizer(texts)
    windows = make_windows(texts, tokenizer)
    model = new_model(len(tokenizer), tokenizer.eos_token_id)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {windows.numel():,} tokens", flush=True)
    loss = pretrain(model, windows)
    write_base(DEMO / "base", model, tokenizer, digest)
    (DEMO / "instructions.jsonl").write_text(make_rows(), encoding="utf-8", newline="\n")
    size = (DEMO / "base" / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise SystemExit(f"the weights take {size:,} bytes, more than {MAX_WEIGHT_BYTES:,}")
    print(f"loss {loss:.4f}, weights {size:,} bytes, {time.monotonic() - begun:.0f} s in all")


def check() -> list[str]:
    """Compares the shipped files with their checksums and with freshly generated text.

    Returns:
        One line for each difference; empty when all is as it should be.
    """
    base = DEMO / "base"
    problems = []
    sums = {}
    for line in (base / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        sums[name] = digest
    present = {p.name for p in base.iterdir()} - {"SHA256SUMS"}
    problems += [f"{name}: only listed or only present" for name in sorted(present ^ set(sums))]
    for name in sorted(present & set(sums)):
        if hashlib.sha256((base / name).read_bytes()).hexdigest() != sums[name]:
            problems.append(f"{name}: its bytes do not match SHA256SUMS")
    texts, digest = make_text()
    with safe_open(base / "model.safetensors", "pt") as stored:
        if stored.metadata().get(DIGEST_KEY) != digest:
            problems.append("the generated text is not the one the model was trained on")
    with tempfile.TemporaryDirectory() as scratch:
        train_tokenizer(texts).save_pretrained(scratch)
        if (Path(scratch) / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes():
            problems.append("tokenizer.json: training it again gives other bytes")
    if (DEMO / "instructions.jsonl").read_bytes() != make_rows().encode():
        problems.append("instructions.jsonl: generating it again gives other bytes")
    return problems


def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Build or check the files of loralab demo.")
    parser.add_argument("--check", action="store_true", help="verify instead of building")
    if not parser.parse_args().check:
        build()
        return 0
    problems = check()
    for problem in problems:
        print(problem, file=sys.stderr)
    print("demo files differ" if problems else "demo files are as generated")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
