"""What vLLM takes as LoRA, the ranks it can be told, and adapters written with one rank and scale."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loralab.errors import ProofError
from loralab.export import vllm
from loralab.export.vllm import Served, allowed_rank, serve_command, why_merged, write_adapter
from loralab.run import read_json
from loralab.workflows.inspect_modules import rank_and_scale
from support.tiny import build_model

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}
NAMES = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]


@pytest.mark.parametrize(
    ("changes", "names", "architecture", "words"),
    [
        ({}, NAMES, "LlamaForCausalLM", None),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 64}}, NAMES, "Qwen2ForCausalLM", None),
        ({"use_dora": True}, NAMES, "LlamaForCausalLM", "DoRA"),
        ({"peft_type": "VERA"}, NAMES, "LlamaForCausalLM", "VERA"),
        ({"peft_type": "IA3", "r": None}, NAMES, "LlamaForCausalLM", "IA3"),
        ({"modules_to_save": ["lm_head"]}, NAMES, "LlamaForCausalLM", "lm_head"),
        (
            {},
            [*NAMES, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
            "LlamaForCausalLM",
            "token",
        ),
        ({}, ["base_model.model.lm_head.lora_A.weight"], "LlamaForCausalLM", "lm_head"),
        ({}, NAMES, "GPT2LMHeadModel", "GPT2LMHeadModel"),
        ({"rank_pattern": {"q_proj": 1024}}, NAMES, "LlamaForCausalLM", "512"),
        ({"bias": "all"}, NAMES, "LlamaForCausalLM", "biases"),
    ],
)
def test_what_is_served_merged(changes: dict[str, Any], names: list[str], architecture: str, words: str | None) -> None:
    reason = why_merged({**PLAIN, **changes}, names, architecture)
    assert (reason is None) if words is None else (reason is not None and words in reason)


def test_ranks_are_rounded_up() -> None:
    assert [allowed_rank(rank) for rank in (1, 8, 9, 256, 257, 512)] == [8, 8, 16, 256, 320, 512]


def test_the_command_names_what_it_needs() -> None:
    command = serve_command(Served("org/base", "abc", "bfloat16", "nf4", 16), "price", Path("/out dir"))
    for words in ("serve org/base", "--enable-lora", "'price=/out dir'", "--max-lora-rank 16", "--revision abc"):
        assert words in command
    assert "--quantization bitsandbytes" in command
    assert "--enable-lora" not in serve_command(Served("/out", None, "float16"), "price", Path("/out"))


def save_adapter(folder: Path, **settings: Any) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(build_model("llama", vocabulary=50), config)
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(build_model("llama", vocabulary=50), folder).eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(20)[None]).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_of_different_rank_and_scale_become_one(tmp_path: Path, rslora: bool) -> None:
    patterns = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    source = save_adapter(tmp_path / "adapter", use_rslora=rslora, **patterns)
    config = read_json(source / "adapter_config.json")
    done = write_adapter(
        source,
        tmp_path / "out",
        scale_of=lambda name: rank_and_scale(config, name.removeprefix("base_model.model."))[1] or 0.0,
    )
    assert "one rank (7)" in done
    written = read_json(tmp_path / "out" / "adapter_config.json")
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (7, 7, False)
    before = logits(source)
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=1e-5, atol=1e-5 * float(before.std()))


def test_a_plain_adapter_is_left_as_it_is(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter")
    assert write_adapter(source, tmp_path / "out", scale_of=lambda _: 1.0) == "the adapter as it is"
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_an_update_that_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_adapter(tmp_path / "adapter", rank_pattern={"q_proj": 7})
    monkeypatch.setattr(vllm, "largest_rank", lambda config: 7)
    scales = iter([2.0] * 100)
    real = torch.zeros
    monkeypatch.setattr(vllm.torch, "zeros", lambda *shape: real(*shape) + 0.1)
    with pytest.raises(ProofError, match="changed"):
        write_adapter(source, tmp_path / "out", scale_of=lambda _: next(scales))
