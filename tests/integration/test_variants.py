"""Every variant on a plain and a quantized base trains, resumes and loads in plain PEFT, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import loralab
from loralab.config.lora_checks import FACTS
from loralab.config.schema import LoraConfig, ModelConfig
from loralab.errors import ConfigError
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter, load_adapter
from loralab.models.load import load_base_model
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.variants import VARIANTS, residual_rank
from loralab.workflows.inspect import inspect_adapter
from loralab.workflows.inspect_base import attach
from support import tiny
from support.families import SPREAD
from support.layouts import ALWAYS_SHARE, CPU, largest_difference, loss_and_gradients, sharing_rows

FAMILIES: tuple[tiny.Family, ...] = ("llama", "gpt2")
QUANTIZATIONS = ("none", "nf4")
# Widths that bitsandbytes' own kernel dequantizes rightly on a CPU, since plain PEFT's DoRA goes by it.
WIDTHS = {"llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}, "gpt2": {"n_embd": 64}}
CASES = [(name, family, held) for name in VARIANTS for family in FAMILIES for held in QUANTIZATIONS]
PACKED = "PEFT shapes the update as the stored weight, which 4 bits pack"
CONV1D = "whose layers are Conv1D: PEFT has it for nn.Linear alone"
REFUSED = {
    ("loftq", "llama", "none"): "it makes up for what 4-bit quantization changed",
    ("loftq", "gpt2", "none"): "it makes up for what 4-bit quantization changed",
    **{(name, family, "nf4"): PACKED for name in ("loha", "lokr") for family in FAMILIES},
    **{(name, "gpt2", "none"): CONV1D for name in ("loha", "lokr")},
}
WORKING = [case for case in CASES if case not in REFUSED]
WITHOUT_DROPOUT = ("loha", "lokr", "ia3")
ALL = 1_000_000
LAYOUTS = {
    "padded, one row at a time": Planner(1, layout="padded"),
    "packed, 90 tokens": Planner(90, layout="packed"),
    "shared": Planner(ALL, cost=ALWAYS_SHARE),
    "shared, 50 tokens": Planner(50, cost=ALWAYS_SHARE),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_base(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def save_base(folder: Path, family: tiny.Family) -> Path:
    tokenizer = tiny.build_tokenizer()
    config = tiny.build_model(family, vocabulary=len(tokenizer)).config
    config.update(WIDTHS[family])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(base: Path, held: str, **settings: Any) -> PreTrainedModel:
    model = ModelConfig(name=str(base), quantization=held)  # type: ignore[arg-type]
    loaded, _ = load_base_model(model, **{"dtype": torch.float32, "device": CPU} | settings)
    return loaded


def run_config(base: Path, folder: Path, variant: str, held: str, **lora: Any) -> dict[str, Any]:
    """Return a run of 4 steps with a checkpoint after the second and the last."""
    usable = FACTS[variant].keys
    keys = {name: value if name in usable else default(name) for name, value in {"r": 4, "alpha": 8}.items()}
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(10))
    sections: dict[str, dict[str, Any]] = {
        "model": {"quantization": held},
        "data": {"validation": 2},
        "lora": {"variant": variant} | keys | lora,
        "training": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None},
        "evaluation": {"split": "train"},
    }
    if variant in ("vera", "ia3"):  # few weights, each of which must move far
        sections["training"]["learning_rate"] = 0.1
    return tiny.run_config(base, rows, folder / "run", **sections)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take more time than everything else here together."""
    monkeypatch.setattr("loralab.workflows.train.build_report", lambda _: None)


def build(base: Path, variant: str, held: str, **lora: Any) -> SupervisedPeftModel:
    """Return a model whose adapter has been moved from where it started."""
    section = LoraConfig(variant=variant, **lora)  # type: ignore[arg-type]
    loaded = load(base, held, residual_rank=residual_rank(section))
    rows = Planner(ALL, layout="padded")(sharing_rows(5, vocabulary=97)).micro_batches
    batches = [
        {"input_ids": row.input_ids, "attention_mask": row.attention_mask, "position_ids": row.position_ids[0]}
        for row in rows
    ]
    model, _ = build_adapter(loaded, section, seed=3, batches=batches)
    model.tree_kernel = "per_tree"
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.5 * SPREAD * torch.randn(weight.shape, generator=generator)
    return model


def default(name: str) -> Any:
    return LoraConfig.model_fields[name].get_default()


