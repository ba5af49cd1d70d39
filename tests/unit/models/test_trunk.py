"""Modules in the place of frozen layers: where a model is cut, and that it is whole again behind a forward."""

from typing import Any

import pytest
import torch
from torch import nn

from loralab.config.schema import LoraConfig
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.trunk import UncuttableModel, find_trunk
from support.families import build_family

VOCABULARY = 97
INPUTS: dict[str, Any] = {
    "input_ids": torch.arange(3, 11)[None],
    "attention_mask": torch.ones(1, 8, dtype=torch.long),
    "position_ids": torch.arange(8)[None],
}


def build(family: str = "llama", **lora: Any) -> SupervisedPeftModel:
    settings = {"r": 4, "layers_to_transform": [1]} | lora
    return build_adapter(build_family(family, vocabulary=VOCABULARY), LoraConfig(**settings), seed=0)[0]


@pytest.mark.parametrize(
    ("lora", "first"),
    [
        ({}, 1),
        ({"layers_to_transform": [0]}, 0),
        ({"layers_to_transform": None}, 0),
        ({"modules_to_save": ["norm"]}, 1),
    ],
)
def test_the_cut_is_below_the_lowest_adapter(lora: dict[str, Any], first: int) -> None:
    assert find_trunk(build(**lora).body, layers=2).first == first


def test_a_frozen_adapter_counts_too() -> None:
    model = build(layers_to_transform=None)
    model.requires_grad_(False)
    assert find_trunk(model.body, layers=2).first == 0


def test_a_model_without_such_a_list_is_refused() -> None:
    with pytest.raises(UncuttableModel, match="the model has 0 lists of 3 layers"):
        find_trunk(build().body, layers=3)


def test_trained_weights_in_front_of_the_layers_are_seen() -> None:
    model = build(trainable_token_indices=[5, 90])  # 90 is not among the tokens of the forward
    trunk = find_trunk(model.body, layers=2)
    with pytest.raises(UncuttableModel, match="weights are trained in front of the layers"), trunk.observing():
        model.hidden_states(**INPUTS)


class _TwoStates(nn.Module):
    """A layer that passes on more than hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.stack([self.layer(*args, **kwargs)] * 2)[0][None].repeat(2, 1, 1, 1)[0], torch.zeros(1)


def test_layers_that_pass_on_more_are_refused() -> None:
    model = build()
    trunk = find_trunk(model.body, layers=2)
    own = trunk.layers[1]
    trunk.layers[1] = _TwoStates(own)
    with pytest.raises(UncuttableModel, match="more than one tensor"), trunk.observing(), pytest.raises(AttributeError):
        model.hidden_states(**INPUTS)


def test_a_forward_starts_at_the_cut_and_leaves_the_model_as_it_was() -> None:
    model = build("gemma2")
    names, layers = [name for name, _ in model.named_parameters()], list(find_trunk(model.body, layers=2).layers)
    trunk = find_trunk(model.body, layers=2)
    with trunk.observing():
        whole = model.hidden_states(**INPUTS)
    with torch.no_grad(), trunk.computing() as recorder:
        model.hidden_states(**INPUTS)
    assert recorder.states is not None
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, place=place: ran.append(place)) for place, layer in enumerate(layers)
    ]
    with trunk.starting_at(recorder.states):
        behind = model.hidden_states(**INPUTS)
    for hook in hooks:
        hook.remove()
    assert ran == [1]
    assert torch.equal(whole, behind)
    with pytest.raises(UncuttableModel, match="of shape"), trunk.starting_at(recorder.states[:, :4]):
        model.hidden_states(**INPUTS)
    assert list(trunk.layers) == layers
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_below_keep_nothing_for_the_backward_sweep(checkpointing: bool) -> None:
    """The forward that runs them needs no switch of its own: nothing below the adapter has a gradient."""
    base = build_family("llama", vocabulary=VOCABULARY)
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    model, _ = build_adapter(base, LoraConfig(r=4, layers_to_transform=[1]), seed=0)
    trunk = find_trunk(model.body, layers=2)
    outputs: list[torch.Tensor] = []
    hook = trunk.layers[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model.train()
    assert model.hidden_states(**INPUTS).requires_grad
    hook.remove()
    assert [output.requires_grad for output in outputs] == [False]
