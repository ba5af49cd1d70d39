"""GGUF files of a real pretrained Llama and real tokenizers, read back by transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loralab.data.prompts.templates import BOS_PREFIXES, TEMPLATES
from loralab.progress import Reporter
from loralab.workflows.export import ExportRequest, export

pytestmark = pytest.mark.slow


def give_template(folder: Path, prefix: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = prefix + TEMPLATES["none"]
    tokenizer.save_pretrained(folder)
    (folder / "merge.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_stories260k(data_folder: Path, tmp_path: Path, dtype: str) -> None:
    merged = Path(
        shutil.copytree(data_folder / "models" / "stories260k", tmp_path / "merged", copy_function=shutil.copy)
    )
    merged.chmod(0o755)
    give_template(merged, BOS_PREFIXES[" "])
    result = export(merged, ExportRequest("gguf", tmp_path / "out", dtype=dtype), reporter=Reporter())
    assert result["proof"]["logits"]["max_difference_in_standard_deviations"] <= 1e-5
    assert result["tokenizer"] == {"model": "llama", "pre": "default", "add_bos": True}


@pytest.mark.parametrize(
    ("name", "pre", "bos"), [("llama2", "default", " "), ("qwen2.5", "qwen2", None), ("gpt2", "gpt-2", None)]
)
def test_real_tokenizers(data_folder: Path, tmp_path: Path, name: str, pre: str, bos: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "tokenizers" / name)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 7, tie_word_embeddings=True, **shape))
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    give_template(tmp_path / "merged", "" if bos is None else BOS_PREFIXES[bos])
    result = export(tmp_path / "merged", ExportRequest("gguf", tmp_path / "out"), reporter=Reporter())
    assert result["tokenizer"]["pre"] == pre
    assert result["proof"]["tokenizer"]["equal"]
