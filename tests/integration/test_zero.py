"""DeepSpeed's ZeRO trains, measures, answers, stops and resumes as one process does; where deepspeed is installed."""

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support import tiny
from support.command import read_problems, run_here
from support.parts import TOGETHER, check_same, metrics, read, write_run
from support.processes import run_team, start_team

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
)
WAYS = ("zero2", "zero3")


@needs_deepspeed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", ["training.layout=packed"]),
        pytest.param("qwen2", ["training.layout=shared", "training.max_grad_norm=0"], marks=pytest.mark.slow),
        pytest.param("gpt2", ["training.layout=padded", "training.max_grad_norm=0.01"], marks=pytest.mark.slow),
        pytest.param("llama", ["training.gradient_checkpointing=true"], marks=pytest.mark.slow),
        pytest.param("llama", ["training.token_budget=1"], marks=pytest.mark.slow),
        pytest.param("llama", TOGETHER, marks=pytest.mark.slow),
        pytest.param("llama", ["lora.variant=lora_plus"], marks=pytest.mark.slow),
    ],
)
def test_parts_give_the_curve_of_one_process(
    way: str, family: tiny.Family, settings: Sequence[str], tmp_path: Path
) -> None:
    config = write_run(tmp_path, family, weight_decay=0.01)
    alone = run_here(
        "train", config, f"output.dir={tmp_path / 'one'}", "training.per_device_train_batch_size=8", *settings
    )
    assert alone.code == 0, alone.err
    parts = f"training.distributed={way}"
    answers = run_team("train", config, f"output.dir={tmp_path / 'parts'}", parts, *settings, folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    assert read(tmp_path / "parts" / "run.json")["resolved"]["distributed"]["value"] == way
    check_same(tmp_path / "one", tmp_path / "parts")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_moments_in_parts_over_a_quantized_base(quantization: str, tmp_path: Path) -> None:
    config, settings = write_run(tmp_path, weight_decay=0.01), [f"model.quantization={quantization}"]
    alone = run_here(
        "train", config, f"output.dir={tmp_path / 'one'}", "training.per_device_train_batch_size=8", *settings
    )
    assert alone.code == 0, alone.err
    settings.append("training.distributed=zero2")
    answers = run_team("train", config, f"output.dir={tmp_path / 'parts'}", *settings, folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    check_same(tmp_path / "one", tmp_path / "parts")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_base_of_half_precision_keeps_masters_of_single(way: str, tmp_path: Path) -> None:
    config = write_run(tmp_path, weight_decay=0.01)
    answers = {
        mode: run_team(
            *("train", config, f"output.dir={tmp_path / mode}", "model.precision=bfloat16"),
            f"training.distributed={mode}",
            folder=tmp_path,
        )
        for mode in ("ddp", way)
    }
    assert all(answer.code == 0 for team in answers.values() for answer in team), answers[way][0].err
    before, after = metrics(tmp_path / "ddp"), metrics(tmp_path / way)
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    # Later a last digit of a weight turns into one of bfloat16's own, which are 4e-3 apart.
    assert len(after) == len(before)
    assert all(new == pytest.approx(old, rel=1e-2) for new, old in zip(after, before, strict=True))
    assert all(t.dtype.itemsize == 4 for t in load_file(tmp_path / way / "adapter/adapter_model.safetensors").values())


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_in_parts_goes_on_to_the_same_bits(way: str, tmp_path: Path) -> None:
    config = write_run(tmp_path, weight_decay=0.01, save_strategy="steps", save_steps=2)
    settings = [f"training.distributed={way}", "training.num_train_epochs=12"]
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


@pytest.mark.parametrize("way", WAYS)
def test_one_process_says_that_it_has_nobody_to_share_with(way: str, tmp_path: Path) -> None:
    config = write_run(tmp_path, weight_decay=0.01)
    settings = [f"training.distributed={way}", "training.max_steps=1", "evaluation.num_samples=0"]
    answer = run_here("train", config, *settings)
    assert answer.code == 0, answer.err
    assert f"distributed: none (one process has nobody to share with; {way} acts under `loralab launch`)" in answer.err


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="the extra deepspeed is installed")
@pytest.mark.parametrize("way", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_missing_package_is_named_before_anything_is_read(way: str, tmp_path: Path) -> None:
    config = write_run(tmp_path, weight_decay=0.01)
    answers = run_team("train", config, f"training.distributed={way}", "data.train=nowhere.json", folder=tmp_path)
    assert [answer.code for answer in answers] == [2, 2]
    problem = read_problems(answers[0])[0]
    assert f"{way} needs the package deepspeed" in problem.what
    assert "pip install 'loralab[deepspeed]'" in problem.fix
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path, weight_decay=0.01)
    refused = read_problems(run_here("train", config, "training.distributed=zero3", "model.quantization=nf4"))[0]
    assert "zero3 with quantization 'nf4'" in refused.what
    refused = read_problems(run_here("train", config, "training.distributed=zero2", "training.optim=adafactor"))[0]
    assert "zero2 with optim adafactor" in refused.what
