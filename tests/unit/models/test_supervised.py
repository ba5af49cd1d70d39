"""The path from hidden states to token losses, against transformers' own."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from loralab.config.schema import LoraConfig
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from support import tiny
from unit.layout.examples import example

VOCABULARY = 64


def scaling_model(name: str) -> Any:
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    shape |= {"Granite": {"logits_scaling": 8.0}, "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0}}.get(
        name, {}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)  # as wide as a trained model's, so that a cap is felt
    return model


def adapted(model: Any) -> tuple[SupervisedPeftModel, Any]:
    wrapped, choices = build_adapter(model, LoraConfig(r=2), seed=0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped.eval(), choices["head"]


def token_losses(model: SupervisedPeftModel, *pairs: tuple[list[int], list[int]]) -> torch.Tensor:
    (batch,) = Planner(len(pairs))([example(pair) for pair in pairs]).micro_batches
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids[0],
        label_positions=batch.label_positions,
        labels=batch.labels,
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_mean_of_token_losses_is_transformers_own_loss(family: Any) -> None:
    model, head = adapted(tiny.build_model(family, vocabulary=VOCABULARY))
    assert head.value == "gathered"
    prompt, answer = [5, 9, 2, 33], [7, 7, 0, 61]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    own = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
    losses = token_losses(model, (prompt, answer))
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), own)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_changes_no_loss(family: Any) -> None:
    model, _ = adapted(tiny.build_model(family, vocabulary=VOCABULARY))
    pairs = [([0, 0], [0, 3]), ([4, 8, 15, 16, 23], [42]), ([1], [2, 3])]
    alone = torch.cat([token_losses(model, pair) for pair in pairs])
    torch.testing.assert_close(token_losses(model, *pairs), alone)


@pytest.mark.parametrize("name", ["Cohere", "Granite", "Gemma2"])
def test_model_that_changes_its_logits_takes_full_logits(name: str) -> None:
    model, head = adapted(scaling_model(name))
    assert head.value == "full logits"
    assert head.reason.startswith("the model changes logits behind its head")
    prompt, answer = [5, 9, 2], [7, 1]
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, 2:4]
    own = functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="none")
    torch.testing.assert_close(token_losses(model, (prompt, answer)), own)


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
    assert torch.equal(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)
    assert model.embedding is model.language_model.get_input_embeddings()


def test_gradients_reach_every_adapter_tensor_and_nothing_else() -> None:
    model, _ = adapted(tiny.build_model(vocabulary=VOCABULARY))
    token_losses(model.train(), ([1, 2, 3], [4, 5])).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name
