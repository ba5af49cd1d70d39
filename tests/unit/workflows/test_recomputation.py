"""Whether activations are recomputed: by what memory holds, for plan and train alike, and kept by what goes on."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import loralab
from loralab.config.schema import Config
from loralab.data.tokens.store import TokenStore
from loralab.models.blueprint import Blueprint
from loralab.models.memory import TokenMemory, activation_bytes, micro_batch_bytes, pair_bytes
from loralab.models.precision import Resolved
from loralab.progress import Reporter
from loralab.run import RunFolder
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.configure import load_run_config
from loralab.workflows.plan import plan
from loralab.workflows.recomputation import Recomputation, resolve_checkpointing, settle_recomputation
from loralab.workflows.replay import replay
from loralab.workflows.step_layout import expect_planner, sketch_blueprint
from loralab.workflows.step_memory import StepMeter
from loralab.workflows.train import prepare_run
from support import tiny

CPU = torch.device("cpu")
GIB = 2**30
PATCHED = ("loralab.workflows.plan.free_bytes", "loralab.models.device_map.free_bytes")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recomputation")
    tiny.save_base(folder / "base")
    tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(12))
    return folder


class Rows:
    """Rows of these lengths, as far as the choice reads them."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self) -> Any:
        return self._lengths

    def tokens_alone(self) -> Any:
        return self._lengths - 1


def rows_of(*lengths: int) -> TokenStore:
    return cast(TokenStore, Rows(lengths))


def settings(files: Path, **training: Any) -> Config:
    sections: dict[str, Any] = {"model": {"name": str(files / "base"), "device": "cpu"}, "data": {"train": "x"}}
    return Config.model_validate({**sections, "training": training})


def draw(config: Config) -> Blueprint:
    blueprint = sketch_blueprint(config, config.lora, dtype=torch.float32, device=CPU)
    assert isinstance(blueprint, Blueprint)
    return blueprint


Ask = Callable[..., Resolved[bool]]


@pytest.fixture
def ask(files: Path) -> Ask:
    """The choice by the rule of thumb, where micro-batches of `room` tokens may take what may be used of memory."""
    model = draw(settings(files)).model.language_model.config
    counted = TokenMemory(activation_bytes(model, dtype=torch.float32, checkpointing=False), 0.0)

    def choose(room: int, lengths: Sequence[int], *, device: str = "cpu", **training: Any) -> Resolved[bool]:
        usable = micro_batch_bytes(room, counted, per_pair=pair_bytes(model, dtype=torch.float32))
        return resolve_checkpointing(
            settings(files, **training).training,
            "it has no blueprint",
            base=model,
            dtype=torch.float32,
            device=torch.device(device),
            rows=rows_of(*lengths),
            free=int(usable / {"cpu": 0.5, "cuda": 0.85}[device]) + 2,
        )

    return choose


def test_the_longest_row_must_fit(ask: Ask) -> None:
    for room, recomputes in ((1000, False), (999, True)):
        choice = ask(room, [1000, 20, 20])
        assert choice.value is recomputes
        assert choice.reason.startswith("the longest row, 1,000 tokens, takes about 0.")
        assert choice.reason.endswith("GiB may be used, by a rule of thumb, since it has no blueprint")


