"""`compare` as a user runs it: what it measures, prints and writes, and what it refuses."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loralab.api import Run
from loralab.evaluation.distances import DISTANCES
from support import tiny
from support.command import read_problems, run_here, snapshot, write_config
from unit.reports.test_html import Page

VALIDATION_ROWS = 6
PLAIN = ("kl_divergence", "l2_distance", "top1_agreement")


@dataclass(frozen=True)
class World:
    """A tiny base and a finished run of it."""

    folder: Path
    base: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(20))
    evaluation = {"num_samples": 0, "max_new_tokens": 6, "batch_size": 4}
    data = {"validation": VALIDATION_ROWS}
    values = tiny.run_config(base, rows, folder / "run", data=data, evaluation=evaluation)
    assert run_here("train", write_config(folder / "config.yaml", values)).code == 0
    return World(folder, base, folder / "run")


@pytest.fixture(scope="module")
def compared(world: World) -> dict[str, Any]:
    answer = run_here("compare", world.run, "--json")
    assert answer.code == 0, answer.err
    return dict(json.loads(answer.out))


def test_file_page_and_json_say_the_same(world: World, compared: dict[str, Any]) -> None:
    assert json.loads((world.run / "comparison.json").read_text(encoding="utf-8")) == compared
    page = Page((world.run / "comparison.html").read_text(encoding="utf-8"))
    assert all(record["reference"].split()[0] in page.text for record in compared["prompts"])
    assert compared["split"] == "validation"
    assert compared["examples"] == compared["of_examples"] == len(compared["prompts"]) == VALIDATION_ROWS
    assert set(compared["definitions"]) == set(DISTANCES)


def test_what_is_said_of_each_prompt(compared: dict[str, Any]) -> None:
    for record in compared["prompts"]:
        assert record["prompt"].startswith("Below is an instruction")
        assert record["kl_divergence"] == record["last_prompt_token"]["kl_base_adapter"] > 0
        assert record["l2_distance"] == record["last_prompt_token"]["l2_logits"]
        assert record["top1_agreement"] in (0.0, 1.0)
        assert record["answer"]["tokens"] > 0
        place, sides = record["first_difference"], (record["base_output"], record["adapter_output"])
        if place is None:
            assert sides[0] == sides[1]
        else:
            assert sides[0][:place] == sides[1][:place]
            assert sides[0][place : place + 1] != sides[1][place : place + 1]


def test_totals_are_the_means_of_the_prompts(compared: dict[str, Any]) -> None:
    totals, records = compared["totals"], compared["prompts"]
    for name in PLAIN:
        assert totals[name] == pytest.approx(sum(record[name] for record in records) / len(records))
    assert totals["answer"]["count"] == sum(record["answer"]["tokens"] for record in records)
    for name in DISTANCES:
        nats = sum(record["answer"][name] * record["answer"]["tokens"] for record in records)
        figure = totals["answer"][name]
        assert figure["mean"] == pytest.approx(nats / totals["answer"]["count"])
        assert figure["low"] <= figure["mean"] <= figure["high"]
    same = [record["first_difference"] is None for record in records]
    assert compared["generation"]["same_answer"] == sum(same) / len(same)


def test_the_answers_losses_are_those_of_eval(world: World, compared: dict[str, Any]) -> None:
    evaluation = json.loads((world.run / "evaluation.json").read_text(encoding="utf-8"))
    tokens = sum(record["answer"]["tokens"] for record in compared["prompts"])
    for side, loss in (("adapter", evaluation["eval_loss"]), ("base", evaluation["base"]["eval_loss"])):
        nats = sum(record["answer"][f"{side}_loss"] * record["answer"]["tokens"] for record in compared["prompts"])
        assert nats / tokens == pytest.approx(loss, rel=1e-5)


def test_tables_fit_a_terminal_and_name_the_direction(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = run_here("compare", world.run, "--max-examples", 3, "--output", world.folder / "tables")
    assert answer.code == 0, answer.err
    tables = [line for line in answer.out.splitlines() if line[:1] in "│┃┏└"]
    assert tables
    assert max(map(len, tables)) <= 80
    assert "KL(base || adapter)" in answer.out
    assert "3 of 6 rows" in answer.out
    assert "probe (built-in texts, version 1):" in answer.out


def test_other_settings_do_not_replace_the_runs_own_comparison(world: World, compared: dict[str, Any]) -> None:
    before = snapshot(world.run)
    answer = run_here("compare", world.run, "--max-new-tokens", 3, "--no-probe", "--json")
    assert answer.code == 0, answer.err
    assert "no files were written" in answer.err
    assert snapshot(world.run) == before
    other = json.loads(answer.out)
    assert other["probe"] is None
    assert other["totals"] == compared["totals"]
    out = world.folder / "elsewhere" / "deep"
    rows = tiny.write_rows(world.folder / "other.json", tiny.alpaca_rows(3, seed=9))
    assert run_here("compare", world.run, "--data", rows, "--output", out, "--no-probe").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json"]
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8"))["examples"] == 3
    assert snapshot(world.run) == before


def test_an_adapter_of_zeros_is_the_base(world: World) -> None:
    zeros = world.folder / "zeros"
    shutil.copytree(world.run / "adapter", zeros)
    weights = load_file(zeros / "adapter_model.safetensors")
    save_file({name: weight * 0 for name, weight in weights.items()}, zeros / "adapter_model.safetensors")
    rows = world.folder / "rows.json"
    answer = run_here("compare", zeros, "--data", rows, "--json", "--max-examples", 5)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    for part in ("last_prompt_token", "answer"):
        for name in DISTANCES:
            exact = 1.0 if name == "top1_agreement" else 0.0
            assert found["totals"][part][name] == {"mean": exact, "low": exact, "high": exact}
    assert found["generation"]["same_answer"] == 1.0
    assert found["probe"]["reading"].startswith("no forgetting seen at n = ")


def test_every_answer_of_a_conversation_is_a_prompt_of_its_row(world: World) -> None:
    turns = [("user", "red cat"), ("assistant", "one dog"), ("user", "blue"), ("assistant", "two birds sing")]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = tiny.write_rows(world.folder / "talks.json", [talk, {"messages": talk["messages"][:2]}])
    answer = run_here("compare", world.run, "--data", rows, "--json", "--no-probe")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert [(record["row"], record["reference"]) for record in found["prompts"]] == [
        (1, "one dog"), (1, "two birds sing"), (2, "one dog"),
    ]  # fmt: skip
    assert found["prompts"][0]["last_prompt_token"] == pytest.approx(found["prompts"][2]["last_prompt_token"], rel=1e-4)
    assert found["totals"]["rows"] == 2
    assert found["totals"]["last_prompt_token"]["count"] == 3


def test_text_is_compared_without_prompts(world: World) -> None:
    text = world.folder / "text.txt"
    text.write_text("the cat sleeps in the house and the dog sings " * 9, encoding="utf-8")
    rows = [
        json.dumps({"text": "the red bird sings in the tree"}),
        json.dumps({"text": "a dog runs of the river and one cat"}),
    ]
    data = world.folder / "text.jsonl"
    data.write_text("\n".join(rows), encoding="utf-8")
    answer = run_here("compare", world.run / "adapter", "--data", data, "--probe", text, "--json", "data.format=text")
    assert answer.code == 0, answer.err
    assert "have no prompt" in answer.err
    found = json.loads(answer.out)
    assert found["generation"] is None
    assert found["totals"]["last_prompt_token"] is None
    assert found["totals"]["kl_divergence"] == found["totals"]["answer"]["kl_base_adapter"]["mean"]
    assert [record["reference"] for record in found["prompts"]] == [json.loads(row)["text"] for row in rows]
    assert all(record["base_output"] is None for record in found["prompts"])
    assert found["probe"]["name"] == str(text)
    tables = run_here("compare", world.run / "adapter", "--data", data, "--no-probe", "data.format=text")
    assert tables.code == 0, tables.err
    assert "the red bird" in tables.out
    head = next(line for line in tables.out.splitlines() if "top-1" in line and "KL" in line)
    assert "text" in head
    assert "adapter" not in head  # nothing was answered


def test_windows_of_a_text_are_numbered(world: World) -> None:
    text = world.folder / "long.txt"
    text.write_text("the cat sleeps in the house and the dog sings " * 12, encoding="utf-8")
    options = ("--data", text, "--max-examples", 2, "--no-probe", "--max-length", 16, "data.format=text")
    answer = run_here("compare", world.run / "adapter", *options, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    windows = [record["window"] for record in found["prompts"]]
    assert windows == [(2 * place + 1) * found["of_examples"] // 4 + 1 for place in range(2)]
    tables = run_here("compare", world.run / "adapter", *options).out
    assert all(f"1.{window} " in tables for window in windows)


def test_python_gives_the_same(world: World, compared: dict[str, Any]) -> None:
    found = Run(world.run).compare(
        max_examples=VALIDATION_ROWS, with_probe=False, overrides=["evaluation.batch_size=3"]
    )
    assert found["totals"]["kl_divergence"] == pytest.approx(compared["totals"]["kl_divergence"], rel=1e-5)
    assert [record["row"] for record in found["prompts"]] == [record["row"] for record in compared["prompts"]]
    assert not any(math.isnan(record[name]) for record in found["prompts"] for name in PLAIN)


def test_mistakes_have_three_lines_and_touch_nothing(world: World, compared: dict[str, Any]) -> None:
    assert compared
    (world.folder / "empty.txt").write_text("", encoding="utf-8")
    (world.folder / "blank.txt").write_text(" \n\n \n", encoding="utf-8")
    (world.folder / "a_file").write_text("", encoding="utf-8")
    before = snapshot(world.run)
    for arguments, what in (
        (["--probe", world.folder / "empty.txt"], "no rows in"),
        (["--probe", world.folder / "blank.txt"], "no rows in"),
        (["--probe", world.folder / "gone.txt"], "no such file"),
        (["--max-examples", 0], "max_examples 0"),
        (["--no-probe", "--probe", world.folder / "a_file"], "no probe"),
        (["--output", world.folder / "a_file"], "cannot write the comparison"),
        (["training.learning_rate=1"], "training.learning_rate has no effect"),
        (["--split", "test"], "no such split: 'test'"),
    ):
        (problem,) = read_problems(run_here("compare", world.run, *arguments))
        assert what in problem.what, arguments
    assert snapshot(world.run) == before


def test_an_adapter_of_another_base_is_refused(world: World) -> None:
    other = world.folder / "other-base"
    tiny.build_model("gpt2", vocabulary=600).save_pretrained(other)
    tiny.build_tokenizer().save_pretrained(other)
    problems = read_problems(run_here("compare", world.run, "--model", other))
    assert "adapter" in str(problems)
