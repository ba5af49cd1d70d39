"""What a merge refuses, each with its exit code and reason, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoKrConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loralab
from loralab.errors import LoralabError
from loralab.models import merged_folder, merging
from loralab.progress import Reporter
from loralab.workflows import merge as merge_workflow
from loralab.workflows import merge_checks, merge_proof
from loralab.workflows.merge import MergeRequest, merge
from support import tiny
from support.command import snapshot, write_config

ADAPTER = "adapter_model.safetensors"
FACTS = "adapter_facts.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and adapters of other kinds, of another base and with another template; copied, not touched."""
    folder = tmp_path_factory.mktemp("world")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(8))
    patch = pytest.MonkeyPatch()
    patch.setattr("loralab.workflows.train.build_report", lambda _: None)
    tiny.save_base(folder / "base", "llama")
    sections: dict[str, Any] = {"training": {"max_steps": 1}, "evaluation": {"split": "train"}}
    adapter = loralab.train(tiny.run_config(folder / "base", rows, folder / "run", **sections)).path / "adapter"
    patch.undo()
    edit(shutil.copytree(adapter, folder / "second") / "prompt_contract.json", template="another one")
    third = shutil.copytree(adapter, folder / "third")
    facts = json.loads((third / FACTS).read_text())
    edit(third / FACTS, base=facts["base"] | {"sha256": "0" * 64})
    edit(third / "adapter_config.json", base_model_name_or_path="strange")
    kinds: dict[str, dict[str, Any]] = {
        "saving": {"modules_to_save": ["norm"]},
        "dora": {"use_dora": True},
    }
    for name, fields in kinds.items():
        edit(shutil.copytree(adapter, folder / name) / "adapter_config.json", **fields)
    lokr = shutil.copytree(adapter, folder / "lokr")
    LoKrConfig(base_model_name_or_path=str(folder / "base"), target_modules=["q_proj"]).save_pretrained(str(lokr))
    return folder


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A run that may be damaged, with a base of its own."""
    shutil.copytree(world / "base", tmp_path / "base")
    copy = Path(shutil.copytree(world / "run", tmp_path / "run"))
    text = (copy / "config.yaml").read_text().replace(str(world / "base"), str(tmp_path / "base"))
    (copy / "config.yaml").write_text(text)
    return copy


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector's walk over all that tests have loaded takes more time than a merge."""
    monkeypatch.setattr("loralab.workflows.merge.release_models", lambda: None)


def refused(path: Path, output: Path, *, code: int, **request: Any) -> str:
    """Return what is said of a refusal, after checking its code and that nothing but what was there is there."""
    before = snapshot(output.parent)
    with pytest.raises(LoralabError) as caught:
        merge(path, MergeRequest(output, **request), reporter=Reporter())
    assert caught.value.exit_code == code, str(caught.value)
    assert snapshot(output.parent) == before
    return str(caught.value)


