"""Running out of memory: the step is run again in smaller micro-batches, and the curve is the same."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loralab
from loralab.errors import OutOfMemoryError
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.checkpoint import list_checkpoints
from loralab.training.state import RunState
from support import tiny

BUDGET = 512


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.json", tiny.alpaca_rows(24))


def config(base: Path, rows: Path, output: Path, **training: Any) -> dict[str, Any]:
    settings = {"per_device_train_batch_size": 8, "token_budget": BUDGET, "num_train_epochs": 2} | training
    return tiny.run_config(base, rows, output, training=settings, lora={"dropout": 0.1})


class SmallMemory:
    """Lets no training forward of more than `tokens` tokens through, once `passing` have passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tokens: int, passing: int = 0) -> None:
        self.refused: list[int] = []
        self.largest = 0
        forward = SupervisedPeftModel.forward
        left = passing

        def limited(model: SupervisedPeftModel, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            # What is predicted at start runs on the meta device, which has no memory to run out of.
            if model.training and "label_positions" in kwargs and kwargs["input_ids"].device.type != "meta":
                size = kwargs["input_ids"].numel()
                left -= 1
                if size > tokens and left < 0:
                    self.refused.append(size)
                    raise torch.OutOfMemoryError(f"out of memory: tried {size} tokens")
                self.largest = max(self.largest, size)
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(SupervisedPeftModel, "forward", limited)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("passing", [0, 1, 4], ids=["at once", "within the first step", "later"])
def test_step_is_run_again_and_the_curve_is_the_same(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, passing: int
) -> None:
    whole = loralab.train(config(base, rows, tmp_path / "whole", layout=layout))
    memory = SmallMemory(monkeypatch, tokens=BUDGET // 4, passing=passing)
    small = loralab.train(config(base, rows, tmp_path / "small", layout=layout))
    assert memory.refused
    assert [line["loss"] for line in small.metrics if "loss" in line] == pytest.approx(
        [line["loss"] for line in whole.metrics if "loss" in line], rel=1e-5
    )
    expected, found = (load_file(run.adapter() / "adapter_model.safetensors") for run in (whole, small))
    for name, tensor in expected.items():
        # Adam divides by the root of squared gradients: an almost zero one magnifies the order of sums.
        assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-4, name
    events = [event["what"] for event in small.record["events"]]
    assert len(events) == len(memory.refused)
    assert events[0].startswith("out of memory at step ")
    # Half of what was tried, never of a budget that the step did not fill: each repetition changes something.
    matches = [re.search(r"token budget lowered to (\d+), the step was run again$", event) for event in events]
    budgets = [BUDGET, *(int(match[1]) for match in matches if match)]
    assert len(budgets) == len(events) + 1
    assert all(2 * after <= before for before, after in itertools.pairwise(budgets))
    assert all(size // 2 <= budget for size, budget in zip(memory.refused, budgets[1:], strict=True))
    assert small.record["token_budget"]["value"] == budgets[-1]
    assert whole.record["events"] == []
    assert whole.record["token_budget"]["value"] == BUDGET


def test_smaller_budget_is_kept_by_checkpoints(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume goes on with the cuts of before: equal to the last bit, and nothing is refused again."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "layout": "packed", "save_total_limit": None}
    SmallMemory(monkeypatch, tokens=BUDGET // 4)
    whole = loralab.train(config(base, rows, tmp_path / "run", **settings))
    checkpoints = list_checkpoints(whole.folder.checkpoints)
    assert {RunState.load(path).token_budget for path in checkpoints} == {whole.record["token_budget"]["value"]}
    record = whole.record
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    shutil.rmtree(whole.folder.adapter)
    whole.folder.record.write_text(json.dumps(record | {"status": "running"}))
    memory = SmallMemory(monkeypatch, tokens=BUDGET // 4)
    resumed = loralab.train(config(base, rows, tmp_path / "run", **settings), resume=True)
    assert resumed.record["adapter_sha256"] == record["adapter_sha256"]
    assert memory.refused == []
    assert 0 < memory.largest <= BUDGET // 4


def test_one_example_that_is_too_large_ends_the_run(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallMemory(monkeypatch, tokens=45)  # the probe row of the self-check, and nothing larger
    with pytest.raises(OutOfMemoryError) as caught:
        loralab.train(config(base, rows, tmp_path / "run"))
    assert caught.value.exit_code == 2
    (problem,) = caught.value.problems
    text = problem.render()
    assert "with one example at a time" in text
    assert "optimizer step 1" in text
    assert "data.max_length" in text
    assert "gradient_checkpointing: true" in text
