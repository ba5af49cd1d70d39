"""The hash of an adapter's tensors: what it is taken over, and files that hold none."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loralab.errors import ModelError
from loralab.models.adapter_hash import WEIGHTS_FILE, adapter_sha256


def _by_torch(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_hash_is_over_what_torch_reads(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"z{number}": torch.arange(6).reshape(2, 3).to(kind) for number, kind in enumerate(kinds)}
    tensors |= {"b": torch.zeros(()), "a": torch.zeros(0, 4), "ü": torch.ones(1), "long": torch.randn(1100, 300)}
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    assert adapter_sha256(tmp_path) == _by_torch(tmp_path / WEIGHTS_FILE)


def test_hash_does_not_depend_on_the_order_in_the_file(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    save_file({"x": torch.ones(2), "y": torch.zeros(3)}, folders[0] / WEIGHTS_FILE)
    save_file({"y": torch.zeros(3), "x": torch.ones(2)}, folders[1] / WEIGHTS_FILE, metadata={"other": "words"})
    assert adapter_sha256(folders[0]) == adapter_sha256(folders[1])


@pytest.mark.parametrize("content", [b"", b"12", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        adapter_sha256(tmp_path)


def test_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    save_file({"x": torch.ones(20)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="its end is missing"):
        adapter_sha256(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        adapter_sha256(tmp_path)
