"""`doctor` and `inspect` as a user runs them: what they print and how they end, and that neither waits for torch."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loralab.run import read_json
from support import tiny
from support.command import read_problems, run_here, run_watched, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model; read only."""
    folder = tmp_path_factory.mktemp("inspected")
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(12))
    config = tiny.run_config(base, rows, folder / "run", data={"validation": 4})
    assert run_here("train", write_config(folder / "config.yaml", config)).code == 0
    return folder / "run"


def test_doctor_proves_steps_and_keeps_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_doNotShowThis"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    answer = run_watched("doctor", "--json", folder=tmp_path)
    result: dict[str, Any] = json.loads(answer.out)
    assert answer.code == result["exit_code"] == 0, result["findings"]
    assert answer.imported == []  # what loads compiled libraries runs in processes of its own
    assert secret not in answer.out + answer.err
    assert {(step["device"], step["precision"]) for step in result["steps"]} >= {
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
    }
    assert all(step["passed"] for step in result["steps"])
    found = [finding["what"] for finding in result["findings"]]
    assert "CUDA_LAUNCH_BLOCKING=1" in found
    assert "there is no Hub token" not in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [80, 120])
def test_doctor_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    answer = run_here("doctor", "--no-step")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert "warning: ACCELERATE_MIXED_PRECISION=fp16" in lines
    at = lines.index("warning: ACCELERATE_MIXED_PRECISION=fp16")
    assert lines[at + 1].startswith("  why: ")
    assert "  fix: unset ACCELERATE_MIXED_PRECISION" in [line.rstrip() for line in lines]
    assert lines[-1].endswith("; no step was run")
    assert max(map(len, lines)) <= width


def test_doctor_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hub"))
    answer = run_here("doctor", "--no-step", "--json")
    result = json.loads(answer.out)
    assert answer.code == result["exit_code"] == 2
    assert result["findings"][0]["what"].startswith("cannot write to ")
    assert result["findings"][0]["fix"] == "export HF_HOME=FOLDER"


def test_doctor_with_a_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')"
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    answer = run_here("doctor", "--json")
    result = json.loads(answer.out)
    assert answer.code == 3  # no step could be proven
    problems = [finding["what"] for finding in result["findings"] if finding["severity"] == "problem"]
    assert any(text.startswith("PyTorch cannot be used: ImportError: libcudart.so.13") for text in problems)
    assert any(text.startswith("the process of the steps ended before the first step") for text in problems)


def test_inspect_a_run_without_torch(run: Path, tmp_path: Path) -> None:
    answer = run_watched("inspect", run, "--json", folder=tmp_path)
    assert (answer.code, answer.err, answer.imported) == (0, "", [])
    result = json.loads(answer.out)
    assert result["findings"] == []
    assert result["adapter_sha256"] == read_json(run / "run.json")["adapter_sha256"]
    assert result["contract"]["template_intact"]
    assert result["contract"]["template_kept"]
    assert result["contract"]["stop_tokens"] == [tiny.END]
    assert (result["run"]["status"], result["attached"]) == ("completed", None)


@pytest.mark.parametrize("width", [80, 120])
def test_inspect_on_a_terminal(width: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    answer = run_here("inspect", run, "--model", run.parent / "base")
    assert answer.code == 0
    assert max(len(line) for line in answer.out.splitlines()) <= width
    words = " ".join(answer.out.split())
    assert "frozen: 0 of 4,096 parameters train" in words
    assert "is_trainable=True" in words
    assert "q_proj 2 of 2" in words
    assert "matching nothing 0" in words


def test_inspect_says_that_an_adapter_was_never_trained(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    zeroed = {name: weight * 0 if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(zeroed, folder / "adapter_model.safetensors")
    answer = run_here("inspect", folder)
    assert answer.code == 0
    assert "problem: the adapter was never trained (B of every layer is zero)" in answer.out
    assert "2 never trained" in answer.out


def test_inspect_refuses_what_is_no_adapter(run: Path, tmp_path: Path) -> None:
    (problem,) = read_problems(run_here("inspect", tmp_path / "gone"))
    assert problem.what.startswith("no such folder")
    (problem,) = read_problems(run_here("inspect", run.parent / "base"))
    assert "base model" in problem.fix
    (problem,) = read_problems(run_here("inspect", run, "--model", tmp_path / "gone"))
    assert problem.where == "option --model"
