"""A plan against the run itself: counts are equal, memory is near and moves as it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loralab.config.schema import Config
from loralab.errors import ConfigError, ModelError
from loralab.progress import Reporter
from loralab.run import read_json
from loralab.workflows import plan as plan_module
from loralab.workflows.configure import load_run_config
from loralab.workflows.plan import plan
from loralab.workflows.plan_advice import Situation, advise
from loralab.workflows.step_layout import expect_planner, sketch_blueprint
from loralab.workflows.step_memory import StepMeter, optimizer_bytes, predict_memory
from loralab.workflows.train import train
from support import tiny
from unit.layout.examples import example

CPU = torch.device("cpu")
MakePlan = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, one with as many layers as it takes for activations to be most of the memory, and rows."""
    folder = tmp_path_factory.mktemp("plan")
    tiny.save_base(folder / "base")
    tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(50))
    tokenizer = tiny.build_tokenizer()
    config = tiny.build_model(vocabulary=len(tokenizer)).config
    config.update({"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 256})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "deep")
    tokenizer.save_pretrained(folder / "deep")
    return folder


def configure(files: Path, *, run: str = "run", **sections: dict[str, Any]) -> Any:
    return load_run_config(tiny.run_config(files / "base", files / "rows.json", files / run, **sections), name="x")


def make(files: Path, *, probe: bool = False, run: str = "run", **sections: dict[str, Any]) -> dict[str, Any]:
    return plan(configure(files, run=run, **sections), probe=probe, reporter=Reporter())


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "shared": {"training": {"num_train_epochs": 2}},
    "packed": {"training": {"layout": "packed", "gradient_accumulation_steps": 2}},
    "padded": {"training": {"layout": "padded", "max_steps": 5}},
    "small budget": {"training": {"token_budget": 40, "num_train_epochs": 1.5}},
    "nf4": {"model": {"quantization": "nf4"}, "training": {"max_steps": 3}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_counts_are_those_of_the_run(files: Path, name: str) -> None:
    sections = SETTINGS[name] | {"data": {"validation": 10}}
    planned = make(files, **sections)
    run = train(configure(files, **sections), reporter=Reporter(), overwrite=True)
    record = read_json(run.record)
    assert planned["schedule"]["total_steps"] == record["steps"]
    assert planned["schedule"]["epochs"] == pytest.approx(record["epochs"], abs=1e-3)
    assert planned["tokens"]["rows"] == record["layout_tokens"]["rows"]
    assert planned["tokens"]["laid_out"] == record["layout_tokens"]["laid_out"]
    assert planned["parameters"]["total"] == record["model"]["parameters"]
    assert planned["parameters"]["trainable"] == record["model"]["trainable_parameters"]
    assert planned["tokens"]["token_budget"] == record["token_budget"]["value"]
    assert planned["tokens"]["layout"] == record["resolved"]["layout"]["value"]
    assert record["memory"]["measured_bytes"] > 0
    # Tokenizer and rows are measured, in each process anew; all else is counted.
    counted, noted = (dict(each["memory"]["parts"]) for each in (planned, record))
    assert counted.pop("data") >= 0
    assert noted.pop("data") >= 0
    assert counted == noted
    if name == "nf4":
        assert planned["parameters"]["quantized"]["weights"] == record["model"]["quantization"]["weights"]


def test_probe_measures_and_times(files: Path) -> None:
    planned = make(files, probe=True)
    assert planned["memory"]["predicted_bytes"] == planned["memory"]["probe"]["measured_bytes"] > 0
    assert planned["memory"]["counted_bytes"] > 0
    assert planned["time"]["seconds"] > 0
    assert planned["time"]["seconds_per_step"] > 0
    assert "train asks the loaded model" not in planned["choices"]["attention"]["reason"]


def test_nothing_is_written_to_the_run_folder(files: Path) -> None:
    make(files, probe=True, run="never")
    assert not (files / "never").exists()


def test_schedule(files: Path) -> None:
    planned = make(
        files,
        data={"validation": 10},
        training={"num_train_epochs": 3, "warmup_ratio": 0.1, "save_strategy": "steps", "save_steps": 7},
        evaluation={"strategy": "steps", "steps": 10},
    )
    schedule = planned["schedule"]
    assert (schedule["rows_per_epoch"], schedule["rows_per_step"]) == (40, 4)
    assert (schedule["steps_per_epoch"], schedule["total_steps"], schedule["warmup_steps"]) == (10, 30, 3)
    assert (schedule["evaluations"], schedule["checkpoints"]) == (3, 5)
    assert planned["disk"]["checkpoints_kept"] == 2
    assert planned["disk"]["adapter_bytes"] == 4 * planned["parameters"]["trainable"]
    assert set(planned["tokens"]["epoch"]) == {"shared", "packed", "padded"}
    epoch = planned["tokens"]["epoch"]
    assert epoch["shared"] <= epoch["packed"] <= epoch["padded"]


def test_run_that_does_not_fit_gets_advice(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # auto would go by what is free
    training = {"per_device_train_batch_size": 16, "token_budget": 4096, "gradient_checkpointing": False}
    settings = {"model": {"name": str(files / "deep")}, "training": training}
    monkeypatch.setattr(plan_module, "process_bytes", lambda device: 0)  # measured, and less the second time
    memory = make(files, **settings)["memory"]
    needed, runtime = memory["needed_bytes"], memory["parts"]["runtime"]
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: int(runtime + 0.7 * (needed - runtime)))
    planned = make(files, **settings)
    assert planned["fits"] is False
    assert planned["advice"][-1]["fits"]
    assert planned["advice"][0]["set"].startswith("training.token_budget=")
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: 2 * needed)
    planned = make(files, **settings)
    assert (planned["fits"], planned["advice"]) == (True, [])


def test_mistakes_are_those_of_train(files: Path) -> None:
    with pytest.raises(ConfigError, match="no linear layer is named"):
        make(files, lora={"target_modules": ["nothing"]})
    with pytest.raises(ModelError, match="no such model folder"):
        make(files, model={"name": "./nowhere"})
    with pytest.raises(ModelError, match="more than the model's"):
        make(files, data={"max_length": 4096})


# --- memory, on shapes large enough for it to be more than the constants


def settings(base: Path, **sections: dict[str, Any]) -> Config:
    whole: dict[str, dict[str, Any]] = {"model": {"name": str(base), "device": "cpu"}, "data": {"train": "x"}}
    for name, values in sections.items():
        whole.setdefault(name, {}).update(values)
    return Config.model_validate(whole)


def predict(base: Path, *, rows: int = 8, length: int = 120, **sections: dict[str, Any]) -> dict[str, Any]:
    config = settings(base, **sections)
    blueprint = sketch_blueprint(config, config.lora, dtype=torch.float32, device=CPU)
    assert not isinstance(blueprint, str), blueprint
    planner, _ = expect_planner(blueprint, config, free=1 << 34)
    examples = [example(([(7 * i + j) % 60 for j in range(length)], [1, 2, 3])) for i in range(rows)]
    largest = max(planner(examples).micro_batches, key=lambda batch: batch.tokens)
    return predict_memory(config, StepMeter(blueprint, planner.layout), batch=largest)


def step_bytes(**given: Any) -> int:
    facts = predict(**given)
    return int(facts["predicted_bytes"] - facts["parts"]["runtime"])


def test_prediction_moves_with_the_settings(files: Path) -> None:
    base = files / "deep"
    plain = step_bytes(base=base)
    assert step_bytes(base=base, rows=16) > 1.7 * plain
    assert step_bytes(base=base, length=240) > 1.7 * plain
    assert step_bytes(base=base, lora={"r": 64}) > plain
    assert step_bytes(base=base, lora={"target_modules": "attention"}) < plain
    assert step_bytes(base=base, training={"gradient_checkpointing": True}) < 0.8 * plain
    assert step_bytes(base=base, training={"token_budget": 256}) < 0.5 * plain
    # The step follows the micro-batch, not the rows of the step.
    assert step_bytes(base=base, rows=16, training={"token_budget": 256}) == step_bytes(
        base=base, rows=8, training={"token_budget": 256}
    )


def test_weights_that_are_pages_of_their_file_are_apart(files: Path) -> None:
    mapped = predict(files / "base")
    assert mapped["mapped_bytes"] > 0
    assert mapped["parts"]["weights"] == 0
    held = predict(files / "base", model={"quantization": "nf4"})
    assert 0 < held["parts"]["weights"] < mapped["mapped_bytes"]


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch", 8 * 9000),
        ("sgd", 0),
        ("adafactor", 4 * (80 + 100) + 4 * 1000),
        ("adamw_8bit", 2 * 8000 + 8 * 1000),
    ],
)
def test_moments_of_the_optimizer(optim: str, expected: int) -> None:
    assert optimizer_bytes(optim, [(80, 100), (1000,)]) == expected


