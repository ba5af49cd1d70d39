"""The cache of the frozen layers: same loss and gradients, same bits after a kill, and never without a reason."""

import errno
import functools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import loralab
from loralab.config.schema import LoraConfig
from loralab.errors import StoppedBySignal, StorageError
from loralab.layout.collate import StepBatch
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.trunk import CachedTrunk, find_trunk
from loralab.models.trunk_store import TrunkStore
from loralab.training.checkpoint import list_checkpoints
from loralab.workflows.trunk_check import examine_trunk, keep_states, trunk_states
from support import quantized, tiny
from support.families import OTHER_FAMILIES, TREE_FAMILIES, build_family, lora_targets
from support.kills import Kill, train_until_killed
from support.layouts import ALWAYS_SHARE, draw_adapter, largest_difference, loss_and_gradients, sharing_rows

VOCABULARY = 97
ALL = 1_000_000
PLANNERS = {
    "padded": Planner(ALL, layout="padded"),
    "packed": Planner(160, layout="packed"),
    "shared": Planner(ALL, cost=ALWAYS_SHARE),
    "shared, cut": Planner(60, cost=ALWAYS_SHARE),
}
SAME = 1e-5
TOP = LoraConfig(r=4, dropout=0.2, layers_to_transform=[1])
Sections = dict[str, dict[str, Any]]


def cached_alone(model: SupervisedPeftModel, planner: Planner, rows: list[Any]) -> CachedTrunk:
    """Return what the frozen layers give, computed in another layout: each row for itself."""
    return cached_of(model, planner, [planner([row]) for row in rows])


def cached_of(model: SupervisedPeftModel, planner: Planner, steps: list[StepBatch]) -> CachedTrunk:
    trunk = find_trunk(model.body, layers=2)
    kind = examine_trunk(model, trunk, planner)
    assert isinstance(kind, TrunkStore), kind
    model.eval()
    for step in steps:
        for batch in step.micro_batches:
            keep_states(kind, batch, trunk_states(model, trunk, batch))
    return CachedTrunk(trunk, kind)


def check_equal(model: SupervisedPeftModel, planner: Planner) -> None:
    """Compare a step with dropout: from what the same layout gave to the last bit, from another one to rounding."""
    model.tree_kernel = None if planner.layout == "padded" else resolve_tree_kernel(model).value
    rows = sharing_rows(3, vocabulary=VOCABULARY)
    run = functools.partial(loss_and_gradients, model, planner, rows, dropout_key=(7, 3))
    loss, gradients, step = run()
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    for cached, exact in ((cached_of(model, planner, [step]), True), (cached_alone(model, planner, rows), False)):
        model.cached_trunk = cached
        found, others, _ = run()
        model.cached_trunk = None
        assert (cached.hits, cached.misses) == (len(step.micro_batches), 0)
        assert found == pytest.approx(loss, rel=0 if exact and len(step.micro_batches) == 1 else SAME)
        assert largest_difference(others, gradients) <= (0 if exact and len(step.micro_batches) == 1 else SAME)


def build(family: str, *, checkpointing: bool = False, **lora: Any) -> SupervisedPeftModel:
    base = build_family(family, vocabulary=VOCABULARY)
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    config = TOP.model_copy(update={"target_modules": lora_targets(family), **lora})
    model, _ = build_adapter(base, config, seed=0)
    draw_adapter(model, seed=1)
    return model


# Trees that are cut and plain rows for every family, the layouts in between for some.
CASES = [(family, layout) for family in TREE_FAMILIES for layout in ("padded", "shared, cut")]
CASES += [(family, layout) for family in ("gpt2", "llama", "gemma2") for layout in ("packed", "shared")]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_loss_and_gradients_are_the_same(family: str, layout: str) -> None:
    check_equal(build(family), PLANNERS[layout])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "gpt-neox"])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_they_are_with_checkpointing(family: str, layout: str) -> None:
    check_equal(build(family, checkpointing=True), PLANNERS[layout])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2, with bias"])
def test_they_are_on_a_quantized_base(shape: str, kind: str, tmp_path: Path) -> None:
    base = quantized.load(quantized.save_base(tmp_path, shape), **quantized.KINDS[kind])
    model, _ = build_adapter(base, TOP, seed=0)
    draw_adapter(model, seed=1)
    for layout in ("padded", "shared, cut"):
        check_equal(model, PLANNERS[layout])


