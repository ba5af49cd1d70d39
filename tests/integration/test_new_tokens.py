"""New tokens, from a setting to an adapter that others load: runs, resumes, reloads, plans."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab
from loralab.data.dataset import prepare_data
from loralab.data.prompts.contract import CONTRACT_FILE
from loralab.errors import ModelError, RunFolderError
from loralab.models.adapters import load_adapter
from loralab.models.trainable_tokens import new_tokens_of, settle_tokens
from loralab.progress import Reporter
from loralab.reports.facts import load_facts
from loralab.reports.usage import describe_usage
from loralab.run import read_json
from loralab.workflows.adapter_start import warn_of_absent_tokens
from loralab.workflows.configure import load_run_config
from loralab.workflows.inspect import inspect_adapter
from loralab.workflows.inspect_base import attach
from loralab.workflows.plan import plan
from loralab.workflows.replay import replay
from loralab.workflows.session import Session, open_session
from support import tiny
from support.reporters import Notes

TOKENS = ["<tool_call>", "<|sep|>", " cat"]
# Llama's head is a matrix of its own. Of these, Qwen2 has rows to spare.
BASES: list[tuple[tiny.Family, int]] = [("llama", 0), ("qwen2", 8), ("gpt2", 0)]
TRAINING = {
    "num_train_epochs": 6,
    "learning_rate": 3e-2,
    "save_strategy": "steps",
    "save_steps": 8,
    "save_total_limit": None,
}


def save_base(folder: Path, family: tiny.Family = "llama", spare: int = 0) -> Path:
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(family, vocabulary=len(tokenizer) + spare).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(folder: Path) -> Path:
    """Write rows whose answers begin with one new token and hold another."""
    rows = [{**row, "output": "<tool_call>cat<|sep|> cat"} for row in tiny.alpaca_rows(16)]
    return tiny.write_rows(folder / "rows.json", rows)


def weights_sha256(base: Path) -> str:
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()


def open_alone(adapter: Path, base: Path, *overrides: str) -> Session:
    """Open an adapter folder as if it were all that there is, with its base named."""
    chosen = ["model.precision=float32", "model.device=cpu", *overrides]
    return open_session(adapter, overrides=chosen, base_model=str(base), reporter=Reporter())


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits
    return found


def is_kept(run: loralab.Run, adapter: Path, base: Path) -> None:
    """Check that plain PEFT, told to resize, gives the logits of an adapter as we open it, alone and with its run."""
    alone, whole = open_alone(adapter, base), open_session(run.path, overrides=[], base_model=None, reporter=Reporter())
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    new = tokenizer.convert_tokens_to_ids(TOKENS[:2])
    ids = [3, *new, 9, *tokenizer.encode(" cat<tool_call>"), 4]
    assert ids.count(new[0]) == 2
    own = logits(alone.model, ids)
    assert torch.equal(own, logits(whole.model, ids))
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = plain.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = PeftModel.from_pretrained(plain, str(adapter)).eval()
    # Not to the bit: GPT-2 computes its GELU in several operations, and here in one.
    torch.testing.assert_close(logits(loaded, ids), own, rtol=1e-5, atol=1e-5)
    # Of the base, the new tokens are the mean of their pieces; all others are as on disk.
    pieces = tiny.build_tokenizer().encode(TOKENS[0])
    disk: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    embedding, head = disk.get_input_embeddings().weight, disk.get_output_embeddings().weight
    with alone.model.disable_adapter(), whole.model.disable_adapter():
        off = logits(alone.model, ids)
        assert torch.equal(off, logits(whole.model, ids))
        known = logits(alone.model, [3, 9, 4])
        assert torch.equal(alone.model.embedding(torch.tensor(new[0])), embedding[pieces].mean(0))
    size = len(tokenizer) - 2  # a head of other size rounds otherwise
    torch.testing.assert_close(known[..., :size], logits(disk, [3, 9, 4])[..., :size])
    states = logits_behind(disk, [3, 9, 4])
    torch.testing.assert_close(known[..., new[0]], states @ head[pieces].mean(0))


def logits_behind(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the hidden states that a head gets."""
    with torch.no_grad():
        found: torch.Tensor = model.base_model(input_ids=torch.tensor([list(ids)])).last_hidden_state
    return found