def test_a_micro_batch_must_be_large_enough_for_speed(ask: Ask) -> None:
    short = [20] * 100
    for device, tokens in (("cpu", 256), ("cuda", 2048)):
        steps = {"device": device, "per_device_train_batch_size": 200}
        for room, recomputes in ((tokens, False), (tokens - 1, True)):
            assert ask(room, short * 2, **steps).value is recomputes, (device, room)
    # ... and no larger than a step.
    assert ask(4 * 19, short, per_device_train_batch_size=4).value is False
    choice = ask(4 * 19 - 1, short, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert choice.value is True
    assert choice.reason.startswith("a step of 76 tokens takes about")


def test_a_budget_that_is_set_must_fit(ask: Ask) -> None:
    many = {"per_device_train_batch_size": 64, "token_budget": 900}
    for room, recomputes in ((900, False), (899, True)):
        choice = ask(room, [20] * 64, **many)
        assert choice.value is recomputes
        assert choice.reason.startswith("training.token_budget, 900 tokens, takes")
    assert ask(300, [300], **many).value is False  # a row is never cut, and there is no more


def settle(files: Path, *, free: int, recorded: bool | None = None, **training: Any) -> Recomputation:
    config = settings(files, **training)
    blueprint = draw(config)
    return settle_recomputation(
        config,
        config.lora,
        blueprint,
        base=blueprint.model.language_model.config,
        dtype=torch.float32,
        device=CPU,
        rows=rows_of(700, 9),
        free=free,
        recorded=recorded,
    )


def check(found: Recomputation, recomputes: bool, reason: str) -> None:
    assert found.choice == Resolved(recomputes, reason)
    assert found.config.training.gradient_checkpointing is recomputes
    assert isinstance(found.blueprint, Blueprint)
    assert found.blueprint.checkpointing is recomputes


@pytest.mark.parametrize("setting", [True, False])
def test_what_is_set_stands(files: Path, setting: bool) -> None:
    for free in (1, 1 << 40):
        found = settle(files, free=free, gradient_checkpointing=setting, recorded=not setting)
        check(found, setting, "set in training.gradient_checkpointing")


def test_a_run_goes_on_as_it_began(files: Path) -> None:
    for free in (1, 1 << 40):
        for recorded in (True, False):
            found = settle(files, free=free, recorded=recorded)
            check(found, recorded, "as when the run began, which its token budget goes by")


def test_memory_is_counted_on_the_model(files: Path) -> None:
    model = draw(settings(files)).model
    counted = StepMeter(draw(settings(files)), "shared").count_tokens(700)
    assert isinstance(counted, TokenMemory)
    needed = micro_batch_bytes(700, counted, per_pair=pair_bytes(model.language_model.config, dtype=torch.float32))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    for usable, recomputes in ((needed * 1.01, False), (needed * 0.99, True)):
        found = settle(files, free=int(2 * usable) + trained)
        check(found, recomputes, found.choice.reason)
        assert "rule of thumb" not in found.choice.reason
        assert f"takes about {needed / GIB:.2f} GiB without recomputation" in found.choice.reason
        assert found.counted == ({} if recomputes else {"shared": counted})


def test_longer_rows_take_more_of_a_token_where_attention_keeps_its_weights(files: Path) -> None:
    config = settings(files)
    for dtype, grows in ((torch.bfloat16, True), (torch.float32, False)):
        blueprint = sketch_blueprint(config, config.lora, dtype=dtype, device=CPU)
        assert isinstance(blueprint, Blueprint)
        found = [StepMeter(blueprint, "shared").count_tokens(length) for length in (128, 1024, 9000)]
        short, long, longest = (each.per_token for each in found if isinstance(each, TokenMemory))
        assert (long > 1.2 * short) is grows, dtype
        assert longest == long  # weights of longer rows are computed again


def test_nothing_is_counted_twice(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settle(files, free=1 << 40)
    assert isinstance(found.blueprint, Blueprint)
    expected, _ = expect_planner(found.blueprint, found.config, free=1 << 24)
    monkeypatch.setattr(StepMeter, "count_tokens", lambda *_: pytest.fail("counted again"))
    planner, _ = expect_planner(found.blueprint, found.config, free=1 << 24, known=found.counted)
    assert planner == expected


class Other(Processes):
    """This process beside one that must recompute."""

    def largest(self, value: int) -> int:
        return max(value, 1)


def test_processes_choose_alike(files: Path) -> None:
    config = settings(files)
    found = settle_recomputation(
        config,
        config.lora,
        "not drawn",
        base=draw(config).model.language_model.config,
        dtype=torch.float32,
        device=CPU,
        rows=rows_of(9),
        free=1 << 34,
        processes=Other(),
    )
    assert found.choice == Resolved(True, "another process of the run has no room for its activations")
    assert found.config.training.gradient_checkpointing is True


# --- whole runs


def configure(files: Path, run: Path, **training: Any) -> Any:
    return tiny.run_config(files / "base", files / "rows.json", run, training={"max_steps": 4, **training})


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for name in PATCHED:
        monkeypatch.setattr(name, lambda device: size)


@pytest.mark.parametrize(("size", "recomputes"), [(1 << 34, "False"), (1 << 10, "True")])
def test_plan_and_train_choose_alike(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, recomputes: str
) -> None:
    free(monkeypatch, size)
    given = configure(files, tmp_path / "run")
    planned = plan(load_run_config(given), probe=False, reporter=Reporter())
    run = loralab.train(given)
    choice = run.record["resolved"]["gradient_checkpointing"]
    assert choice["value"] == recomputes
    assert run.record["resolved"]["threads"]["reason"]
    assert choice["reason"] == planned["choices"]["gradient_checkpointing"]["reason"]
    assert planned["choices"]["gradient_checkpointing"]["value"] == recomputes
    kept = {name: size for name, size in planned["memory"]["parts"].items() if name != "data"}
    assert kept == {name: size for name, size in run.record["memory"]["parts"].items() if name != "data"}


@pytest.mark.parametrize(
    ("size", "training", "expected"),
    [
        (1 << 10, {}, True),
        (1 << 34, {}, False),
        (1 << 34, {"gradient_checkpointing": True}, True),
        (1 << 10, {"gradient_checkpointing": False}, False),
    ],
)
def test_the_choice_reaches_the_layers(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    size: int,
    training: dict[str, bool],
    expected: bool,
) -> None:
    free(monkeypatch, size)
    loaded = load_run_config(configure(files, tmp_path / "run", **training))
    run = prepare_run(loaded, RunFolder(tmp_path / "run"), reporter=Reporter(), processes=ALONE, saved=None)
    recomputing = any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())
    assert recomputing is run.choices["gradient_checkpointing"].value is expected


def test_a_resume_and_a_replay_recompute_as_the_run_did(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 1 << 10)
    given = configure(files, tmp_path / "run", save_strategy="steps", save_steps=2, save_total_limit=None)
    whole = loralab.train(given)
    free(monkeypatch, 1 << 34)
    again = replay(whole.path, output=tmp_path / "again", reporter=Reporter())
    record = json.loads((tmp_path / "again/run.json").read_text())
    assert record["resolved"]["gradient_checkpointing"]["value"] == "True"
    assert again["equal"], again
    # As a kill behind the first checkpoint leaves it.
    shutil.rmtree(whole.path / "adapter")
    shutil.rmtree(max((whole.path / "checkpoints").iterdir()))
    (whole.path / "run.json").write_text(json.dumps(whole.record | {"status": "running"}))
    resumed = loralab.train(given, resume=True)
    choice = resumed.record["resolved"]["gradient_checkpointing"]
    assert (choice["value"], choice["reason"]) == ("True", "as when the run began, which its token budget goes by")
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