def test_advice_is_in_order_and_adds_up(files: Path) -> None:
    config = settings(files / "base", lora={"r": 32})
    blueprint = sketch_blueprint(config, config.lora, dtype=torch.float32, device=CPU)
    assert not isinstance(blueprint, str)
    planner, _ = expect_planner(blueprint, config, free=1 << 34)
    examples = [example(([(7 * i + j) % 60 for j in range(200)], [1, 2, 3])) for i in range(16)]
    found = advise(Situation(config, examples, planner, CPU, torch.float32, 0), free=0)
    keys = [step["set"].partition("=")[0] for step in found]
    order = ["training.token_budget", "training.gradient_checkpointing", "model.quantization", "lora.target_modules"]
    assert list(dict.fromkeys(keys))[:4] == order
    assert not any(step["fits"] for step in found)
    assert found[0]["needed_bytes"] > found[-1]["needed_bytes"]
    first = advise(Situation(config, examples, planner, CPU, torch.float32, 0), free=found[0]["needed_bytes"])
    assert [step["fits"] for step in first] == [True]


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"variant": "eva"}, {"variant": "pissa"}])
def test_every_kind_of_adapter_is_planned_without_its_numbers(files: Path, lora: dict[str, Any]) -> None:
    planned = make(files, lora=lora)
    assert planned["memory"]["predicted_bytes"] > 0
    if lora.get("variant") == "pissa":  # saved as a plain LoRA of twice the rank
        assert planned["disk"]["adapter_bytes"] == 8 * planned["parameters"]["trainable"]


