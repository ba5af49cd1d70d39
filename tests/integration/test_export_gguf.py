"""GGUF files of tiny models: read back by transformers they answer alike; a wrong one leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loralab.data.prompts.templates import TEMPLATES
from loralab.errors import ModelError
from loralab.export import gguf_file, gguf_proof
from loralab.export.gguf_architectures import choose_architecture
from loralab.progress import Reporter
from loralab.workflows.export import ExportRequest, export
from support.command import read_problems, run_here
from support.tiny import build_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector's walk over all that tests have loaded takes more time than a proof."""
    monkeypatch.setattr(gguf_proof.gc, "collect", lambda: 0)


def save_merged(folder: Path, family: str, *, tied: bool, **settings: Any) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATES["none"]
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config_class, model_class = kinds[family]
    torch.manual_seed(1)
    values = {**SHAPE, "vocab_size": len(tokenizer) + 3, "tie_word_embeddings": tied, **settings}
    model = model_class(config_class(**values))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # biases of zero and norms of one would hide a mistake
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "merge.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "settings"),
    [
        ("llama", True, "f16", {}),
        ("llama", False, "f32", {}),
        ("llama", False, "f16", {"head_dim": 16}),
        ("llama", True, "f32", {"rope_parameters": LLAMA3}),
        ("qwen2", True, "f16", {}),
        ("qwen2", False, "f32", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_a_file_answers_as_the_merged_model(
    tmp_path: Path, family: str, tied: bool, dtype: str, settings: dict[str, Any]
) -> None:
    merged = save_merged(tmp_path / "merged", family, tied=tied, **settings)
    result = export(merged, ExportRequest("gguf", tmp_path / "out", dtype=dtype), reporter=Reporter())
    assert result["proof"]["logits"]["max_difference_in_standard_deviations"] <= 1e-5
    assert (result["proof"]["rounding_kl_nats"] > 0) == (dtype == "f16")
    assert result["tokenizer"]["pre"] in ("gpt-2", "qwen2")
    assert ("rotary_factors" in result["proof"]) == ("rope_parameters" in settings and family == "llama")
    written = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert set(written["files"]) == {result["file"], "Modelfile"}
    assert f"FROM ./{result['file']}" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("broken", ["blk.1.attn_q.weight", "output_norm.weight", "token_embd.weight"])
def test_a_wrong_tensor_is_found_and_nothing_is_left(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = save_merged(tmp_path / "merged", "llama", tied=True)
    read = gguf_file.read_array

    def spoil(tensor: torch.Tensor, name: str, *, dtype: str) -> Any:
        array = np.array(read(tensor, name, dtype=dtype))
        if name == broken:
            array.flat[3] += 1
        return array

    monkeypatch.setattr(gguf_file, "read_array", spoil)
    problems = read_problems(run_here("export", merged, "--to", "gguf", "--output", tmp_path / "out"), code=3)
    assert "logits differ" in problems[0].what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_rows_in_the_wrong_order_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = save_merged(tmp_path / "merged", "llama", tied=True)
    monkeypatch.setattr(gguf_file, "lay_out", lambda name, array, config, architecture: array)
    read_problems(run_here("export", merged, "--to", "gguf", "--output", tmp_path / "out"), code=3)


def test_float16_that_is_too_small_is_refused(tmp_path: Path) -> None:
    merged = save_merged(tmp_path / "merged", "llama", tied=True)
    model = LlamaForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    model.save_pretrained(merged)
    problems = read_problems(run_here("export", merged, "--to", "gguf", "--output", tmp_path / "out"))
    assert "float16" in problems[0].what
    assert problems[0].fix == "give --dtype f32"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(**SHAPE, attention_bias=True), "biases"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "gelu"),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "linear"),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=0), "sliding window"),
        (Qwen2Config(**SHAPE, rope_parameters=LLAMA3), "llama3"),
    ],
)
def test_settings_without_a_place_are_refused(config: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        choose_architecture(config)
