"""The commands as a user runs them: what they write, what they print, and when they must not be slow or noisy."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab
from loralab import cli
from loralab.cli import training
from loralab.config.load import describe_field, schema_keys
from loralab.config.schema import Config
from loralab.console import ConsoleReporter
from loralab.export.gguf_file import FILE_TYPES
from loralab.progress import Reporter
from loralab.training.checkpoint import list_checkpoints, read_checkpoint
from loralab.workflows import first_look
from loralab.workflows.configure import load_run_config
from loralab.workflows.export import EXPORTS
from loralab.workflows.session import open_session
from support import tiny
from support.command import Answer, read_problems, run_here, run_watched, snapshot, start, write_config

COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)
ROWS, VALIDATION_ROWS = 20, 6
FIGURES = [
    "eval_loss",
    "perplexity",
    "eval_loss_batch_mean",
    "num_batches",
    "num_examples",
    "supervised_tokens",
    "token_entropy",
    "token_accuracy",
]
SETTINGS = ["split", "batch_size", "max_length"]
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class World:
    """A tiny base and a finished run of it; read only."""

    folder: Path
    base: Path
    rows: Path
    config: Path
    run: Path
    trained: Answer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(ROWS))
    values = tiny.run_config(
        base,
        rows,
        folder / "run",
        data={"validation": VALIDATION_ROWS},
        training={"save_strategy": "epoch", "num_train_epochs": 2},
        evaluation={"num_samples": 2, "max_new_tokens": 6, "batch_size": 4},
    )
    config = write_config(folder / "config.yaml", values)
    return World(folder, base, rows, config, folder / "run", run_here("train", config))


# --- quick answers -----------------------------------------------------------------------------------------------


def test_command_list() -> None:
    names = {"demo", "recipes", "init", "schema", "prepare", "train", "replay", "eval", "report", "generate", "chat"}
    assert names <= set(COMMANDS)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["loralab", *COMMANDS])
def test_help_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    answer = run_watched(*command, "--help", folder=tmp_path)
    assert (answer.code, answer.err, answer.imported) == (0, "", [])
    assert " ".join(["Usage: loralab", *command]) in answer.out
    assert all(name in answer.out for name in ([] if command else COMMANDS))


def test_version(tmp_path: Path) -> None:
    answer = run_watched("--version", folder=tmp_path)
    assert (answer.code, answer.out, answer.err, answer.imported) == (0, f"loralab {loralab.__version__}\n", "", [])


def test_options_take_help_from_the_schema(tmp_path: Path) -> None:
    text = run_watched("eval", "--help", folder=tmp_path).out
    for key in ("evaluation.batch_size", "data.max_length", "evaluation.split", "model.device"):
        (line,) = [line for line in text.splitlines() if describe_field(key) in line]
        assert f"--{key.rpartition('.')[2].replace('_', '-')} " in line


def test_config_error_imports_nothing_heavy(tmp_path: Path) -> None:
    answer = run_watched("train", "run.yaml", folder=tmp_path)
    assert answer.imported == []
    (problem,) = read_problems(answer)
    assert problem.what == "no such file: 'run.yaml'"
    (tmp_path / "run.yaml").write_text("model: {name: gpt2}\ndata: {train: x.json, template: alpcaa}\n")
    answer = run_watched("train", "run.yaml", "lora.rr=1", folder=tmp_path)
    assert answer.imported == []
    assert "'lora.rr'" in read_problems(answer)[0].what
    answer = run_watched("train", "run.yaml", folder=tmp_path)
    assert answer.imported == []
    assert "'alpcaa'" in read_problems(answer)[0].what
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((f"{each} nowhere", "no such folder: 'nowhere'") for each in ("chat", "eval", "push", "generate -p a")),
        ("eval --adapter there --adapter nowhere --data x", "no such folder: 'nowhere'"),
        ("merge nowhere --output out", "no such folder: 'nowhere'"),
        ("merge there --output out --dtype float8", "no such dtype: 'float8'"),
        ("merge there --output out --onto dequantised", "no such choice: 'dequantised'"),
        ("merge there --output full", "already there: 'full'"),
        ("export nowhere --to gguf", "no such folder: 'nowhere'"),
        ("export there --to gguff", "no such program: 'gguff'"),
        ("export there --to gguf --dtype q4", "no such type of GGUF weights: 'q4'"),
        ("export there --to gguf --output full", "already there: 'full'"),
        *(
            (f"{each} merged", "a whole model that `loralab merge` wrote")
            for each in ("chat", "eval", "generate -p a", "merge --output out", "report", "inspect")
        ),
    ],
)
def test_a_typo_imports_nothing_heavy(command: str, words: str, tmp_path: Path) -> None:
    for name, file in (("there", "adapter_config.json"), ("full", "mine"), ("merged", "merge.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "merged" / "config.json").write_text("{}")
    answer = run_watched(*command.split(), folder=tmp_path)
    assert words in read_problems(answer)[0].what
    assert answer.imported == []


def test_the_words_of_a_first_look_are_those_that_act() -> None:
    assert tuple(EXPORTS) == first_look.PROGRAMS
    assert set(FILE_TYPES) == set(first_look.GGUF_DTYPES)


def test_watching_sees_torch(world: World) -> None:
    """The control of the tests above: a command that needs torch is seen to import it."""
    answer = run_watched("generate", world.base, "--prompt", "red", folder=world.folder)
    assert answer.code == 2
    assert {"torch", "transformers", "peft"} <= set(answer.imported or [])


def test_recipes_init_and_schema(tmp_path: Path) -> None:
    listed = run_watched("recipes", "--json", folder=tmp_path)
    assert (listed.code, listed.imported) == (0, [])
    names = json.loads(listed.out)
    shipped = {path.stem for path in (Path(loralab.__file__).parent / "recipes").glob("*.yaml")}
    assert set(names) == shipped
    assert all(names.values())
    table = run_watched("recipes", folder=tmp_path)
    assert all(name in table.out for name in names)

    written = run_watched("init", "gpt2-alpaca", folder=tmp_path)
    assert (written.code, written.imported) == (0, [])
    assert "wrote gpt2-alpaca.yaml" in written.out
    config = load_run_config(tmp_path / "gpt2-alpaca.yaml").config
    assert (config.model.name, config.data.template) == ("gpt2", "alpaca")
    assert run_watched("init", "gpt2-alpaca", "--output", "mine.yaml", folder=tmp_path).code == 0
    before = snapshot(tmp_path)
    assert sorted(before or {}) == ["gpt2-alpaca.yaml", "mine.yaml"]

    for options in ([], ["--output", "mine.yaml"]):
        (problem,) = read_problems(run_watched("init", "gpt2-alpaca", *options, folder=tmp_path))
        assert problem.what == f"file exists: '{options[-1] if options else 'gpt2-alpaca.yaml'}'"
    assert snapshot(tmp_path) == before


def test_schema_describes_every_key(tmp_path: Path) -> None:
    answer = run_watched("schema", folder=tmp_path)
    assert (answer.code, answer.err, answer.imported) == (0, "", [])
    schema = json.loads(answer.out)
    assert set(schema["properties"]) == set(Config.model_fields)
    for key in schema_keys():
        node = schema
        for part in key.split("."):
            node = node["properties"][part]
            reference = node.get("$ref") or next((each["$ref"] for each in node.get("anyOf", ()) if "$ref" in each), "")
            node = schema["$defs"][reference.rpartition("/")[2]] if reference else node
        assert node["description"], key


def test_the_page_of_all_settings_is_the_one_in_docs(tmp_path: Path) -> None:
    answer = run_watched("schema", "--markdown", folder=tmp_path)
    assert (answer.code, answer.err, answer.imported) == (0, "", [])
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == answer.out, "loralab schema --markdown > docs/settings.md"
    for key in schema_keys():
        assert f"\n| `{key}` | " in answer.out


# --- train -------------------------------------------------------------------------------------------------------


def test_train_writes_the_run_folder(world: World) -> None:
    assert world.trained.code == 0, world.trained.err
    assert world.trained.out == f"{world.run}\n"
    files = {name for name, content in (snapshot(world.run) or {}).items() if content is not None}
    top = {name for name in files if "/" not in name}
    assert top == {
        "config.yaml",
        "run.json",
        "data.json",
        "metrics.jsonl",
        "evaluation.json",
        "samples.json",
        "report.html",
    }
    assert {name.partition("/")[0] for name in files - top} == {"adapter", "checkpoints", "plots"}
    assert {name for name in files if name.startswith("adapter/")} == {
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_facts.json",
        "adapter/adapter_model.safetensors",
        "adapter/chat_template.jinja",
        "adapter/generation_config.json",
        "adapter/prompt_contract.json",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
    }
    contract = json.loads((world.run / "adapter" / "prompt_contract.json").read_text(encoding="utf-8"))
    generation = json.loads((world.run / "adapter" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == contract["stop_token_ids"]
    assert {name for name in files if name.startswith("plots/")} == {
        "plots/loss.png",
        "plots/learning_rate.png",
        "plots/gradient_norm.png",
    }
    assert all((world.run / name).read_bytes().startswith(b"\x89PNG") for name in files if name.endswith(".png"))
    found = [read_checkpoint(path) for path in list_checkpoints(world.run / "checkpoints")]
    assert [checkpoint and checkpoint.step for checkpoint in found] == [4, 8]
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {
        "checkpoint-4",
        "checkpoint-8",
    }


def test_train_records_the_run(world: World) -> None:
    lines = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all(
        set(line) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"} for line in steps
    )
    assert [(line["step"], "eval_loss" in line) for line in lines if line not in steps] == [(4, True), (8, True)]
    record = json.loads((world.run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "completed"
    assert record["steps"] == 8
    assert {"train_seconds", "tokens_per_second", "examples_per_second", "peak_memory_bytes"} <= set(record)
    assert {"origin", "versions", "seeds", "hardware", "data_fingerprint", "token_budget"} <= set(record)
    assert record["adapter_sha256"] == adapter_hash(world.run / "adapter")
    reloaded = load_run_config(world.run / "config.yaml").config
    assert reloaded.training.num_train_epochs == 2
    assert reloaded.data.train == str(world.rows)
    data = json.loads((world.run / "data.json").read_text(encoding="utf-8"))
    assert {name: split["rows_kept"] for name, split in data["splits"].items()} == {
        "train": ROWS - VALIDATION_ROWS,
        "validation": VALIDATION_ROWS,
    }


def adapter_hash(adapter: Path) -> str:
    """Return an adapter's hash, computed anew: name, dtype, shape and bytes of the tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_evaluation_has_the_named_keys(world: World) -> None:
    result = json.loads((world.run / "evaluation.json").read_text(encoding="utf-8"))
    assert set(result) == {*FIGURES, *SETTINGS, "base", "difference"}
    assert set(result["base"]) == {*FIGURES, *SETTINGS}
    assert set(result["difference"]) == {
        *("eval_loss", "low", "high", "level", "method", "verdict", "reason", "swap_p", "swap_method"),
    }
    for part in (result, result["base"]):
        assert [part[name] for name in SETTINGS] == ["validation", 4, 128]
        assert part["num_batches"] == 2
        assert part["num_examples"] == VALIDATION_ROWS
        assert part["perplexity"] == pytest.approx(math.exp(part["eval_loss"]))
    assert result["eval_loss"] < result["base"]["eval_loss"]
    difference = result["difference"]
    assert difference["eval_loss"] == pytest.approx(result["eval_loss"] - result["base"]["eval_loss"])
    assert difference["low"] <= difference["eval_loss"] <= difference["high"]