def test_dora_on_a_quantized_base_is_not_planned(files: Path) -> None:
    with pytest.raises(ModelError, match="DoRA reads the weights of a quantized base"):
        make(files, lora={"variant": "dora"}, model={"quantization": "nf4"})


def test_a_very_long_run_is_counted_by_its_epochs(files: Path) -> None:
    short, long = (make(files, training={"max_steps": steps}) for steps in (1_000_000, 1_000_000_000))
    assert long["tokens"]["steps"] == 1_000_000_000
    assert long["tokens"]["rows"] == pytest.approx(short["tokens"]["rows"] * 1e3, rel=1e-6)


def test_what_does_not_fit_is_not_probed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the system would kill it")

    monkeypatch.setattr(plan_module, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(plan_module, "run_probe", never)
    planned = make(files, probe=True)
    assert planned["fits"] is False
    assert planned["time"] == {"seconds": None, "why": "not measured: the run would not fit into memory"}


def test_the_cache_of_frozen_layers_is_planned(files: Path) -> None:
    settings: dict[str, Any] = {"lora": {"layers_to_transform": [-1]}, "training": {"num_train_epochs": 2}}
    assert make(files, **settings)["disk"]["frozen_trunk_bytes"] > 0
    assert make(files)["disk"]["frozen_trunk_bytes"] is None
