"""Target layers: names, patterns, numbered layers, and what PEFT makes of them."""

import re
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.targets import adapted_layers, linear_layers, placement, resolve_target_modules
from support import tiny
from support.families import build_family

VOCABULARY = 64


def base(family: Any = "llama") -> Any:
    if family == "gpt_neox":
        shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **shape)).eval()
    if family == "opt":  # with linear layers outside the numbered ones
        shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 32}
        return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=8, **shape)).eval()
    return tiny.build_model(family, vocabulary=VOCABULARY).eval()


def adapted(family: Any = "llama", **lora: Any) -> SupervisedPeftModel:
    return build_adapter(base(family), LoraConfig(**{"r": 2, **lora}), seed=0)[0]


def layers_of(model: SupervisedPeftModel) -> set[str]:
    """Return the layers that PEFT gave an adapter."""
    return {
        re.sub(r"^base_model\.model\.|\.lora_A\..*", "", name)
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


def ranks_of(model: SupervisedPeftModel) -> dict[str, int]:
    return {
        re.sub(r"^base_model\.model\.|\.lora_A\..*", "", name): weight.shape[0]
        for name, weight in model.named_parameters()
        if "lora_A" in name
    }


def problem(family: Any = "llama", **lora: Any) -> Any:
    """Return what is said of a setting that does not fit."""
    with pytest.raises(ConfigError) as caught:
        adapted(family, **lora)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("family", "last_parts"),
    [
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("llama", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("qwen2", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_auto_is_every_linear_layer_but_the_head(family: str, last_parts: list[str]) -> None:
    model = base(family)
    chosen = resolve_target_modules(model, LoraConfig())
    assert (chosen.value, chosen.reason) == (last_parts, "all linear layers but the head")
    layers = set(linear_layers(model))
    assert "lm_head" not in layers
    assert layers_of(build_adapter(model, LoraConfig(r=2), seed=0)[0]) == layers


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_attention_is_the_layers_inside_attention(family: str) -> None:
    model = base(family)
    chosen = resolve_target_modules(model, LoraConfig(target_modules="attention"))
    assert chosen.value == ["k_proj", "o_proj", "q_proj", "v_proj"]
    wanted = {name for name in linear_layers(model) if "self_attn" in name}
    assert layers_of(adapted(family, target_modules="attention")) == wanted


def test_model_without_a_known_attention_lists_its_layers() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": VOCABULARY}
    with pytest.raises(ConfigError, match="no attention layer was recognised") as caught:
        resolve_target_modules(MambaForCausalLM(MambaConfig(**shape)), LoraConfig(target_modules="attention"))
    assert "in_proj" in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("setting", "layers"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
    ],
)
def test_named_layers(setting: Any, layers: set[str]) -> None:
    assert layers_of(adapted(target_modules=setting)) == layers


def test_layers_that_fused_kernels_read_past_an_adapter_are_left_out() -> None:
    mamba = build_family("mamba", vocabulary=VOCABULARY)
    chosen = resolve_target_modules(mamba, LoraConfig())
    assert chosen.value == ["in_proj", "x_proj"]
    assert "conv1d, dt_proj, out_proj" in chosen.reason
    with pytest.raises(ConfigError, match="layer 'out_proj' is read by the model's fused kernels") as caught:
        resolve_target_modules(mamba, LoraConfig(target_modules=["in_proj", "out_proj"]))
    assert caught.value.problems[0].fix == "layers of this model: in_proj, x_proj"
    build_adapter(mamba, LoraConfig(), seed=0)  # PEFT takes what was chosen


@pytest.mark.parametrize(
    ("setting", "what", "fix"),
    [
        (
            ["q_proj", "q_prj"],
            "no linear layer is named 'q_prj'",
            "did you mean 'q_proj'? layers of this model: down_proj",
        ),
        ("proj", "no linear layer is named 'proj'", "layers of this model: "),
        (
            ["lm_head"],
            "layer 'lm_head' is the output head, which takes no adapter in this version",
            "down_proj",
        ),
        (
            ["embed_tokens"],
            "layer 'embed_tokens' is an embedding, which takes no adapter in this version",
            "down_proj",
        ),
        ([], "no linear layer is named (nothing)", "layers of this model: "),
    ],
)
def test_unknown_layer_is_an_error(setting: Any, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_target_modules(base(), LoraConfig(target_modules=setting))
    assert caught.value.problems[0].what == what
    assert fix in caught.value.problems[0].fix


# --- words and patterns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mamba"])
def test_all_linear_is_auto(family: str) -> None:
    model = build_family(family, vocabulary=VOCABULARY)
    found = [resolve_target_modules(model, LoraConfig(target_modules=word)) for word in ("auto", "all-linear")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("family", "pattern", "wanted"),
    [
        ("llama", r".*\.(q|v)_proj", r"\.[qv]_proj$"),
        ("llama", r"model\.layers\.1\.mlp\..*", r"layers\.1\.mlp\."),
        ("gpt2", r"transformer\.h\.0\.(attn|mlp)\.c_proj", r"h\.0\..*c_proj"),
        ("gpt2", r".*attn\.c_proj", r"attn\.c_proj"),
        ("opt", r".*layers\.[02]\.fc\d", r"layers\.[02]\.fc"),
    ],
)
def test_regular_expression_is_matched_with_whole_names(family: str, pattern: str, wanted: str) -> None:
    expected = {name for name in linear_layers(base(family)) if re.search(wanted, name)}
    assert expected
    assert layers_of(adapted(family, target_modules=pattern)) == expected


def test_regular_expression_leaves_what_it_does_not_match_whole() -> None:
    assert "no linear layer's whole name matches 'q_pro.*'" in problem(target_modules="q_pro.*").what
    assert "they end in down_proj" in problem(target_modules="q_pro.*").fix


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(q_proj", "not a regular expression: '(q_proj' (missing ), unterminated subpattern at character 1)"),
        (".*", "layer 'model.embed_tokens' is an embedding, which takes no adapter"),
        (".*(lm_head|q_proj)", "layer 'lm_head' is the output head, which takes no adapter"),
    ],
)
def test_unusable_regular_expression(pattern: str, what: str) -> None:
    assert problem(target_modules=pattern).what.startswith(what)


def test_misspelled_word_is_no_regular_expression() -> None:
    found = problem(target_modules="atention")
    assert found.what == "no linear layer is named 'atention'"
    assert found.fix.startswith("did you mean 'attention'?")


# --- numbered layers ---------------------------------------------------------------------------------------------

PATTERNS = {"gpt2": "h", "llama": "layers", "qwen2": "layers", "gpt_neox": "layers", "opt": "layers"}


@pytest.mark.parametrize("family", PATTERNS)
@pytest.mark.parametrize("setting", [[0], [-1], [0, -1], [1, -1]])
def test_numbered_layers(family: str, setting: list[int]) -> None:
    model = base(family)
    count = model.config.num_hidden_layers
    numbers = {number % count for number in setting}
    wanted = {
        name
        for name in linear_layers(model)
        if re.search(rf"\.{PATTERNS[family]}\.({'|'.join(map(str, numbers))})\.", name)
    }
    assert wanted
    lora = LoraConfig(r=2, layers_to_transform=setting)
    targets = resolve_target_modules(model, lora).value
    assert set(adapted_layers(lora, model, targets)) == wanted
    assert placement(lora, model, targets)["layers_pattern"] == [PATTERNS[family]]
    assert layers_of(build_adapter(model, lora, seed=0)[0]) == wanted


def test_numbers_and_names_act_together() -> None:
    assert layers_of(adapted(layers_to_transform=[1], target_modules=["q_proj", "layers.1.mlp.up_proj"])) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert layers_of(adapted(layers_to_transform=[-1], target_modules=r".*\.q_proj")) == {
        "model.layers.1.self_attn.q_proj"
    }


@pytest.mark.parametrize(
    ("family", "lora", "what", "fix"),
    [
        ("llama", {"layers_to_transform": [2]}, "no layer 2: the model has 2 layers", "from 0 to 1, or from -2 to -1"),
        ("llama", {"layers_to_transform": [-3]}, "no layer -3: the model has 2 layers", "from 0 to 1"),
        ("llama", {"layers_to_transform": []}, "layers_to_transform names no layer: []", "from 0 to 1"),
        (
            "llama",
            {"layers_to_transform": [0], "target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]},
            "no layer is left for 'model.layers.1.mlp.up_proj'",
            "layers that are left: down_proj",
        ),
        (
            "opt",
            {"layers_to_transform": [0], "target_modules": ["project_in", "fc1"]},
            "no layer is left for 'project_in'",
            "layers that are left: fc1",
        ),
    ],
)
def test_number_that_does_not_fit(family: str, lora: dict[str, Any], what: str, fix: str) -> None:
    found = problem(family, **lora)
    assert found.what == what
    assert fix in found.fix
    assert "key lora.layers_to_transform" in found.where


# --- ranks and scales --------------------------------------------------------------------------------------------


def test_patterns_of_rank_and_alpha() -> None:
    model = adapted(
        alpha=4,
        rank_pattern={"q_proj": 3, r"layers\.1\..*_proj": 5},
        alpha_pattern={"model.layers.0.mlp.up_proj": 7.0},
    )
    for name, rank in ranks_of(model).items():
        assert rank == (3 if name.endswith("q_proj") else 5 if "layers.1" in name else 2), name
        layer = model.get_submodule(f"base_model.model.{name}")
        alpha = 7.0 if name == "model.layers.0.mlp.up_proj" else 4.0
        assert layer.scaling["default"] == pytest.approx(alpha / rank), name


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "what", "fix"),
    [
        ({"q_prj": 4}, "no adapted layer is named 'q_prj'", "did you mean 'q_proj'? layers with an adapter: "),
        ({"lm_head": 4}, "no adapted layer is named 'lm_head'", "layers with an adapter: down_proj"),
        ({"layers.0.mlp.up_proj": 4}, "no adapted layer is named 'layers.0.mlp.up_proj'", "layers with an adapter"),
        ({"q_proj": 4, "(v": 2}, "not a regular expression: '(v'", "mend it"),
        ({".*_proj": 4, "q_proj": 2}, "'q_proj' comes too late: all its layers match an entry before it", "first"),
    ],
)
def test_pattern_that_does_not_act(key: str, pattern: dict[str, int], what: str, fix: str) -> None:
    found = problem(layers_to_transform=[1], **{key: pattern})
    assert found.what.startswith(what)
    assert fix in found.fix
    assert found.where == f"key lora.{key}"


def test_placement_holds_only_what_was_asked_for() -> None:
    model = base()
    assert placement(LoraConfig(), model, ["q_proj"]) == {"target_modules": ["q_proj"]}


def test_numbered_linear_layers_are_not_taken_for_decoder_layers() -> None:
    model = base()
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(2)])
    expected = set(linear_layers(model))
    assert "model.layers.0.mlp.experts.1" in expected
    assert layers_of(build_adapter(model, LoraConfig(r=2), seed=0)[0]) == expected
    again = base()
    again.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(2)])
    with pytest.raises(ConfigError, match="layer '1' is also the name of a LlamaDecoderLayer: a longer name"):
        resolve_target_modules(again, LoraConfig(target_modules=["1"]))
    chosen = resolve_target_modules(again, LoraConfig(target_modules=["experts.1"]))
    assert layers_of(build_adapter(again, LoraConfig(r=2, target_modules=chosen.value), seed=0)[0]) == {
        "model.layers.0.mlp.experts.1"
    }


def test_a_layer_with_many_experts_is_quickly_told_apart() -> None:
    """Names are told apart by counting endings, not by comparing each with each."""
    experts = torch.nn.ModuleList([torch.nn.ModuleDict({"w1": torch.nn.Linear(1, 1)}) for _ in range(3000)])
    model = base()
    model.model.layers[0].mlp.experts = experts
    found = resolve_target_modules(model, LoraConfig(target_modules=r".*experts\.\d*7\.w1"))
    assert len(found.value) == 300