def killed_after_two(run: loralab.Run, folder: Path) -> Path:
    cut = Path(shutil.copytree(run.path, folder))
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    shutil.rmtree(cut / "adapter")
    record = json.loads((cut / "run.json").read_text(encoding="utf-8"))
    (cut / "run.json").write_text(json.dumps(record | {"status": "running"}), encoding="utf-8")
    return cut


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 24)[None]
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(("variant", "family", "held"), WORKING)
def test_trains_resumes_and_loads_in_plain_peft(
    bases: dict[str, Path], tmp_path: Path, variant: str, family: str, held: str
) -> None:
    config = run_config(bases[family], tmp_path, variant, held)
    whole = loralab.train(config)
    figures = json.loads((whole.path / "evaluation.json").read_text(encoding="utf-8"))
    assert figures["eval_loss"] < figures["base"]["eval_loss"]
    assert whole.record["steps"] == 4

    config["output"]["dir"] = str(killed_after_two(whole, tmp_path / "cut"))
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert [line.get("loss") for line in resumed.metrics] == [line.get("loss") for line in whole.metrics]

    base = load(bases[family], held)
    untouched = logits(base)
    peft = PeftModel.from_pretrained(base, whole.path / "adapter")
    expected = logits(peft)
    assert (expected - untouched).norm() > 1e-4 * untouched.norm()  # it does something
    own = load_adapter(load(bases[family], held), whole.path / "adapter")
    assert (logits(own) - expected).norm() <= 1e-5 * expected.norm()
    with own.disable_adapter():
        assert torch.equal(logits(own), untouched)
    inspected, tensors = inspect_adapter(whole.path)
    attach(inspected, tensors, str(bases[family]))
    assert [finding for finding in inspected["findings"] if finding["severity"] == "problem"] == []
    if family != "llama":
        return
    # What was evaluated at the end of the run is what was saved, on what was not changed.
    again = whole.evaluate()
    assert again["eval_loss"] == pytest.approx(figures["eval_loss"], rel=1e-6)
    assert again["base"]["eval_loss"] == pytest.approx(figures["base"]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(("variant", "family", "held"), REFUSED)
def test_is_refused_with_its_reason(
    bases: dict[str, Path], tmp_path: Path, variant: str, family: str, held: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loralab.train(run_config(bases[family], tmp_path, variant, held))
    (problem,) = caught.value.problems
    assert REFUSED[variant, family, held] in problem.what
    assert "lora.variant" in problem.where
    assert problem.fix.startswith("set ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("variant", "family", "held"), WORKING)
def test_every_layout_gives_the_same_loss_and_gradients(
    bases: dict[str, Path], variant: str, family: str, held: str
) -> None:
    dropout = {} if variant in WITHOUT_DROPOUT else {"dropout": 0.1}
    model = build(bases[family], variant, held, **dropout)
    rows, key = sharing_rows(0, vocabulary=97), (7, 3)
    expected, expected_gradients, _ = loss_and_gradients(model, Planner(ALL, layout="padded"), rows, dropout_key=key)
    for name, planner in LAYOUTS.items():
        loss, gradients, _ = loss_and_gradients(model, planner, rows, dropout_key=key)
        assert loss == pytest.approx(expected, rel=1e-5), name
        assert largest_difference(gradients, expected_gradients) <= 1e-5, name
    if dropout:  # it acts: other masks, another loss
        other, _, _ = loss_and_gradients(model, LAYOUTS["shared"], rows, dropout_key=(7, 4))
        assert abs(other - expected) > 1e-5 * expected


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adamw_8bit"])
def test_lora_plus_trains_every_b_faster_whatever_the_optimizer(
    bases: dict[str, Path], tmp_path: Path, optim: str
) -> None:
    """In the checkpoint, the groups of B have the ratio, with weight decay, after a schedule and after a resume."""
    config = run_config(bases["llama"], tmp_path, "lora_plus", "none", loraplus_lr_ratio=4, r=64, alpha=64)
    config["training"] |= {"optim": optim, "weight_decay": 0.1, "learning_rate": 1e-3}
    whole = loralab.train(config)
    config["output"]["dir"] = str(killed_after_two(whole, tmp_path / "cut"))
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    state = torch.load(resumed.path / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    groups = [group for group in state["param_groups"] if group["params"]]
    assert [len(group["params"]) for group in groups] == [14, 14]
    assert groups[1]["lr"] == pytest.approx(4 * groups[0]["lr"])
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert next(line["learning_rate"] for line in resumed.metrics if "loss" in line) == pytest.approx(1e-3)


def test_lora_plus_is_lora_at_a_ratio_of_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """And the ratio acts: by plain descent, B has moved so many times further after one step."""
    hashes, moved = {}, {}
    for name, lora in {"lora": {}, "one": {"loraplus_lr_ratio": 1}, "five": {"loraplus_lr_ratio": 5}}.items():
        (tmp_path / name).mkdir()
        config = run_config(bases["llama"], tmp_path / name, "lora" if name == "lora" else "lora_plus", "none", **lora)
        config["training"] |= {"optim": "sgd", "max_steps": 1}
        run = loralab.train(config)
        hashes[name] = run.record["adapter_sha256"]
        moved[name] = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert hashes["one"] == hashes["lora"]
    for name, weight in moved["five"].items():
        once = moved["lora"][name]
        assert torch.allclose(weight, 5 * once if "lora_B" in name else once, rtol=1e-5, atol=1e-9), name


def test_a_run_goes_on_from_a_saved_pissa_adapter_as_plain_lora(bases: dict[str, Path], tmp_path: Path) -> None:
    first = run_config(bases["llama"], tmp_path, "pissa", "none")
    run = loralab.train(first)
    for name in ("pissa", "lora"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="--warm-start with variant pissa, which is a choice of first weights"):
        loralab.train(run_config(bases["llama"], tmp_path / "pissa", "pissa", "none"), warm_start=run.path)
    second = run_config(bases["llama"], tmp_path / "lora", "lora", "none", r=8, alpha=16)
    second["training"] |= {"learning_rate": 1e-9, "max_steps": 1}
    again = loralab.train(second, warm_start=run.path)
    figures = json.loads((again.path / "evaluation.json").read_text(encoding="utf-8"))
    before = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
    assert figures["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
