"""Tokenizers and a pretrained model, loaded as loralab loads them, against numbers of other implementations."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from loralab.config.schema import LoraConfig, ModelConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.data.prompts.prompter import Prompter, apply_stop_setting
from loralab.data.prompts.templates import TEMPLATES
from loralab.evaluation.generate import GenerationSettings, generate_answers
from loralab.evaluation.perplexity import measure_loss
from loralab.layout.planner import Layout, Planner
from loralab.models.adapters import build_adapter
from loralab.models.load import count_parameters, load_base_model, load_tokenizer
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
STORIES = "models/stories260k"
TOKENIZERS = {
    "gpt2": "tokenizers/gpt2",
    "qwen2.5": "tokenizers/qwen2.5",
    "llama2": "tokenizers/llama2",
    "stories260k": STORIES,
}


@pytest.fixture(scope="module")
def reference(data_folder: Path) -> dict[str, Any]:
    """Return the numbers that the llama2.c model gave."""
    return dict(json.loads((data_folder / "oracles/stories260k_reference.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def model(data_folder: Path) -> SupervisedPeftModel:
    """Return stories260k with a fresh adapter, which changes nothing."""
    config = ModelConfig(name=str(data_folder / STORIES), device="cpu", precision="float32")
    base, _ = load_base_model(config, dtype=torch.float32, device=CPU)
    adapted, _ = build_adapter(base, LoraConfig(), seed=0)
    return adapted.eval()


@pytest.fixture
def stories_tokenizer(data_folder: Path) -> PreTrainedTokenizerBase:
    """Return a fresh tokenizer of stories260k."""
    return load_tokenizer(ModelConfig(name=str(data_folder / STORIES)))


def example_of(ids: list[int]) -> TokenizedExample:
    """Return a row in which every token but the first carries loss."""
    return TokenizedExample(1, 0, (Branch(np.asarray(ids[:1], np.int32), np.asarray(ids[1:], np.int32)),))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_gives_the_recorded_ids(name: str, data_folder: Path) -> None:
    """Every recorded string has the recorded ids, special tokens as the tokenizer adds them."""
    tokenizer = load_tokenizer(ModelConfig(name=str(data_folder / TOKENIZERS[name])))
    vectors = json.loads((data_folder / "oracles/tokenizer_vectors.json").read_text(encoding="utf-8"))
    assert len(vectors) >= 23
    wrong = [vector["text"] for vector in vectors if tokenizer(vector["text"])["input_ids"] != vector[name]["ids"]]
    assert wrong == []


def test_fresh_adapter_changes_no_parameter_of_the_base(model: SupervisedPeftModel, reference: dict[str, Any]) -> None:
    """The base has the published number of parameters, all frozen; the adapter's B matrices are zero."""
    total, trainable = count_parameters(model)
    assert total - trainable == reference["num_parameters"]
    lora_b = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert lora_b
    assert all(not parameter.any() for parameter in lora_b)
    assert model.full_logits_reason is None


def test_log_probabilities_agree(
    model: SupervisedPeftModel, stories_tokenizer: PreTrainedTokenizerBase, reference: dict[str, Any]
) -> None:
    """Head and adapter at gathered hidden states give llama2.c's log-probabilities and last logits."""
    ids = stories_tokenizer(reference["text"])["input_ids"]
    assert ids == reference["ids_with_bos"]
    inputs = torch.tensor([ids])
    positions = torch.arange(len(ids))
    with torch.no_grad():
        hidden = model.hidden_states(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), position_ids=positions[None]
        )
        logits = model.head(hidden[0])
    found = logits.log_softmax(-1)[:-1].gather(1, inputs[0, 1:, None])[:, 0]
    expected = torch.tensor(reference["token_logprobs_from_second_token"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    top = logits[-1].topk(10)
    assert top.indices.tolist() == reference["last_position_top10_ids"]
    torch.testing.assert_close(top.values, torch.tensor(reference["last_position_top10_logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_perplexity_agrees(layout: Layout, model: SupervisedPeftModel, reference: dict[str, Any]) -> None:
    """`measure_loss` gives llama2.c's mean negative log-likelihood, each token's share of it, and the perplexity."""
    ids = reference["ids_with_bos"]
    model.tree_kernel = resolve_tree_kernel(model).value
    planner = Planner(token_budget=4096, layout=layout)
    # Rows of different length in one batch: neither padding nor a shared beginning may reach the loss of any.
    lengths = (len(ids), 20, 2, 41)
    measured = measure_loss(
        model,
        [example_of(ids[:length]) for length in lengths],
        planner=planner,
        batch_size=4,
        device=CPU,
        reporter=Reporter(),
        label="oracle",
    )
    expected = [-sum(reference["token_logprobs_from_second_token"][: length - 1]) for length in lengths]
    assert measured.counts.tolist() == [length - 1 for length in lengths]
    assert measured.totals == pytest.approx(expected, abs=1e-3)
    assert measured.totals[0] / measured.counts[0] == pytest.approx(reference["mean_nll"], abs=1e-5)
    assert math.exp(measured.totals[0] / measured.counts[0]) == pytest.approx(reference["perplexity"], abs=1e-4)


def test_greedy_text_agrees(
    model: SupervisedPeftModel, stories_tokenizer: PreTrainedTokenizerBase, reference: dict[str, Any]
) -> None:
    """From <s> alone, greedy generation writes llama2.c's text, token by token."""
    text = reference["prompt_bos_only_greedy_text"]
    reference_tokens = len(stories_tokenizer(text, add_special_tokens=False)["input_ids"])
    assert reference_tokens == 257
    apply_stop_setting(stories_tokenizer, ["<s>"])
    stories_tokenizer.chat_template = TEMPLATES["none"]
    prompter = Prompter(stories_tokenizer, ["<s>"])
    settings = GenerationSettings(max_new_tokens=reference_tokens)
    answers = generate_answers(
        model, [[1]], prompter=prompter, settings=settings, batch_size=1, reporter=Reporter(), label="oracle"
    )
    assert prompter.stop.ids == (1,)
    assert (answers[0].text, answers[0].tokens, answers[0].stopped) == (text, reference_tokens, False)
