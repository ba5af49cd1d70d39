"""A base in parts (FSDP2) trains, measures, answers, stops and resumes as a whole one does."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support import tiny
from support.command import read_problems, run_here
from support.parts import TOGETHER, check_same, metrics, read, write_run
from support.processes import run_team, start_team

PARTS = "training.distributed=fsdp2"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("llama", ["training.layout=packed"], marks=pytest.mark.slow),
        pytest.param("qwen2", ["training.layout=shared"], marks=pytest.mark.slow),
        pytest.param("gpt2", ["training.layout=padded"], marks=pytest.mark.slow),
        pytest.param("llama", ["training.gradient_checkpointing=true"], marks=pytest.mark.slow),
        pytest.param("llama", ["training.token_budget=1"], marks=pytest.mark.slow),
        pytest.param("llama", TOGETHER, marks=pytest.mark.slow),
    ],
)
def test_parts_give_the_curve_of_one_process(family: tiny.Family, settings: Sequence[str], tmp_path: Path) -> None:
    config = write_run(tmp_path, family)
    alone = run_here(
        "train", config, f"output.dir={tmp_path / 'one'}", "training.per_device_train_batch_size=8", *settings
    )
    assert alone.code == 0, alone.err
    answers = run_team("train", config, f"output.dir={tmp_path / 'parts'}", PARTS, *settings, folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    assert "decoder layers are cut into 2 parts" in answers[0].err
    assert read(tmp_path / "parts" / "run.json")["resolved"]["distributed"]["value"] == "fsdp2"
    check_same(tmp_path / "one", tmp_path / "parts")


@pytest.mark.slow
def test_a_base_of_half_precision_keeps_masters_of_single(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    answers = {
        mode: run_team(
            *("train", config, f"output.dir={tmp_path / mode}", "model.precision=bfloat16"),
            f"training.distributed={mode}",
            folder=tmp_path,
        )
        for mode in ("ddp", "fsdp2")
    }
    assert all(answer.code == 0 for team in answers.values() for answer in team), answers["fsdp2"][0].err
    check_same(tmp_path / "ddp", tmp_path / "fsdp2")
    assert all(t.dtype.itemsize == 4 for t in load_file(tmp_path / "fsdp2/adapter/adapter_model.safetensors").values())


@pytest.mark.slow
def test_a_stopped_run_in_parts_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = write_run(tmp_path, save_strategy="steps", save_steps=2)
    settings = [PARTS, "training.num_train_epochs=12"]
    whole = run_team("train", config, f"output.dir={tmp_path / 'whole'}", *settings, folder=tmp_path)
    assert [answer.code for answer in whole] == [0, 0], whole[0].err
    run = tmp_path / "run"
    team = start_team("train", config, f"output.dir={run}", *settings, folder=tmp_path)
    team.wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) >= 7)
    team.members[1].send_signal(signal.SIGTERM)
    assert [answer.code for answer in team.answers()] == [143, 143]
    answers = run_team("train", config, f"output.dir={run}", *settings, "--resume", folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    assert "resuming from step" in answers[0].err
    assert read(run / "run.json")["adapter_sha256"] == read(tmp_path / "whole" / "run.json")["adapter_sha256"]
    assert metrics(run) == metrics(tmp_path / "whole")


def test_one_process_says_that_it_has_nobody_to_share_with(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    answer = run_here("train", config, PARTS, "training.max_steps=1", "evaluation.num_samples=0")
    assert answer.code == 0, answer.err
    assert "distributed: none (one process has nobody to share with; fsdp2 acts under `loralab launch`)" in answer.err


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    refused = read_problems(run_here("train", config, PARTS, "model.quantization=nf4"))[0]
    assert "fsdp2 with quantization 'nf4'" in refused.what
    refused = read_problems(run_here("train", config, PARTS, "model.device_map=auto"))[0]
    assert "device_map auto with fsdp2" in refused.what
