"""`loralab export` as a user calls it: from a run, to every program, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from loralab import train
from loralab.workflows.export import _own_name
from support.command import read_problems, run_here
from support.tiny import alpaca_rows, run_config, save_base, write_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run on a tiny Llama, and one on a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("export")
    patch = pytest.MonkeyPatch()
    patch.setattr("loralab.workflows.train.build_report", lambda _: None)
    rows = write_rows(folder / "rows.json", alpaca_rows(24))
    for family in ("llama", "gpt2"):
        base = save_base(folder / f"base-{family}", family)  # type: ignore[arg-type]
        train(run_config(base, rows, folder / family, training={"max_steps": 2}))
    patch.undo()
    return folder


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector's walk over all that tests have loaded takes more time than an export."""
    monkeypatch.setattr("loralab.workflows.merge.release_models", lambda: None)
    monkeypatch.setattr("loralab.export.gguf_proof.gc.collect", lambda: 0)


def test_gguf_from_a_run(runs: Path) -> None:
    answer = run_here("export", runs / "llama", "--to", "gguf", "--name", "tiny", "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert Path(result["output"]) == runs / "llama-gguf"
    names = sorted(path.name for path in (runs / "llama-gguf").iterdir())
    assert names == [
        "Modelfile",
        "export.json",
        "tiny-f16.gguf",
    ]
    assert result["modelfile"]["conversations_equal"] == 9
    again = read_problems(run_here("export", runs / "llama", "--to", "gguf"))
    assert "already there" in again[0].what


def test_ollama_says_which_form_its_weights_have(runs: Path, tmp_path: Path) -> None:
    answer = run_here("export", runs / "llama", "--to", "ollama", "--output", tmp_path / "the out")
    assert answer.code == 0, answer.err
    assert "weights: gguf" in answer.out
    assert "prompt: equal to the trained prompt on " in answer.out
    assert "de-quantizing" not in answer.err
    assert f"ollama create llama -f '{tmp_path / 'the out' / 'Modelfile'}'" in answer.out
    assert "Loading weights" not in answer.err
    lines = (tmp_path / "the out" / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./llama-f16.gguf"
    assert 'PARAMETER stop "<|end|>"' in lines


def test_an_adapter_without_a_contract_promises_no_prompt(runs: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(runs / "llama" / "adapter", tmp_path / "plain"))
    for name in ("prompt_contract.json", "adapter_facts.json"):
        (adapter / name).unlink()
    answer = run_here("export", adapter, "--to", "ollama", "--output", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "prompt: equal to the chat template (no trained prompt is known) on " in answer.out
    assert "the trained one" not in answer.out
    assert "golden prompts" not in answer.err
    assert "set in model.precision" not in answer.err
    assert "the adapter was trained on them" not in answer.err


def test_a_merged_folder_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    assert _own_name(tmp_path / "merged") == "merged"
    (tmp_path / "merged" / "merge.json").write_text(json.dumps({"name": "price run"}))
    assert _own_name(tmp_path / "merged") == "price-run"


def test_what_ollama_takes_in_no_form(runs: Path, tmp_path: Path) -> None:
    (problem,) = read_problems(run_here("export", runs / "gpt2", "--to", "ollama", "--output", tmp_path / "out"))
    assert problem.what.startswith("Ollama cannot take this model: Ollama's importer does not list GPT2LMHeadModel")
    assert problem.where == "option --to ollama"


def test_vllm_takes_the_adapter_or_a_merged_model(runs: Path, tmp_path: Path) -> None:
    adapter = run_here("export", runs / "llama", "--to", "vllm", "--output", tmp_path / "adapter")
    assert "--enable-lora --lora-modules llama=" in adapter.out
    assert "--max-lora-rank 8" in adapter.out
    request = json.loads((tmp_path / "adapter" / "request.json").read_text(encoding="utf-8"))
    assert request["stop_token_ids"]
    merged = run_here("export", runs / "gpt2", "--to", "vllm", "--output", tmp_path / "merged")
    assert "--enable-lora" not in merged.out
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    from_merged = run_here("export", tmp_path / "merged", "--to", "gguf", "--output", tmp_path / "no")
    assert "gpt2" in read_problems(from_merged)[0].what
    assert not (tmp_path / "no").exists()


def test_an_output_in_what_is_read(runs: Path) -> None:
    (problem,) = read_problems(
        run_here("export", runs / "llama", "--to", "vllm", "--output", runs / "base-llama" / "x")
    )
    assert "which is read" in problem.what


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "gguff"], "gguff"),
        (["--to", "vllm", "--dtype", "f16"], "--dtype"),
        (["--to", "gguf", "--dtype", "q4"], "q4"),
        (["--to", "gguf", "--name", "a b"], "'a b'"),
    ],
)
def test_mistakes_are_named(runs: Path, arguments: list[str], words: str) -> None:
    assert words in read_problems(run_here("export", runs / "llama", *arguments))[0].what