@pytest.mark.parametrize(("family", "spare"), BASES)
def test_a_run_with_new_tokens(family: tiny.Family, spare: int, tmp_path: Path) -> None:
    base, rows = save_base(tmp_path / "base", family, spare), save_rows(tmp_path)
    disk = weights_sha256(base)
    config = tiny.run_config(base, rows, tmp_path / "run", lora={"trainable_token_indices": TOKENS}, training=TRAINING)
    run = loralab.train(config)
    assert weights_sha256(base) == disk
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert losses[-1] < losses[0] / 2
    size = len(AutoTokenizer.from_pretrained(base))  # Qwen2's has a token more than was saved
    said = run.record["resolved"]
    assert said["new_tokens"]["value"] == f"'<tool_call>' = {size}, '<|sep|>' = {size + 1}"
    assert "figures of the base are those with these first rows" in said["new_tokens"]["reason"]
    assert said["trainable_tokens"]["value"].startswith(f"'<tool_call>' = {size}, '<|sep|>' = {size + 1}, ' cat' = ")
    # No matrix is saved whole, neither with the adapter nor with a checkpoint.
    limit = 64 * size
    for folder in (run.adapter(), run.path / "checkpoints" / "checkpoint-8"):
        assert (folder / "adapter_model.safetensors").stat().st_size < limit
    assert read_json(run.adapter() / CONTRACT_FILE)["tokenizer"]["tokens"] == size + 2
    is_kept(run, Path(shutil.copytree(run.adapter(), tmp_path / "alone")), base)
    check_answers(run)
    check_resume(run, config, tmp_path / "cut")


def check_answers(run: loralab.Run) -> None:
    """Check that the model learned to say the new tokens, and that evaluating again gives the run's figures."""
    (answer,) = run.generate("the dog sings", max_new_tokens=24)
    assert answer.startswith("<tool_call>")
    again = run.evaluate(data=str(run.path.parent / "rows.json"))
    assert again["eval_loss"] < again["base"]["eval_loss"] / 2


def check_resume(run: loralab.Run, config: dict[str, Any], path: Path) -> None:
    """Check that a killed run ends in the same bits, and that other tokens are refused."""
    cut = Path(shutil.copytree(run.path, path))
    for step in (16, 24):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(cut / "adapter")
    (cut / "run.json").write_text(json.dumps(run.record | {"status": "running"}))
    config = {**config, "output": {"dir": str(cut)}}
    others = {**config, "lora": {**config["lora"], "trainable_token_indices": ["<other>", "<|sep|>", " cat"]}}
    with pytest.raises(RunFolderError, match=r"lora.trainable_token_indices was \['<tool_call>', .*now \['<other>'"):
        loralab.train(others, resume=True)
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == run.record["adapter_sha256"]


# --- what is read of one finished run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, loralab.Run]:
    """A base, rows and a run of one epoch; read only."""
    folder = tmp_path_factory.mktemp("finished")
    base, rows = save_base(folder / "base"), save_rows(folder)
    return base, rows, loralab.train(configured(base, rows, folder / "run"))


def configured(base: Path, rows: Path, run: Path, *tokens: str, **sections: dict[str, Any]) -> dict[str, Any]:
    lora = {"trainable_token_indices": [*tokens] or TOKENS, **sections.pop("lora", {})}
    return tiny.run_config(base, rows, run, lora=lora, **sections)


def test_the_data_holds_each_as_one_token(finished: tuple[Path, Path, loralab.Run], tmp_path: Path) -> None:
    base, rows, run = finished
    config = load_run_config(configured(base, rows, tmp_path / "run")).config
    plain = prepare_data(config.data, tiny.build_tokenizer(), reporter=Reporter())
    tokenizer = tiny.build_tokenizer()
    added = new_tokens_of(settle_tokens(config.lora, tokenizer))
    data = prepare_data(config.data, tokenizer, reporter=Reporter())  # the cache folder is that of `plain`
    saved = sum(len(token.pieces) - 1 for token in added)
    assert plain.splits["train"].lengths().sum() - data.splits["train"].lengths().sum() == 16 * saved
    answer = data.splits["train"][0].branches[0].answer_ids.tolist()
    assert [number for number in answer if number in {token.id for token in added}] == [token.id for token in added]
    assert data.identity["tokenizer"] == run.record["data_identity"]["tokenizer"] != plain.identity["tokenizer"]


def test_plan_counts_what_the_run_has(finished: tuple[Path, Path, loralab.Run], tmp_path: Path) -> None:
    base, rows, run = finished
    planned = plan(load_run_config(configured(base, rows, tmp_path / "run")), probe=False, reporter=Reporter())
    model = run.record["model"]
    assert planned["parameters"]["total"] == model["parameters"]
    assert planned["parameters"]["trainable"] == model["trainable_parameters"]
    kinds = {kind["kind"]: kind["parameters"] for kind in planned["parameters"]["by_layer"]}
    assert (kinds["embed_tokens"], kinds["lm_head"]) == (3 * 32, 2 * 32)
    # Both matrices grew and are no pages of the base's file any more; they are float32.
    assert planned["parameters"]["grown_bytes"] == 2 * (len(tiny.build_tokenizer()) + 2) * 32 * 4
    assert planned["choices"]["new_tokens"] == run.record["resolved"]["new_tokens"]
    expected = (run.adapter() / "adapter_model.safetensors").stat().st_size
    assert planned["disk"]["adapter_bytes"] == pytest.approx(expected, rel=0.2)