def load_plainly(base: Path, adapter: Path) -> peft.PeftModel:
    """Load base and adapter with transformers and PEFT alone."""
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_adapter_loads_with_plain_peft(world: World) -> None:
    ids = torch.arange(3, 43).reshape(2, 20)
    plain = load_plainly(world.base, world.run / "adapter")
    session = open_session(world.run, overrides=[], base_model=None, reporter=Reporter())
    with torch.no_grad():
        logits = plain(ids).logits
        torch.testing.assert_close(session.model(ids).logits, logits, rtol=0, atol=1e-6)
        with plain.disable_adapter():
            assert (plain(ids).logits - logits).abs().max() > 0.1


# --- eval --------------------------------------------------------------------------------------------------------


def flatten(result: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation with the values of its parts under dotted names."""
    flat = {}
    for name, value in result.items():
        flat.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


def check_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that two evaluations have the same keys and, to the last digits of float32, the same values."""
    found, wanted = flatten(result), flatten(expected)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), name


def read_json(answer: Answer) -> Any:
    """Return the one JSON document on stdout."""
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_eval_of_a_run_repeats_its_evaluation(world: World) -> None:
    stored = json.loads((world.run / "evaluation.json").read_text(encoding="utf-8"))
    result = read_json(run_here("eval", world.run, "--json"))
    check_same(result, stored)
    table = run_here("eval", world.run).out
    for value in (stored["eval_loss"], stored["base"]["eval_loss"], stored["perplexity"]):
        assert f"{value:.4f}" in table


