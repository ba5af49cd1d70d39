"""Document 1's task on real data: yes/no questions, F1 while training, early stopping and the best checkpoint by F1."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab
from loralab.models.adapters import WEIGHTS_FILE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> loralab.Run:
    folder = tmp_path_factory.mktemp("boolq")
    return loralab.train(
        {
            "model": {"name": str(data_folder / "models/stories260k"), "precision": "float32", "device": "cpu"},
            "data": {
                "train": str(data_folder / "yesno/boolq/train.json"),
                "format": "yes_no",
                "columns": {"question": "instruction", "answer": "answer"},
                "validation": 200,
                "test": 200,
                "max_length": 256,
                "cache_dir": str(folder / "cache"),
            },
            "lora": {"r": 16, "alpha": 32},
            "training": {
                "max_steps": 120,
                "per_device_train_batch_size": 16,
                "learning_rate": 3e-3,
                "seed": 1,
                "load_best_model_at_end": True,
                "save_total_limit": None,
                "early_stopping": {"metric": "yes_no_macro_f1", "patience": 3},
            },
            "evaluation": {"strategy": "steps", "steps": 10, "batch_size": 16, "num_samples": 2, "max_new_tokens": 4},
            "output": {"dir": str(folder / "run")},
        }
    )


def test_f1_and_accuracy_stand_in_the_metrics_and_decide(run: loralab.Run) -> None:
    figures = {
        line["step"]: (line["eval_yes_no_macro_f1"], line["eval_yes_no_accuracy"])
        for line in run.metrics
        if "eval_loss" in line
    }
    best = max(figures, key=lambda step: (figures[step][0], -step))
    print(figures, run.record["stopped_because"])
    assert run.record["steps"] == best + 30 < 120
    assert "yes_no_macro_f1 has not been above" in run.record["stopped_because"]
    saved, kept = (
        load_file(folder / WEIGHTS_FILE) for folder in (run.folder.checkpoints / f"checkpoint-{best}", run.adapter())
    )
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_figures_are_those_of_plain_scoring(run: loralab.Run, data_folder: Path) -> None:
    """Score both labels with transformers and PEFT alone, one prompt at a time, in float64 from full logits."""
    lines = [json.loads(text) for text in run.folder.predictions.read_text().splitlines()]
    folder = data_folder / "models/stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    evaluation = json.loads(run.folder.evaluation.read_text())
    for side, model, found in (
        ("base", base, evaluation["base"]),
        ("adapter", PeftModel.from_pretrained(other, run.adapter()).eval(), evaluation),
    ):
        said = []
        for line in lines:
            prompt = tokenizer.encode(line["prompt"], add_special_tokens=False)
            expected = {}
            for label in ("yes", "no"):
                whole = tokenizer.encode(line["prompt"] + label, add_special_tokens=False)
                assert whole[: len(prompt)] == prompt
                expected[label] = plain_score(model, prompt, tuple(whole[len(prompt) :]))
            ours = line[side]["label_scores"]
            assert ours == pytest.approx(expected, rel=1e-5, abs=1e-5)
            said.append(max(expected, key=lambda label: expected[label]))
        true = [line["reference"].strip() for line in lines]
        assert found["yes_no_accuracy"] == pytest.approx(accuracy_score(true, said))
        classes = sorted(set(true))
        assert found["yes_no_macro_f1"] == pytest.approx(f1_score(true, said, average="macro", labels=classes))


def plain_score(model: Any, prompt: list[int], code: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *code]])).logits[0].double()
    log_probabilities = logits.log_softmax(dim=-1)
    return math.fsum(float(log_probabilities[len(prompt) - 1 + place, token]) for place, token in enumerate(code))
