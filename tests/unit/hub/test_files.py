"""What may leave the machine, and that later writes do not reach what was laid out for a push."""

import json
from pathlib import Path

import pytest

from loralab.errors import HubError
from loralab.hub.files import pushable_files, stage_adapter
from loralab.run import write_text

FILES = {
    "adapter_config.json": json.dumps({"base_model_name_or_path": "/srv/models/llama", "r": 4}),
    "adapter_model.safetensors": "weights",
    "adapter_facts.json": "{}",
    "README.md": "card",
    "tokenizer.json": "{}",
}
OTHERS = ("run.json", ".env", "token", "optimizer.pt", "training_args.bin", "adapter_model.bin", "code.py")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in OTHERS:
        (folder / name).write_text("x", encoding="utf-8")
    return folder


def test_only_an_adapters_files_are_pushed(adapter: Path) -> None:
    assert set(pushable_files(adapter)) == set(FILES)


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_facts.json"])
@pytest.mark.parametrize("key", ["hf_" + "a" * 34, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY-----"])
def test_a_file_with_a_key_in_it_is_not(adapter: Path, name: str, key: str) -> None:
    (adapter / name).write_text(f"key: {key}\n", encoding="utf-8")
    with pytest.raises(HubError, match="looks like a secret") as caught:
        pushable_files(adapter)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("base", "commit", "named"), [(None, None, ("llama", None)), ("meta/llama", "c" * 40, ("meta/llama", "c" * 40))]
)
def test_the_path_of_the_base_stays_here(
    adapter: Path, tmp_path: Path, base: str | None, commit: str | None, named: tuple[str, str | None]
) -> None:
    stage_adapter(adapter, tmp_path / "staged", base_name=base, base_commit=commit)
    config = json.loads((tmp_path / "staged" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config.get("revision")) == named
    assert config["r"] == 4


def test_what_is_laid_out_keeps_its_bytes(adapter: Path, tmp_path: Path) -> None:
    stage_adapter(adapter, tmp_path / "staged", base_name=None, base_commit=None)
    write_text(adapter / "README.md", "a later card")
    (adapter / "adapter_model.safetensors").unlink()
    assert (tmp_path / "staged" / "README.md").read_text(encoding="utf-8") == "card"
    assert (tmp_path / "staged" / "adapter_model.safetensors").read_text(encoding="utf-8") == "weights"
