"""Numbered decoder layers: where a model keeps them, and which a setting means."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from loralab.errors import ConfigError
from loralab.models.layer_stack import LayerStack, find_layer_stack, resolve_layers
from support import tiny
from support.families import build_family


class Holder(nn.Module):
    """A model with as many lists of layers as are named, each layer with two linear ones."""

    def __init__(self, text_layers: int | None, **lists: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=text_layers))
        for path, count in lists.items():
            outer, _, inner = path.partition("__")
            layers = [nn.ModuleDict({"q": nn.Linear(1, 1), "v": nn.Linear(1, 1)}) for _ in range(count)]
            self.add_module(outer, nn.ModuleDict({inner: nn.ModuleList(layers)}))


def stack_of(model: Any) -> LayerStack | None:
    return find_layer_stack(model, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])


@pytest.mark.parametrize(("family", "pattern"), [("gpt2", "h"), ("llama", "layers"), ("qwen2", "layers")])
def test_families_name_their_lists(family: Any, pattern: str) -> None:
    model: Any = tiny.build_model(family, vocabulary=16)
    if family == "gpt2":
        names = [name for name, _ in model.named_modules() if name.endswith("c_attn")]
        assert find_layer_stack(model, names) == LayerStack(pattern, 2)
    else:
        assert stack_of(model) == LayerStack(pattern, 2)


def test_the_decoders_list_is_told_from_a_towers_by_its_length() -> None:
    assert stack_of(Holder(3, vision__blocks=6, language__layers=3)) == LayerStack("layers", 3)
    assert stack_of(Holder(6, vision__blocks=6, language__layers=3)) == LayerStack("blocks", 6)
    # Where the configuration does not say, the one with most linear layers.
    assert stack_of(Holder(None, vision__blocks=2, language__layers=4)) == LayerStack("layers", 4)


def test_the_first_number_is_the_layers() -> None:
    stack = LayerStack("layers", 12)
    assert stack.number_of("model.layers.11.mlp.experts.3.up_proj") == 11
    assert stack.number_of("layers.2.fc") == 2
    assert stack.number_of("model.project_in") is None
    assert stack.number_of("model.sublayers.1.fc") is None
    mixture = build_family("mixtral", vocabulary=16)
    assert stack_of(mixture) == LayerStack("layers", mixture.config.num_hidden_layers)


def test_a_model_without_numbered_layers() -> None:
    assert find_layer_stack(Holder(2, body__layers=2), ["head"]) is None  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"layers_to_transform \[0\]: this model has no numbered layers"):
        resolve_layers([0], None)


def test_numbers_count_from_both_ends() -> None:
    stack = LayerStack("h", 12)
    assert resolve_layers([-4, -3, -2, -1], stack) == [8, 9, 10, 11]
    assert resolve_layers([3, 0, -12], stack) == [0, 3]
