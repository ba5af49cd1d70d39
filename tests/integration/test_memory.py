"""Peak memory of a step: it does not grow with vocabulary x length.

Measured as what torch's allocator hands out and takes back, so it is the same on every machine.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.data.example import Branch, TokenizedExample
from loralab.layout.planner import Layout, Planner
from loralab.models.memory import activation_bytes
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.token_loss import CHUNK_ELEMENTS
from loralab.training.loss import run_micro_batches
from support.layouts import CPU

HIDDEN = 64
SMALL, LARGE = 32_000, 152_064
MIB = 2**20


def build(
    vocabulary: int, *, layers: int = 2, targets: Sequence[str] = (), checkpointing: bool = False
) -> SupervisedPeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config).requires_grad_(False)
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *targets]
    model = SupervisedPeftModel(base, LoraConfig(r=4, lora_dropout=0.1, target_modules=names, task_type="CAUSAL_LM"))
    model.tree_kernel = "per_tree"
    return model.train()


def rows(count: int, *, length: int, answer: int) -> list[TokenizedExample]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 2000, length + 1).astype(np.int32) for _ in range(count)]
    return [TokenizedExample(i + 1, 0, (Branch(row[:-answer], row[-answer:]),)) for i, row in enumerate(ids)]


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most that was allocated at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    assert measured.profiler is not None
    # `events()` sums up what is allocated inside an operation; these are the single allocations.
    found = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max(initial=0))


def peak_of_a_step(
    model: SupervisedPeftModel,
    examples: list[TokenizedExample],
    *,
    layout: Layout = "packed",
    budget: int = 1 << 20,
    measuring: bool = False,
) -> int:
    step = Planner(budget, layout=layout)(examples)

    def train() -> None:
        run_micro_batches(model, step.micro_batches, device=CPU, backward=torch.Tensor.backward, dropout_key=(0, 0))

    def measure() -> None:
        with torch.inference_mode():
            run_micro_batches(model.eval(), step.micro_batches, device=CPU, observe=lambda _batch, _result: None)

    run = measure if measuring else train
    run()  # gradients of the adapter are there from now on
    return peak_bytes(run)


def test_the_measure_sees_a_tensor_of_known_size() -> None:
    def run() -> None:
        first = torch.ones(MIB)
        del first
        second = torch.ones(3 * MIB)
        third = second + 1
        del second, third

    assert peak_bytes(run) == pytest.approx(24 * MIB, rel=0.01)


@pytest.mark.parametrize("what", ["training", "training the head too", "measuring"])
def test_vocabulary_adds_no_more_than_the_head(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """32k -> 152k: the head's own weights, and a tenth of them at most."""
    examples = rows(4, length=256, answer=200)
    assert 800 * SMALL > CHUNK_ELEMENTS  # all logits would be several chunks, with either vocabulary
    peaks = {}
    for size in (SMALL, LARGE):
        model = build(size, targets=["lm_head"] if what == "training the head too" else [])
        peaks[size] = peak_of_a_step(model, examples, measuring=what == "measuring")
    head = (LARGE - SMALL) * HIDDEN * 4
    with capsys.disabled():
        print(f"\n{what}, peak beyond weights, MiB: { ({v: round(p / MIB, 1) for v, p in peaks.items()}) }")
    assert peaks[LARGE] - peaks[SMALL] < 0.1 * head
    assert peaks[LARGE] < 800 * LARGE * 4  # all logits at once, in float32, would be more than the whole step


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_length_adds_nothing_at_constant_tokens(
    layout: Layout, checkpointing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(2048, checkpointing=checkpointing)
    tokens = 4096
    peaks = {
        length: peak_of_a_step(
            model, rows(tokens // length, length=length, answer=length // 4), layout=layout, budget=tokens
        )
        for length in (256, 1024, 4096)
    }
    with capsys.disabled():
        print(f"\n{layout}, step's peak beyond weights, MiB: { ({n: round(p / MIB, 1) for n, p in peaks.items()}) }")
    assert max(peaks.values()) < 1.1 * min(peaks.values())


def test_memory_of_a_step_is_that_of_its_largest_micro_batch() -> None:
    """Twice the rows under the same budget: the same peak."""
    model = build(2048)
    few, many = (peak_of_a_step(model, rows(count, length=256, answer=64), budget=1024) for count in (4, 16))
    assert many < 1.02 * few


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_estimate_behind_the_token_budget_is_no_less_than_a_layer_takes(checkpointing: bool) -> None:
    tokens = 2048
    few, many = (build(2048, layers=layers, checkpointing=checkpointing) for layers in (2, 10))
    less, more = (peak_of_a_step(model, rows(8, length=256, answer=16), budget=tokens) for model in (few, many))
    estimated = [
        activation_bytes(model.language_model.config, dtype=torch.float32, checkpointing=checkpointing)
        for model in (few, many)
    ]
    # The adapter's gradients and, of a layer that was recomputed, the inputs' images under A are there too at the peak:
    # as large as the rank, which is small beside any real model's width.
    adapters = [
        sum(
            p.numel() * 4 + ("lora_A" in name) * p.shape[0] * 4 * tokens
            for name, p in model.named_parameters()
            if p.requires_grad
        )
        for model in (few, many)
    ]
    assert (more - less - adapters[1] + adapters[0]) / tokens < 1.02 * (estimated[1] - estimated[0])
    assert (more - less) / tokens > 0.5 * (estimated[1] - estimated[0])  # nor is it far more


def test_a_tree_has_one_mask_for_all_layers() -> None:
    """A layer more costs a branching tree no more than chains of as many tokens."""
    draw = np.random.default_rng(0)
    document = draw.integers(0, 2000, 1024)
    ids = [np.concatenate([document, draw.integers(0, 2000, 129)]).astype(np.int32) for _ in range(8)]
    branching = [TokenizedExample(i + 1, 0, (Branch(row[:-16], row[-16:]),)) for i, row in enumerate(ids)]
    costs = {}
    for name, examples in {"tree": branching, "chains": rows(8, length=256, answer=16)}.items():
        less, more = (peak_of_a_step(build(2048, layers=layers), examples, layout="shared") for layers in (2, 6))
        costs[name] = more - less
    assert costs["tree"] < 1.1 * costs["chains"]