def test_advice_of_a_plan_counts_new_tokens_too(
    finished: tuple[Path, Path, loralab.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows, _ = finished
    monkeypatch.setattr("loralab.workflows.plan.free_bytes", lambda device: 1 << 20)
    planned = plan(load_run_config(configured(base, rows, tmp_path / "run")), probe=False, reporter=Reporter())
    assert planned["advice"]


def test_a_replay_gives_the_same_bits(finished: tuple[Path, Path, loralab.Run], tmp_path: Path) -> None:
    result = replay(finished[2].path, output=tmp_path / "again", verify=True, reporter=Reporter())
    assert result["equal"], result


def test_inspect_finds_nothing_wrong(finished: tuple[Path, Path, loralab.Run]) -> None:
    base, _, run = finished
    result, tensors = inspect_adapter(run.path)
    attach(result, tensors, str(base))
    assert result["findings"] == []
    assert {"lm_head", "model.embed_tokens"} <= set(result["attached"]["layers"])


def test_the_program_of_the_model_card_runs(finished: tuple[Path, Path, loralab.Run]) -> None:
    base, _, run = finished
    facts = load_facts(run.folder)
    usage = describe_usage(facts, base=str(base), revision=None, run="run", adapter=str(run.adapter()))
    assert "    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)\n" in usage.program
    without = replace(facts, record={**facts.record, "resolved": {}})
    assert "resize" not in describe_usage(without, base="base", revision=None, run="run", adapter="adapter").program
    program = usage.program.replace("Your question", "the dog sings")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(program, "program", "exec"), {})
    assert said.getvalue().strip() == run.generate("the dog sings")[0].strip()


def test_a_token_that_stands_nowhere_is_told(finished: tuple[Path, Path, loralab.Run], tmp_path: Path) -> None:
    base, rows, _ = finished
    notes, tokenizer = Notes(), tiny.build_tokenizer()
    config = load_run_config(configured(base, rows, tmp_path / "run", "<tool_cal>", "<|sep|>")).config
    added = new_tokens_of(settle_tokens(config.lora, tokenizer))
    warn_of_absent_tokens(added, prepare_data(config.data, tokenizer, reporter=Reporter()), notes)
    assert notes.said == ["warning: the new token '<tool_cal>' stands nowhere in the data: nothing teaches it"]


def test_a_warm_start_takes_the_same_tokens_alone(finished: tuple[Path, Path, loralab.Run], tmp_path: Path) -> None:
    base, rows, source = finished
    # So small a rate that nothing moves: what is saved is what came over.
    still = {"learning_rate": 1e-30, "max_steps": 1}
    run = loralab.train(configured(base, rows, tmp_path / "run", training=still), warm_start=source.path)
    assert run.record["adapter_sha256"] == source.record["adapter_sha256"]
    others = configured(base, rows, tmp_path / "other", "<other>", "<|sep|>", " cat", training=still)
    with pytest.raises(ModelError) as caught:
        loralab.train(others, warm_start=source.path)
    number = len(tiny.build_tokenizer())
    assert f"token {number} is '<tool_call>' there, '<other>' here" in caught.value.problems[0].what


def test_an_adapter_without_its_tokenizer_is_refused(finished: tuple[Path, Path, loralab.Run], tmp_path: Path) -> None:
    """As a checkpoint is: nothing there says which tokens they are."""
    base, _, run = finished
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run.adapter() / name, bare)
    with pytest.raises(ModelError) as caught:
        open_alone(bare, base)
    size = len(tiny.build_tokenizer())
    (problem,) = caught.value.problems
    assert problem.what == f"the adapter trained token {size}, which the base's tokenizer does not have"
    assert "holds the tokenizer with the new tokens" in problem.fix
    with pytest.raises(ModelError) as caught:
        load_adapter(AutoModelForCausalLM.from_pretrained(base), bare)
    assert caught.value.problems[0].what == f"the adapter has a row for token {size}, and the base has {size}"


# --- other bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantization": "nf4"}, "lora": {"modules_to_save": ["norm"]}},
        {"model": {"precision": "bfloat16"}, "lora": {"modules_to_save": ["lm_head"], "variant": "pissa"}},
    ],
    ids=str,
)
def test_bases_and_adapters_of_other_kinds(
    finished: tuple[Path, Path, loralab.Run], tmp_path: Path, sections: dict[str, Any]
) -> None:
    base, rows, _ = finished
    run = loralab.train(configured(base, rows, tmp_path / "run", **sections))
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert losses[-1] < losses[0]
    chosen = [f"model.{key}={value}" for key, value in sections.get("model", {}).items()]
    alone = open_alone(run.adapter(), base, *chosen)
    whole = open_session(run.path, overrides=[], base_model=None, reporter=Reporter())
    number = len(tiny.build_tokenizer())
    ids = [3, number, 9, number + 1, 4]
    assert torch.equal(logits(alone.model, ids), logits(whole.model, ids))
    with alone.model.disable_adapter(), whole.model.disable_adapter():
        assert torch.equal(logits(alone.model, ids), logits(whole.model, ids))
