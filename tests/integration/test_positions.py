"""Models whose positions depend on the longest row of a batch: planned so that no row changes another."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from loralab.config.schema import LoraConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.errors import ModelError
from loralab.layout.planner import Layout, Planner
from loralab.models.adapters import build_adapter
from loralab.models.families import Positions, check_positions, find_positions
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import run_micro_batches

CPU = torch.device("cpu")
ORIGINAL = 32
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _long_rope() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": ORIGINAL,
    }
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SHAPE, original_max_position_embeddings=ORIGINAL, rope_parameters=rope))


def _adapted(base: PreTrainedModel) -> SupervisedPeftModel:
    base.requires_grad_(False)
    model, _ = build_adapter(base, LoraConfig(r=4), seed=0)
    return model.eval()


def _examples() -> list[TokenizedExample]:
    draw = np.random.default_rng(0)
    prefix = draw.integers(3, 97, 20)
    # On both sides of the threshold, with a prefix that could be shared across it.
    lengths = (4, 30, 8, 40, 10, 25)
    rows = [np.concatenate([prefix, draw.integers(3, 97, length)]).astype(np.int32) for length in lengths]
    return [TokenizedExample(i + 1, 0, (Branch(row[:-3], row[-3:]),)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_long_and_short_rows_never_meet_under_long_rope(layout: Layout) -> None:
    model = _adapted(_long_rope())
    assert find_positions(model.language_model.config) == Positions("longrope", ORIGINAL)
    chosen = resolve_tree_kernel(model)
    assert chosen.value == "per_tree", chosen.reason
    model.tree_kernel = chosen.value
    planner = Planner(4096, layout=layout, position_threshold=ORIGINAL)
    alone = [planner([example]) for example in _examples()]

    def total(steps: list) -> float:
        with torch.no_grad():
            return sum(float(run_micro_batches(model, s.micro_batches, device=CPU).total) for s in steps)

    expected = total(alone)
    assert total([planner(_examples())]) == pytest.approx(expected, rel=1e-6)
    mixed = Planner(4096, layout=layout)(_examples())
    assert total([mixed]) != pytest.approx(expected, rel=1e-4)  # the trap is real


def test_dynamic_scaling_beyond_its_training_length_is_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    config = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).config
    check_positions(config, 128)
    with pytest.raises(ModelError, match="129 is beyond the 128 positions") as caught:
        check_positions(config, 129)
    assert "data.max_length: 128" in str(caught.value)