def test_a_step_of_which_a_path_is_missing_runs_in_full() -> None:
    model, planner = build("llama"), PLANNERS["shared"]
    model.tree_kernel = resolve_tree_kernel(model).value
    rows = sharing_rows(3, vocabulary=VOCABULARY)
    run = functools.partial(loss_and_gradients, model, planner, rows, dropout_key=(7, 3))
    loss, gradients, _ = run()
    model.cached_trunk = cached_alone(model, planner, rows[:-1])
    found, others, _ = run()
    assert (model.cached_trunk.hits, model.cached_trunk.misses) == (0, 1)
    assert found == loss
    assert largest_difference(others, gradients) == 0.0


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_are_the_same_or_refused(family: str) -> None:
    """Those of them that pass the probe are equal; the run itself refuses what no table says can be cut."""
    try:
        model = build(family)
    except loralab.errors.LoralabError:
        pytest.skip("it takes no adapter on its top layer alone")
    trunk = find_trunk(model.body, layers=2)
    reason = examine_trunk(model, trunk, PLANNERS["padded"])
    if isinstance(reason, str):
        assert len(reason) > 20
    elif family != "mamba":  # which reads some of its layers past their adapters, so that these have no gradient
        check_equal(model, PLANNERS["padded"])


def test_a_layer_that_looks_beside_its_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    trunk = find_trunk(model.body, layers=2)
    own = trunk.layers[0].mlp.forward
    monkeypatch.setattr(trunk.layers[0].mlp, "forward", lambda states: own(states) + states.mean(dim=(0, 1)))
    reason = examine_trunk(model, trunk, PLANNERS["padded"])
    assert isinstance(reason, str)
    assert reason.startswith("what its frozen layers give depends on other rows")


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, another one, and rows; read only."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "base": tiny.save_base(folder / "base"),
        "other": tiny.save_base(folder / "other", seed=1),
        "rows": tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(16)),
        "validation": tiny.write_rows(folder / "validation.json", tiny.alpaca_rows(6, seed=9)),
    }


def config(files: dict[str, Path], output: Path, *parts: Sections, base: str = "base") -> dict[str, Any]:
    merged: Sections = {
        "data": {"validation": str(files["validation"])},
        "lora": {"layers_to_transform": [1], "dropout": 0.1},
        "training": {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None},
        # Several portions of rows, several micro-batches of a step.
        "evaluation": {"batch_size": 4},
    }
    for part in parts:
        for name, values in part.items():
            merged[name] = merged.get(name, {}) | values
    return tiny.run_config(files[base], files["rows"], output, **merged)


SMALL: Sections = {"training": {"token_budget": 64}}
OFF: Sections = {"training": {"cache_frozen_trunk": "off"}}