def test_eval_on_another_split_keeps_the_evaluation(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    stored = (run / "evaluation.json").read_bytes()
    result = read_json(run_here("eval", run, "--split", "train", "--batch-size", 3, "--max-length", 96, "--json"))
    assert [result[name] for name in SETTINGS] == ["train", 3, 96]
    assert (result["num_examples"], result["num_batches"]) == (ROWS - VALIDATION_ROWS, 5)
    assert (run / "evaluation.json").read_bytes() == stored
    assert json.loads((run / "evaluation-train.json").read_text(encoding="utf-8")) == result


def test_eval_with_other_data_writes_nothing(world: World, tmp_path: Path) -> None:
    before = snapshot(world.run)
    file = tiny.write_rows(tmp_path / "other.json", tiny.alpaca_rows(5, seed=9))
    result = read_json(run_here("eval", world.run, "--data", file, "--json"))
    assert result["num_examples"] == 5
    assert snapshot(world.run) == before


def test_eval_says_how_many_rows_were_trained_on(world: World, tmp_path: Path) -> None:
    trained = run_here("eval", world.run, "--data", world.rows)
    count = ROWS - VALIDATION_ROWS
    assert f"warning: {count} of {ROWS} rows are among the rows that {world.run} was trained on" in trained.err
    file = tiny.write_rows(tmp_path / "other.json", tiny.alpaca_rows(5, seed=9))
    assert "trained on" not in run_here("eval", world.run, "--data", file).err
    gone = run_here("eval", world.run, "--data", file, "data.max_length=100")
    assert gone.code == 0, gone.err
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    data = json.loads((run / "data.json").read_text())
    for source in data["sources"]:
        source["sha256"] = "0" * 64
    (run / "data.json").write_text(json.dumps(data))
    answer = run_here("eval", run, "--data", file)
    assert answer.code == 0, answer.err
    assert "not known: whether" in answer.err


@dataclass(frozen=True)
class Exported:
    """An adapter that plain PEFT made, and the same rows as a file and as a tokenized data set."""

    adapter: Path
    file: Path
    saved: Path
    rows: list[tuple[list[int], list[int]]]  # prompt ids and answer ids of the validation rows


def alpaca_prompt(row: dict[str, str]) -> str:
    return (WITH_INPUT if row["input"] else NO_INPUT).format(**row)


@pytest.fixture(scope="module")
def exported(world: World) -> Exported:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type=peft.TaskType.CAUSAL_LM
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world.base), config)
    model.save_pretrained(world.folder / "plain")
    parts = {"train": tiny.alpaca_rows(8, seed=5), "validation": tiny.alpaca_rows(12, seed=6)}
    ids = {
        name: [(tokenizer.encode(alpaca_prompt(row)), [*tokenizer.encode(row["output"]), 0]) for row in rows]
        for name, rows in parts.items()
    }
    saved = {
        name: datasets.Dataset.from_list([pad(*pair, left=index % 2 == 1) for index, pair in enumerate(pairs)])
        for name, pairs in ids.items()
    }
    datasets.DatasetDict(saved).save_to_disk(world.folder / "tokenized")
    rows = [{"prompt": alpaca_prompt(row), "completion": row["output"]} for row in parts["validation"]]
    file = tiny.write_rows(world.folder / "validation.json", rows)
    return Exported(world.folder / "plain", file, world.folder / "tokenized", ids["validation"])


