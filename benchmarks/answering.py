"""Tokens per second of batched generation and of one prompt at a time, and what scoring reads, side by side.

A model of GPT-2's shape with random weights answers prompts of different lengths. Each repeat generates them
together, then one by one, and scores two labels behind each; the ratio of each repeat is reported. Nothing is
loaded. Run it on an idle machine:

    python benchmarks/answering.py [--prompts 32] [--shortest 24] [--longest 96] [--tokens 32] [--threads 2]
        [--repeats 3] [--device cpu|cuda]
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from loralab.config.schema import LoraConfig
from loralab.data.prompts.prompter import Prompter
from loralab.data.prompts.templates import TEMPLATES
from loralab.evaluation.answers import Question
from loralab.evaluation.generate import Answer, GenerationSettings, generate_answers
from loralab.evaluation.score import score_labels
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter

VOCABULARY = 50_257
SHARED_TOKENS = 200
QUESTIONS_PER_PASSAGE = 4
LABELS = {"yes": (11,), "no": (12,)}


def build_model(device: torch.device) -> SupervisedPeftModel:
    """Return GPT-2's shape with random weights and a fresh adapter."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config()).requires_grad_(False).to(device)
    model, _ = build_adapter(base, LoraConfig(), seed=0)
    model.to(device)
    model.tree_kernel = resolve_tree_kernel(model).value
    return model.eval()


def build_prompter() -> Prompter:
    """Return a prompter whose stop token a random model hardly ever writes."""
    words = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"<end>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="<end>")
    tokenizer.chat_template = TEMPLATES["none"]
    return Prompter(tokenizer)


def draw_prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Return prompts of random tokens, their lengths evenly spread and mixed."""
    draw = random.Random(0)
    lengths = [shortest + (longest - shortest) * number // max(count - 1, 1) for number in range(count)]
    draw.shuffle(lengths)
    return [[draw.randrange(VOCABULARY - 1) for _ in range(length)] for length in lengths]


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure_generation(
    model: SupervisedPeftModel, prompter: Prompter, prompts: list[list[int]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Generate together and one by one; return tokens per second of each and the ratio of each repeat."""
    settings = GenerationSettings(max_new_tokens=arguments.tokens)

    def generate(batch_size: int, chosen: list[list[int]]) -> list[Answer]:
        return generate_answers(
            model, chosen, prompter=prompter, settings=settings, batch_size=batch_size, reporter=Reporter()
        )

    generate(2, prompts[:2])  # the first call of a kernel is slow
    rates: dict[str, list[float]] = {"together": [], "one_by_one": []}
    texts: dict[str, list[Answer]] = {}
    for _ in range(arguments.repeats):
        for name, batch_size in (("together", len(prompts)), ("one_by_one", 1)):
            seconds, answers = timed(next(model.parameters()).device, lambda size=batch_size: generate(size, prompts))
            rates[name].append(sum(answer.tokens for answer in answers) / seconds)
            texts[name] = answers
    ratios = [together / alone for together, alone in zip(rates["together"], rates["one_by_one"], strict=True)]
    return {
        "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratios": [round(ratio, 2) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 2),
        "same_answers": sum(a.text == b.text for a, b in zip(*texts.values(), strict=True)),
    }


def measure_scoring(
    model: SupervisedPeftModel, prompts: list[list[int]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Score labels behind prompts that share nothing, and behind prompts that share passages."""
    device = next(model.parameters()).device
    draw = random.Random(1)
    passages = [[draw.randrange(VOCABULARY - 1) for _ in range(SHARED_TOKENS)] for _ in prompts]
    with_passage = [
        passages[number // QUESTIONS_PER_PASSAGE] + prompt[: arguments.shortest]
        for number, prompt in enumerate(prompts)
    ]
    result = {}
    for name, asked in (("own_prompts", prompts), ("shared_passages", with_passage)):
        read: list[int] = []
        questions = [Question(n, n + 1, 0, tuple(prompt), (11, 0), "", "") for n, prompt in enumerate(asked)]
        seconds, _ = timed(
            device,
            lambda chosen=questions, told=read: score_labels(
                model,
                chosen,
                labels=LABELS,
                planner=Planner(2048),
                batch_size=16,
                device=device,
                reporter=Reporter(),
                count_tokens=told.append,
            ),
        )
        generation = sum(len(q.prompt_ids) + len(q.reference_ids) - 1 for q in questions)
        result[name] = {
            "seconds": round(seconds, 3),
            "tokens_read": sum(read),
            "tokens_of_generation": generation,
            "share": round(sum(read) / generation, 3),
        }
    return result


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=24)
    parser.add_argument("--longest", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, prompter = build_model(torch.device(arguments.device)), build_prompter()
    prompts = draw_prompts(arguments.prompts, arguments.shortest, arguments.longest)
    settings = {name: getattr(arguments, name) for name in ("prompts", "shortest", "longest", "tokens", "threads")}
    generation = measure_generation(model, prompter, prompts, arguments)
    print(
        json.dumps(
            {
                "device": arguments.device,
                **settings,
                "generation": generation,
                "scoring": measure_scoring(model, prompts, arguments),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
