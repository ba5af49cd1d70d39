"""Bytes and words of WikiText-2 as perplexities are divided by them: those of the file, wherever it is cut."""

from pathlib import Path

import pytest

from loralab.config.schema import DataConfig, ModelConfig
from loralab.data.dataset import prepare_data
from loralab.evaluation.volumes import measure_volumes
from loralab.models.load import load_tokenizer
from loralab.progress import Reporter

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        # With a bos token all text is predicted. The text begins with a blank, and such a tokenizer puts one before
        # texts without: the tokens are the same, so this byte is never counted.
        ("models/stories260k", " "),
        ("tokenizers/llama2", " "),
        # Without one, nothing predicts the first token.
        ("tokenizers/gpt2", " "),
        ("tokenizers/qwen2.5", " \n"),
    ],
)
@pytest.mark.parametrize("max_length", [8, 64, 256, 1024])
def test_bytes_and_words_are_those_of_the_file(
    data_folder: Path, tmp_path: Path, name: str, unseen: str, max_length: int
) -> None:
    path = data_folder / "text/wikitext-2/valid.txt"
    text = path.read_text(encoding="utf-8")
    assert text.startswith(unseen)
    section = DataConfig(
        train=str(path), validation=None, format="text", max_length=max_length, cache_dir=str(tmp_path)
    )
    data = prepare_data(section, load_tokenizer(ModelConfig(name=str(data_folder / name))), reporter=Reporter())
    volumes, words = measure_volumes(data.splits["train"], data.prompter, reporter=Reporter())
    assert volumes.sum() == len(text.encode()) - len(unseen)
    assert words.sum() == len(text.split())