def pad(prompt: list[int], answer: list[int], *, left: bool, length: int = 128) -> dict[str, list[int]]:
    """Return a row as older scripts save it: padded with the end token, which the attention mask hides."""
    padding = [0] * (length - len(prompt) - len(answer))
    before, behind = (padding, []) if left else ([], padding)
    return {
        "input_ids": [*before, *prompt, *answer, *behind],
        "attention_mask": [*before, *[1] * (len(prompt) + len(answer)), *behind],
        "labels": [-100] * (len(before) + len(prompt)) + answer + [-100] * len(behind),
    }


def sum_losses(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """Return the nats of each row's answer, one row at a time, by the model's own logits."""
    totals = []
    with torch.no_grad():
        for prompt, answer in rows:
            logs = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            totals.append(-float(logs[range(len(answer)), answer].sum()))
    return totals


def without_split(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "split": "", "base": {**result["base"], "split": ""}}


def test_eval_of_a_plain_adapter_on_file_and_tokenized_folder(world: World, exported: Exported) -> None:
    options = ["--split", "validation", "--batch-size", 8, "--max-length", 128, "--device", "cpu", "--json"]
    target = ["--adapter", exported.adapter, "--model", world.base]
    before = snapshot(exported.adapter)
    of_file = read_json(run_here("eval", *target, "--data", exported.file, *options))
    of_folder = read_json(run_here("eval", *target, "--data", exported.saved, *options))
    assert [of_folder[name] for name in SETTINGS] == ["validation", 8, 128]
    # A file has no splits: what was measured is not called by the name of one.
    assert of_file["split"] == of_file["base"]["split"] == f"all rows of {exported.file}"
    check_same(without_split(of_folder), without_split(of_file))
    assert (of_file["num_batches"], of_file["num_examples"]) == (2, 12)
    train = read_json(run_here("eval", *target, "--data", exported.saved, *options, "--split", "train"))
    assert train["num_examples"] == 8
    assert train["supervised_tokens"] != of_file["supervised_tokens"]
    assert snapshot(exported.adapter) == before


def test_eval_gives_the_losses_of_the_plain_model(world: World, exported: Exported) -> None:
    options = ["model.precision=float32", "--model", world.base, "--split", "validation", "--device", "cpu", "--json"]
    result = read_json(run_here("eval", exported.adapter, *options, "--data", exported.saved))
    plain = load_plainly(world.base, exported.adapter)
    counts = [len(answer) for _, answer in exported.rows]
    adapter = sum_losses(plain, exported.rows)
    with plain.disable_adapter():
        base = sum_losses(plain, exported.rows)
    for part, totals in ((result, adapter), (result["base"], base)):
        assert part["supervised_tokens"] == sum(counts)
        assert part["eval_loss"] == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
        assert part["perplexity"] == pytest.approx(math.exp(sum(totals) / sum(counts)), rel=1e-4)
        means = [sum(totals[:8]) / sum(counts[:8]), sum(totals[8:]) / sum(counts[8:])]
        assert part["eval_loss_batch_mean"] == pytest.approx(sum(means) / 2, rel=1e-5)
    assert max(abs(a - b) for a, b in zip(adapter, base, strict=True)) > 1


# --- generate ----------------------------------------------------------------------------------------------------

PROMPTS = ["red cat sings", "two dogs in the house"]


def answer_plainly(world: World, prompt: str, *, base: bool, tokens: int) -> str:
    """Return the greedy answer of transformers and PEFT alone, up to the end token."""
    plain, tokenizer = load_plainly(world.base, world.run / "adapter"), AutoTokenizer.from_pretrained(world.base)
    ids = torch.tensor([tokenizer.encode(NO_INPUT.format(instruction=prompt))])
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if base:
        with plain.disable_adapter():
            out = plain.generate(input_ids=ids, **settings)
    else:
        out = plain.generate(input_ids=ids, **settings)
    return str(tokenizer.decode(out[0, ids.shape[1] :])).partition(tiny.END)[0]


def test_generate_answers_as_the_plain_model_does(world: World) -> None:
    options = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    result = read_json(run_here("generate", world.run, *options, "--base", "--json", "--max-new-tokens", 7))
    assert set(result) == {"answers"}
    assert [answer["prompt"] for answer in result["answers"]] == PROMPTS
    for answer in result["answers"]:
        assert answer["prompt_text"] == NO_INPUT.format(instruction=answer["prompt"])
        for side in ("adapter", "base"):
            assert set(answer[side]) == {"text", "stopped", "tokens"}
            assert answer[side]["text"] == answer_plainly(world, answer["prompt"], base=side == "base", tokens=7)
            assert answer[side]["tokens"] == 7 or answer[side]["stopped"]
        assert answer["adapter"]["text"] != answer["base"]["text"]


def test_generate_takes_prompts_from_everywhere(world: World, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"\n{PROMPTS[0]}\n\n{PROMPTS[1]}\n", encoding="utf-8")
    before = snapshot(world.run)
    wanted = {
        prompt: run_here("generate", world.run, "-p", prompt, "--max-new-tokens", 5).out.removesuffix("\n")
        for prompt in PROMPTS
    }
    assert all(wanted.values())
    assert len(set(wanted.values())) == 2
    both = run_here("generate", world.run, "--file", file, "--max-new-tokens", 5)
    assert both.out == "".join(f"=== {prompt}\n{text}\n\n" for prompt, text in wanted.items())
    piped = run_here("generate", world.run / "adapter", "--max-new-tokens", 5, stdin=f"{PROMPTS[1]}\n")
    assert piped.out == f"{wanted[PROMPTS[1]]}\n"
    labelled = run_here("generate", world.run, "-p", PROMPTS[0], "--base", "--max-new-tokens", 5)
    base = answer_plainly(world, PROMPTS[0], base=True, tokens=5)
    assert labelled.out == f"=== {PROMPTS[0]}\n--- base\n{base}\n--- adapter\n{wanted[PROMPTS[0]]}\n\n"
    system = run_here("generate", world.run, "-p", PROMPTS[0], "--system", "Be a cat.", "--json")
    text = read_json(system)["answers"][0]["prompt_text"]
    assert text.startswith("Be a cat.\n\n")
    assert text.endswith(f"### Instruction:\n{PROMPTS[0]}\n\n### Response:\n")
    assert snapshot(world.run) == before


def test_sampling_follows_its_seed(world: World) -> None:
    command = ["generate", world.run, "-p", PROMPTS[0], "--temperature", 2.0, "--max-new-tokens", 12, "--seed"]
    first, again, other = (run_here(*command, seed) for seed in (1, 1, 2))
    assert first.code == 0
    assert first.out == again.out != other.out


# --- report and --json -------------------------------------------------------------------------------------------


def test_report_is_rebuilt_without_torch(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    before = snapshot(run)
    shutil.rmtree(run / "plots")
    (run / "report.html").unlink()
    (run / "adapter" / "README.md").unlink()
    answer = run_watched("report", run, folder=tmp_path)
    assert (answer.code, answer.imported) == (0, []), answer.err
    assert answer.out == f"{run}/report.html\n"
    page = run / "report.html"  # it names the folder that it was built in
    page.write_bytes(page.read_bytes().replace(str(run).encode(), str(world.run).encode()))
    assert snapshot(run) == before


def test_json_is_one_document(world: World, tmp_path: Path) -> None:
    record = read_json(run_here("train", world.config, f"output.dir={tmp_path}/run", "--json"))
    assert record == json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["adapter_sha256"] == json.loads((world.run / "run.json").read_text())["adapter_sha256"]


# --- signals -----------------------------------------------------------------------------------------------------

STEPS = 300


@pytest.fixture(scope="module")
def long_run(world: World) -> tuple[Path, Path]:
    """A configuration of many steps, with dropout, and its uninterrupted run."""
    values = tiny.run_config(
        world.base,
        world.rows,
        world.folder / "long",
        lora={"dropout": 0.1},
        training={"max_steps": STEPS, "per_device_train_batch_size": 3},
    )
    config = write_config(world.folder / "long.yaml", values)
    assert run_here("train", config).code == 0
    return config, world.folder / "long"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the complete lines of `metrics.jsonl`, without what depends on the clock."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    complete = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in complete]


def wait_for_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    """Wait until `count` steps are logged; the process must still be at work then."""
    while len(read_metrics(run)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signal_stops_after_a_checkpoint(
    number: signal.Signals, code: int, long_run: tuple[Path, Path], tmp_path: Path
) -> None:
    config, whole = long_run
    run = tmp_path / "run"
    process = start("train", config, f"output.dir={run}", folder=tmp_path)
    try:
        wait_for_steps(process, run, 17)  # within the third epoch of seven steps
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    (problem,) = read_problems(Answer(process.returncode, out, err), code=code)
    assert problem.what == f"stopped by {number.name}"
    assert problem.where == str(run)
    assert f"loralab train {run}/config.yaml --resume" in problem.fix
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    (path,) = list_checkpoints(run / "checkpoints")
    checkpoint = read_checkpoint(path)
    assert checkpoint is not None
    assert 17 <= checkpoint.step < STEPS
    assert [line["step"] for line in read_metrics(run)] == list(range(1, checkpoint.step + 1))
    assert not (run / "adapter").exists()

    answer = run_here("train", config, f"output.dir={run}", "--resume")

    assert answer.code == 0, answer.err
    assert f"resuming from step {checkpoint.step}\n" in answer.err
    assert read_metrics(run) == read_metrics(whole)
    assert len(read_metrics(run)) == STEPS
    records = [json.loads((each / "run.json").read_text(encoding="utf-8")) for each in (run, whole)]
    assert records[0]["adapter_sha256"] == records[1]["adapter_sha256"] == adapter_hash(run / "adapter")


class StopsEarly(ConsoleReporter):
    """Sends SIGINT to its own process while the model is being prepared."""

    def say(self, text: str) -> None:
        super().say(text)
        if text.startswith("target_modules"):
            signal.raise_signal(signal.SIGINT)


def test_signal_before_training_leaves_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ConsoleReporter", StopsEarly)
    answer = run_here("train", world.config, f"output.dir={tmp_path}/run")
    assert answer.code == 130
    assert snapshot(tmp_path) == {}


# --- the Python interface ----------------------------------------------------------------------------------------


def test_python_interface(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = tiny.run_config(world.base, world.rows, tmp_path / "run", data={"validation": VALIDATION_ROWS})
    run = loralab.train(values, training={"num_train_epochs": 2}, evaluation={"batch_size": 4})
    assert isinstance(run, loralab.Run)
    assert run.path == tmp_path / "run"
    assert [line["step"] for line in run.metrics if "loss" in line] == list(range(1, 9))
    assert run.metrics == [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert run.record["origin"]["training.num_train_epochs"] == "argument"
    cli_record = json.loads((world.run / "run.json").read_text(encoding="utf-8"))
    assert run.record["adapter_sha256"] == cli_record["adapter_sha256"] == adapter_hash(run.adapter())

    stored = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
    check_same(run.evaluate(), stored)
    other = tiny.write_rows(tmp_path / "other.json", tiny.alpaca_rows(5, seed=9))
    assert run.evaluate(data=str(other), overrides=["evaluation.batch_size=2"])["num_batches"] == 3

    answers = run.generate(PROMPTS, max_new_tokens=6)
    assert answers == [answer_plainly(world, prompt, base=False, tokens=6) for prompt in PROMPTS]
    assert run.generate(PROMPTS[0], max_new_tokens=6) == answers[:1]
    assert [line for line in capfd.readouterr().out.splitlines() if line.strip()] == []

    with pytest.raises(loralab.LoralabError, match="holds another run"):
        loralab.train(values)
    with pytest.raises(loralab.LoralabError, match=r"unknown key: 'training\.seeed'"):
        loralab.train(values, training={"seeed": 1}, overwrite=True)
    again = loralab.train(values, overwrite=True, **{"training.seed": 7})
    assert again.record["seeds"]["training"] == 7
    assert loralab.Run(run.path).record == again.record
