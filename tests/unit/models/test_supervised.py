"""The path from token ids to token losses, against transformers' own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from loralab.config.schema import LoraConfig
from loralab.layout.planner import Planner
from loralab.models import token_loss
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import model_inputs
from support import tiny
from support.families import build_family
from support.layouts import (
    draw_adapter,
    largest_difference,
    loss_and_gradients,
    sharing_rows,
    transformers_loss_and_gradients,
)
from unit.layout.examples import example

VOCABULARY = 64
PADDED = Planner(4096, layout="padded")
PAIRS = [([0, 0], [0, 3]), ([4, 8, 15, 16, 23], [42]), ([1], [2, 3])]
# What stands behind the head: a bias, a scale, a divisor, a cap.
TAILS = ["phi", "cohere", "granite", "gemma2"]


def adapted(model: Any) -> tuple[SupervisedPeftModel, Any]:
    wrapped, choices = build_adapter(model, LoraConfig(r=2), seed=0)
    draw_adapter(wrapped, seed=1)
    wrapped.tree_kernel = "per_tree"
    return wrapped.eval(), choices["head"]


def token_losses(model: SupervisedPeftModel, *pairs: tuple[list[int], list[int]], **options: Any) -> Any:
    (batch,) = PADDED([example(pair) for pair in pairs]).micro_batches
    return model(**model_inputs(batch), **options)


def own_logits(model: SupervisedPeftModel, pair: tuple[list[int], list[int]]) -> Tensor:
    """Return the model's own logits for the tokens of the answer."""
    prompt, answer = pair
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", *TAILS])
def test_mean_of_token_losses_is_transformers_own_loss(family: Any) -> None:
    model, head = adapted(build_family(family, vocabulary=VOCABULARY))
    assert head.value == "gathered"
    prompt, answer = [5, 9, 2, 33], [7, 7, 0, 61]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    own = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
    losses = token_losses(model, (prompt, answer)).losses
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), own)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_changes_no_loss(family: Any) -> None:
    model, _ = adapted(build_family(family, vocabulary=VOCABULARY))
    alone = torch.cat([token_losses(model, pair).losses for pair in PAIRS])
    together = token_losses(model, *PAIRS)
    # The longest row comes first.
    torch.testing.assert_close(together.losses.sort().values, alone.sort().values)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["llama", *TAILS])
def test_statistics_are_those_of_the_models_own_logits(family: str, mode: Any) -> None:
    model, _ = adapted(build_family(family, vocabulary=VOCABULARY))
    for pair in PAIRS:
        likely = torch.distributions.Categorical(logits=own_logits(model, pair).double())
        answer = torch.tensor(pair[1])
        with mode():
            found = token_losses(model, pair, statistics=True)
        torch.testing.assert_close(found.losses.double(), -likely.log_prob(answer), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.entropies.double(), likely.entropy(), rtol=1e-5, atol=1e-5)
        assert torch.equal(found.correct, likely.logits.argmax(dim=-1) == answer)