@pytest.fixture(scope="module")
def whole(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> loralab.Run:
    return loralab.train(config(files, tmp_path_factory.mktemp("whole") / "run", SMALL))


def cache_of(run: Path) -> Path:
    return run / "checkpoints" / "frozen-trunk"


@pytest.fixture(scope="module")
def killed(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps that was killed for good in its second epoch, about the sixth; read only."""
    folder = tmp_path_factory.mktemp("killed")
    path = folder / "config.json"
    path.write_text(json.dumps(config(files, folder / "run", SMALL)))
    assert train_until_killed(Kill("step", 6, 0.0), path, folder=folder) is not None
    newest = list_checkpoints(folder / "run" / "checkpoints")[-1].name
    assert newest in ("checkpoint-4", "checkpoint-6")
    return folder / "run"


def test_the_curve_is_that_of_a_run_without(files: dict[str, Path], whole: loralab.Run, tmp_path: Path) -> None:
    facts = whole.record["frozen_trunk"]
    assert whole.record["resolved"]["cache_frozen_trunk"]["value"] == facts["value"] == "on"
    assert "the lower 1 of 2 layers are frozen" in facts["reason"]
    assert facts["splits"] == ["train", "validation"]
    assert facts["forwards_in_full"] == 0
    assert facts["forwards_from_cache"] >= 3 * 4 + 3
    assert facts["bytes"] == facts["tokens"] * 32 * 4 > 0
    assert not cache_of(whole.path).exists()
    plain = loralab.train(config(files, tmp_path / "plain", SMALL, OFF))
    assert plain.record["resolved"]["cache_frozen_trunk"]["reason"] == "set in training.cache_frozen_trunk"
    pairs = list(zip(whole.metrics, plain.metrics, strict=True))
    assert len(pairs) == 12 + 3
    for own, other in pairs:
        for name in {"loss", "grad_norm", "eval_loss"} & own.keys():
            assert own[name] == pytest.approx(other[name], rel=SAME)
    own, other = (json.loads((run.path / "evaluation.json").read_text()) for run in (whole, plain))
    for name in ("eval_loss", "perplexity"):
        assert own[name] == pytest.approx(other[name], rel=SAME)
        assert own["base"][name] == pytest.approx(other["base"][name], rel=SAME)
    assert own["base"]["eval_loss"] != own["eval_loss"]


@pytest.mark.parametrize("cache", ["kept", "lost", "damaged", "of another base", "half built"])
def test_a_resume_after_a_kill_in_epoch_two_is_bit_equal(
    cache: str, files: dict[str, Path], whole: loralab.Run, killed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    folder = cache_of(run)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["progress"]["portions"] > 0
    states = folder / "states.bin"
    if cache == "lost":
        shutil.rmtree(folder)
    if cache == "damaged":
        states.write_bytes(bytes([states.read_bytes()[0] ^ 1]) + states.read_bytes()[1:])
    if cache == "of another base":
        manifest["key"]["model"]["sha256"] = "0" * 64
        states.write_bytes(bytes(states.stat().st_size))
    if cache == "half built":
        manifest |= {"rows": 0, "progress": {"portions": 0}}
    if folder.exists():
        (folder / "manifest.json").write_text(json.dumps(manifest))
    resumed = loralab.train(config(files, run, SMALL), resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    losses = [[line["eval_loss"] for line in each.metrics if "eval_loss" in line] for each in (resumed, whole)]
    assert losses[0] == losses[1]
    anew = [event["what"] for event in resumed.record["events"] if "computed anew" in event["what"]]
    assert len(anew) == (cache == "damaged")
    assert not folder.exists()


def test_a_full_disk_ends_the_filling_and_not_the_run(
    files: dict[str, Path], whole: loralab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = TrunkStore.append

    def until_full(store: TrunkStore, *args: Any) -> None:
        if store.folder is not None and len(store) > 150:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(store, *args)

    monkeypatch.setattr(TrunkStore, "append", until_full)
    monkeypatch.setattr("loralab.workflows.trunk_building._PORTION", 1)
    full = loralab.train(config(files, tmp_path / "run", SMALL))
    facts = full.record["frozen_trunk"]
    assert (facts["value"], facts["reason"]) == ("off", "the disk was full before all training rows were stored")
    assert full.record["resolved"]["cache_frozen_trunk"]["value"] == "off"
    assert any("No space left" in event["what"] for event in full.record["events"])
    for own, other in zip(full.metrics, whole.metrics, strict=True):
        for name in {"loss", "eval_loss"} & own.keys():
            assert own[name] == pytest.approx(other[name], rel=SAME)
    # A resume keeps to it, however much room there is now.
    resumed = Path(shutil.copytree(full.path, tmp_path / "resumed"))
    for path in list_checkpoints(resumed / "checkpoints"):
        if int(path.name.rpartition("-")[2]) > 4:
            shutil.rmtree(path)
    record = json.loads((resumed / "run.json").read_text())
    (resumed / "run.json").write_text(json.dumps(record | {"status": "running"}))
    monkeypatch.setattr(TrunkStore, "append", append)
    again = loralab.train(config(files, resumed, SMALL), resume=True)
    assert again.record["frozen_trunk"]["value"] == "off"
    assert again.record["adapter_sha256"] == full.record["adapter_sha256"]


def test_another_base_has_another_cache(
    files: dict[str, Path], whole: loralab.Run, killed: Path, tmp_path: Path
) -> None:
    """What one base left is nothing to another that is trained in its place."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    expected = loralab.train(config(files, tmp_path / "fresh", SMALL, base="other"))
    replaced = loralab.train(config(files, run, SMALL, base="other"), overwrite=True)
    assert replaced.record["adapter_sha256"] == expected.record["adapter_sha256"]
    assert replaced.record["adapter_sha256"] != whole.record["adapter_sha256"]


def test_a_signal_while_it_fills_is_obeyed_and_resumed(
    files: dict[str, Path], whole: loralab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    own = trunk_states

    def with_signal(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGTERM)
        return own(*args)

    monkeypatch.setattr("loralab.workflows.trunk_building._PORTION", 1)
    monkeypatch.setattr("loralab.workflows.trunk_building.trunk_states", with_signal)
    with pytest.raises(StoppedBySignal, match="SIGTERM"):
        loralab.train(config(files, tmp_path / "run", SMALL))
    assert json.loads((cache_of(tmp_path / "run") / "manifest.json").read_text())["progress"]["portions"] > 0
    monkeypatch.setattr("loralab.workflows.trunk_building.trunk_states", own)
    resumed = loralab.train(config(files, tmp_path / "run", SMALL), resume=True)
    uninterrupted = loralab.train(config(files, tmp_path / "again", SMALL))
    assert resumed.record["adapter_sha256"] == uninterrupted.record["adapter_sha256"]


NO_CACHE: dict[str, tuple[Sections, str]] = {
    "every layer": ({"lora": {"layers_to_transform": None}}, "0 of 2 layers lie below the adapter"),
    "one pass": ({"training": {"num_train_epochs": 1}}, "no row goes through the model more than once"),
    "dropout": ({"model": {"base_dropout": "as_configured"}}, "model.base_dropout is as_configured"),
    "embedding": ({"lora": {"trainable_token_indices": [5]}}, "weights are trained in front of the layers"),
}


@pytest.mark.parametrize("case", NO_CACHE)
def test_the_reason_for_no_cache_is_said(case: str, files: dict[str, Path], tmp_path: Path) -> None:
    part, reason = NO_CACHE[case]
    run = loralab.train(config(files, tmp_path / "run", part))
    choice = run.record["resolved"]["cache_frozen_trunk"]
    assert choice["value"] == "off"
    assert reason in choice["reason"]


def test_checkpointing_is_no_reason_against_it(files: dict[str, Path], whole: loralab.Run, tmp_path: Path) -> None:
    run = loralab.train(config(files, tmp_path / "run", SMALL, {"training": {"gradient_checkpointing": True}}))
    assert run.record["frozen_trunk"]["value"] == "on"
    assert run.record["adapter_sha256"] == whole.record["adapter_sha256"]


def test_several_evaluations_are_a_reason_for_their_rows(files: dict[str, Path], tmp_path: Path) -> None:
    often: Sections = {"training": {"num_train_epochs": 1}, "evaluation": {"strategy": "steps", "steps": 1}}
    run = loralab.train(config(files, tmp_path / "run", often))
    facts = run.record["frozen_trunk"]
    assert facts["splits"] == ["validation"]
    assert facts["forwards_from_cache"] >= 4
    assert facts["forwards_in_full"] == 4


def test_no_room_is_a_reason(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.workflows.frozen_trunk._MOST_BYTES", 1000)
    run = loralab.train(config(files, tmp_path / "run"))
    assert "it could take 0.1 MB, and at most 0.0 MB are used" in run.record["frozen_trunk"]["reason"]


def test_what_evaluation_does_never_changes_the_adapter(
    files: dict[str, Path], whole: loralab.Run, tmp_path: Path
) -> None:
    """Rows of validation are added behind those of training, so these give the same with and without them."""
    never: Sections = {"evaluation": {"strategy": "no", "split": "train"}}
    run = loralab.train(config(files, tmp_path / "run", SMALL, never))
    assert run.record["frozen_trunk"]["splits"] == ["train"]
    assert run.record["adapter_sha256"] == whole.record["adapter_sha256"]


def test_the_last_evaluation_is_that_of_the_eval_command(whole: loralab.Run, tmp_path: Path) -> None:
    """Nobody who evaluates a run again has its cache, so neither has the run's own last evaluation."""
    before = json.loads((whole.path / "evaluation.json").read_text())
    again = loralab.Run(Path(shutil.copytree(whole.path, tmp_path / "run"))).evaluate()
    assert (again["eval_loss"], again["base"]["eval_loss"]) == (before["eval_loss"], before["base"]["eval_loss"])


def test_a_cache_that_goes_away_is_told(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CachedTrunk.find

    def without_folder(cached: CachedTrunk, *args: Any) -> Any:
        if cached.hits == 5 and cached.store.folder is not None:
            shutil.rmtree(cached.store.folder, ignore_errors=True)
        return own(cached, *args)

    monkeypatch.setattr(CachedTrunk, "find", without_folder)
    with pytest.raises(StorageError, match="what was kept of the frozen layers cannot be read"):
        loralab.train(config(files, tmp_path / "run", SMALL))