def change(file: Path, alter: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    alter(tensors)
    save_file({name: value.clone() for name, value in tensors.items()}, file, metadata={"format": "pt"})


def flip_one_bit(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(torch.int32).view(-1)[3] ^= 1


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[3] = float("nan")


@pytest.mark.parametrize("alter", [flip_one_bit, set_nan])
@pytest.mark.parametrize("alone", [False, True])
def test_a_corrupted_tensor(run: Path, tmp_path: Path, alter: Any, alone: bool) -> None:
    change(run / "adapter" / ADAPTER, alter)
    if alone:  # its own facts know it
        (tmp_path / "elsewhere").mkdir()
        shutil.copytree(run / "adapter", tmp_path / "elsewhere" / "adapter")
    path = tmp_path / "elsewhere" / "adapter" if alone else run
    said = refused(path, tmp_path / "out", code=3)
    assert "the adapter's tensors have changed since they were saved" in said


def test_numbers_that_are_none_where_no_hash_is_known(run: Path, tmp_path: Path) -> None:
    change(run / "adapter" / ADAPTER, set_nan)
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    (adapter / "adapter_facts.json").unlink()
    assert "not finite" in refused(adapter, tmp_path / "out", code=3)


@pytest.mark.parametrize("alone", [False, True])
def test_a_base_that_was_changed_by_one_weight(run: Path, tmp_path: Path, alone: bool) -> None:
    change(tmp_path / "base" / "model.safetensors", flip_one_bit)
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    path, model = (adapter, str(tmp_path / "base")) if alone else (run, None)
    assert "not the base of this adapter" in refused(path, tmp_path / "out", code=2, base_model=model)


def test_a_second_merge(run: Path, tmp_path: Path) -> None:
    merge(run, MergeRequest(tmp_path / "merged"), reporter=Reporter())
    said = refused(run, tmp_path / "out", code=2, base_model=str(tmp_path / "merged"))
    assert "a second merge would apply it twice" in said


def test_another_revision_of_the_base(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of the Hub, in the cache; its configuration names a commit that is not the one of the run."""
    commits = {name: character * 40 for name, character in (("then", "a"), ("now", "b"))}
    cache = tmp_path / "cache"
    hub = cache / "models--some--base"
    for commit in commits.values():
        shutil.copytree(tmp_path / "base", hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commits["now"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name"] = "some/base"
    record = json.loads((run / "run.json").read_text())
    record["model"] |= {"name": "some/base", "sha256": None, "revision": commits["then"]}
    (run / "run.json").write_text(json.dumps(record))
    facts = json.loads((run / "adapter" / "adapter_facts.json").read_text())
    (run / "adapter" / "adapter_facts.json").write_text(json.dumps(facts | {"base": {}}))
    write_config(run / "config.yaml", config | {"model": config["model"] | {"revision": commits["now"]}})
    assert "it was trained on revision aaaaaaaaaaaa, this is bbbbbbbbbbbb" in refused(run, tmp_path / "out", code=2)
    write_config(run / "config.yaml", config)  # none is named: the one of the run is taken
    content = merge(run, MergeRequest(tmp_path / "out"), reporter=Reporter())
    assert content["base"] == {"name": "some/base", "revision": commits["then"], "sha256": None}
    assert "base_model: some/base" in (tmp_path / "out" / "README.md").read_text()


def test_tensors_that_are_cut_short(run: Path, tmp_path: Path) -> None:
    file = run / "adapter" / ADAPTER
    file.write_bytes(file.read_bytes()[:-9])
    assert "the adapter's tensors cannot be read" in refused(run, tmp_path / "out", code=3)


def test_facts_that_are_nonsense(run: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    (adapter / FACTS).write_text(json.dumps({"base": 3, "quantization": 7}))
    assert "model.quantization got 7" in refused(adapter, tmp_path / "out", code=2)


@pytest.mark.parametrize(("weight", "said"), [(0.0, "leaves it out"), (float("nan"), "is no finite number")])
def test_weights_that_are_none(world: Path, tmp_path: Path, weight: float, said: str) -> None:
    assert said in refused(world / "run", tmp_path / "out", code=2, weight=weight)
    assert said in refused(world / "run", tmp_path / "out", code=2, others=[(world / "second", weight)])


def test_numbers_too_large_for_the_type(run: Path, tmp_path: Path) -> None:
    """In an adapter that does not know its base by its hash."""
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    (adapter / FACTS).unlink()

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5

    change(tmp_path / "base" / "model.safetensors", grow)
    base = str(tmp_path / "base")
    said = refused(adapter, tmp_path / "out", code=2, base_model=base, dtype="float16")
    assert "model.layers.0.mlp.down_proj.weight has weights up to 1e+05, and float16 ends at 6.55e+04" in said


def test_an_adapter_that_holds_a_larger_embedding(world: Path, tmp_path: Path) -> None:
    """As PEFT writes it where the vocabulary was resized."""
    adapter = Path(shutil.copytree(world / "run" / "adapter", tmp_path / "adapter"))
    (adapter / FACTS).unlink()

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.lm_head.weight"] = torch.zeros(999, 32)

    change(adapter / ADAPTER, add)
    said = refused(adapter, tmp_path / "out", code=2)
    assert "it holds a lm_head.weight of shape (999, 32), not (" in said


def test_places_that_are_taken_or_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert "is already there" in refused(run, tmp_path / "there", code=2)
    assert "lies inside" in refused(run, run / "adapter" / "merged", code=2)
    assert "lies inside" in refused(run, tmp_path / "base" / "merged", code=2)


def test_an_empty_folder_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(run, MergeRequest(tmp_path / "out"), reporter=Reporter())
    assert (tmp_path / "out" / "merge.json").is_file()


def test_a_disk_without_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge_checks.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "are free" in refused(run, tmp_path / "out", code=2)


def test_a_disk_that_gets_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merged_folder, "save_file", full)
    assert "No space left on device" in refused(run, tmp_path / "out", code=2)


def test_adapters_that_name_different_bases(world: Path, tmp_path: Path) -> None:
    """Of both, nothing but the name of the base is known."""
    for name, adapter in (("run", world / "run" / "adapter"), ("third", world / "third")):
        shutil.copytree(adapter, tmp_path / name)
        (tmp_path / name / FACTS).unlink()
    said = refused(tmp_path / "run", tmp_path / "out", code=2, others=[(tmp_path / "third", 0.5)])
    assert "adapters of different bases: base and strange" in said


def test_what_a_killed_merge_left_goes(run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.merging-99999999"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    merge(run, MergeRequest(tmp_path / "out"), reporter=Reporter())
    assert not left.exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("second", "adapters with different prompt contracts: template"),
        ("third", "not the base of this adapter"),
        ("saving", "it trains modules_to_save"),
        ("lokr", "adapters of different kinds: lokr, lora"),
        ("dora", "kind dora does more than add"),
    ],
)
def test_adapters_that_do_not_go_together(world: Path, tmp_path: Path, other: str, said: str) -> None:
    assert said in refused(world / "run", tmp_path / "out", code=2, others=[(world / other, 0.5)])


def test_wishes_without_effect(world: Path, tmp_path: Path) -> None:
    assert "--onto original has no effect" in refused(world / "run", tmp_path / "out", code=2, onto="original")
    assert "no such dtype: 'float8'" in refused(world / "run", tmp_path / "out", code=2, dtype="float8")


def test_a_prompt_adapter(world: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(world / "run" / "adapter", tmp_path / "adapter"))
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    base = str(world / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    assert "is no change of weights" in refused(adapter, tmp_path / "out", code=2)


def test_a_merge_that_computes_something_else(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer gets its update twice: the proof finds it."""
    right = merging.Skeleton.merged

    def wrong(skeleton: Any, name: str, weights: Any) -> dict[str, torch.Tensor]:
        found = right(skeleton, name, weights)
        if name.endswith("layers.0.self_attn.v_proj"):
            found["weight"] = 2 * found["weight"] - weights["weight"]
        return found

    monkeypatch.setattr(merging.Skeleton, "merged", wrong)
    for dtype in (None, "bfloat16"):
        said = refused(world / "run", tmp_path / "out", code=3, dtype=dtype)
        assert "the merged model does not answer as the adapter does" in said


def test_a_proof_of_numbers_that_are_none_fails() -> None:
    figures = {"max_logit_difference": float("nan"), "logit_standard_deviation": 1.0, "vocabulary_difference": 0}
    with pytest.raises(LoralabError) as caught:
        merge_proof.check_bars(figures, merge_proof.bars_of(figures, torch.float32), "here")
    assert caught.value.exit_code == 3


def test_a_merged_model_that_computes_no_numbers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = merge_workflow._reload

    def broken(*given: Any) -> Any:
        model = load(*given)
        model.lm_head.weight.data[3, 3] = float("nan")
        return model

    monkeypatch.setattr(merge_workflow, "_reload", broken)
    assert "logits that are no finite numbers" in refused(world / "run", tmp_path / "out", code=3)


def test_the_run_is_as_it_was(run: Path, tmp_path: Path) -> None:
    before = snapshot(run), snapshot(tmp_path / "base")
    merge(run, MergeRequest(tmp_path / "out"), reporter=Reporter())
    assert (snapshot(run), snapshot(tmp_path / "base")) == before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