class Squashed(LlamaForCausalLM):
    """A model that does to its logits what no setting tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.3 + 0.1 * output.logits.sin()
        return output


def squashed() -> SupervisedPeftModel:
    torch.manual_seed(0)
    config = build_family("llama", vocabulary=VOCABULARY).config
    model, head = adapted(Squashed(config).requires_grad_(False))
    assert head.value == "full logits"
    assert head.reason.startswith("the model changes logits behind its head")
    return model


def test_model_that_changes_its_logits_takes_full_logits() -> None:
    model = squashed()
    for pair in PAIRS:
        likely = torch.distributions.Categorical(logits=own_logits(model, pair))
        found = token_losses(model, pair, statistics=True)
        torch.testing.assert_close(found.losses, -likely.log_prob(torch.tensor(pair[1])))
        torch.testing.assert_close(found.entropies, likely.entropy())
        assert torch.equal(found.correct, likely.logits.argmax(dim=-1) == torch.tensor(pair[1]))


def test_full_logits_take_trees_too() -> None:
    model, rows = squashed(), sharing_rows(0, vocabulary=VOCABULARY)
    loss, gradients, _ = loss_and_gradients(model, PADDED, rows)
    for planner in (Planner(4096), Planner(60)):
        found, found_gradients, _ = loss_and_gradients(model, planner, rows)
        assert found == pytest.approx(loss, rel=1e-5)
        assert largest_difference(found_gradients, gradients) < 1e-5


def with_head(how: str, *, dropout: float = 0.0, family: str = "llama") -> SupervisedPeftModel:
    """Return a model whose head, or tied embedding, is trained."""
    settings: dict[str, Any] = {
        "adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
        "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "embedding and head trained whole": {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "embed_tokens"],
        },
    }[how]
    model = SupervisedPeftModel(
        build_family(family, vocabulary=VOCABULARY),
        PeftLoraConfig(r=4, lora_dropout=dropout, task_type="CAUSAL_LM", **settings),
    )
    draw_adapter(model, seed=1)
    model.tree_kernel = "per_tree"
    return model


HEADS = ["adapter on the head", "head trained whole", "embedding and head trained whole"]


def trained_gradients(model: SupervisedPeftModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(bool(gradient.any()) for gradient in found.values())
    return found


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 1000])
@pytest.mark.parametrize("how", HEADS)
def test_trained_head_gets_transformers_own_gradients(
    how: str, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", rows_a_chunk * VOCABULARY)
    model = with_head(how).train()
    assert model.check_head() is None
    prompt, answer = [5, 9, 2, 33], [7, 7, 0, 61, 8, 8, 3]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    own = trained_gradients(model, model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss)
    assert any("lm_head" in name for name in own)
    losses = token_losses(model, (prompt, answer)).losses
    assert largest_difference(trained_gradients(model, losses.mean()), own) < 1e-5


@pytest.mark.parametrize("how", HEADS)
def test_trained_head_with_dropout_is_the_same_in_every_layout_and_chunk(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = with_head(how, dropout=0.4).train(), sharing_rows(0, vocabulary=VOCABULARY)

    def gradients(planner: Planner) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in planner(rows).micro_batches:
            model(**model_inputs(batch), dropout_key=(1, 2)).losses.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(PADDED)
    for rows_a_chunk in (2, 1000):
        monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", rows_a_chunk * VOCABULARY)
        for planner in (PADDED, Planner(90, layout="packed"), Planner(4096, layout="packed")):
            assert largest_difference(gradients(planner), expected) < 1e-5, planner


def test_adapter_on_a_tied_embedding_is_an_adapter_on_the_head() -> None:
    """The head is called as a module, never by its weight: what PEFT put around either must act."""
    base = build_family("qwen2", vocabulary=VOCABULARY)
    config = PeftLoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="tied"):
        model = SupervisedPeftModel(base, config)
    draw_adapter(model, seed=1)
    assert model.check_head() is None
    pair = ([5, 9, 2], [7, 1])
    likely = torch.distributions.Categorical(logits=own_logits(model.eval(), pair))
    torch.testing.assert_close(token_losses(model, pair).losses.detach(), -likely.log_prob(torch.tensor(pair[1])))


def test_check_head_keeps_the_mode_and_the_random_state() -> None:
    model, _ = adapted(tiny.build_model("gpt2", vocabulary=VOCABULARY))
    model.train()
    state = torch.get_rng_state()
    assert model.check_head() is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_forward_without_positions_is_pefts_own() -> None:
    model, _ = adapted(tiny.build_model(vocabulary=VOCABULARY))
    ids = torch.arange(5)[None]
    own = model.language_model(input_ids=ids).logits
    token_losses(model, *PAIRS)
    rows = sharing_rows(0, vocabulary=VOCABULARY)
    loss_and_gradients(model, Planner(4096), rows)  # leaves the attention of trees behind
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, own)
    assert model.embedding is model.language_model.get_input_embeddings()


def test_generation_is_transformers_own_after_trees() -> None:
    model, _ = adapted(tiny.build_model(vocabulary=VOCABULARY))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    before = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    loss_and_gradients(model, Planner(4096), sharing_rows(0, vocabulary=VOCABULARY))
    model.eval()
    assert torch.equal(model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options), before)


def test_trees_without_attention_for_them_are_refused() -> None:
    model, _ = adapted(tiny.build_model(vocabulary=VOCABULARY))
    model.tree_kernel = None
    with pytest.raises(ValueError, match="a row of trees"):
        loss_and_gradients(model, Planner(4096), sharing_rows(0, vocabulary=VOCABULARY))


def test_gradients_reach_every_adapter_tensor_and_nothing_else() -> None:
    model, _ = adapted(build_family("llama", vocabulary=VOCABULARY))
    token_losses(model.train(), ([1, 2, 3], [4, 5])).losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


@pytest.mark.parametrize("family", TAILS)
def test_gradients_pass_what_stands_behind_the_head(family: str) -> None:
    model, _ = adapted(build_family(family, vocabulary=VOCABULARY))
    rows = sharing_rows(0, vocabulary=VOCABULARY)
    own, own_gradients = transformers_loss_and_gradients(model, rows)
    loss, gradients, _ = loss_and_gradients(model, PADDED, rows)
    assert loss == pytest.approx(own, rel=1e-5)
    assert largest_difference(gradients, own_gradients) < 1e-5
