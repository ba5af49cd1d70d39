"""The forgetting probe: passages from files, their tokens, and words that claim no more than the interval holds."""

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError
from loralab.evaluation.distances import DISTANCES
from loralab.evaluation.forgetting import (
    Probe,
    load_probe,
    measure_forgetting,
    paragraphs,
    probe_branches,
    read_forgetting,
)
from loralab.evaluation.probe_texts import PROBE_TEXTS
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.progress import Reporter
from support import tiny
from support.layouts import draw_adapter

_NOTHING = "no difference seen at n = 30"


def test_the_built_in_texts_are_many_different_short_passages() -> None:
    probe = load_probe(None)
    assert probe.texts == PROBE_TEXTS
    assert "version" in probe.name
    assert len(set(PROBE_TEXTS)) == len(PROBE_TEXTS) >= 28
    assert all(30 < len(text) < 400 for text in PROBE_TEXTS)


def test_paragraphs() -> None:
    assert paragraphs("a\nb\n\n \t\n\nc\n") == ["a\nb", "c"]
    assert paragraphs("\n \n") == []


@pytest.mark.parametrize("name", ["probe.txt", "probe.md", "probe.txt.gz"])
def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path, name: str) -> None:
    content = b"first line\r\nsecond\r\n\r\nanother\n\n\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert load_probe(str(tmp_path / name)).texts == ("first line\nsecond", "another")


def test_rows_are_passages(tmp_path: Path) -> None:
    file = tmp_path / "probe.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a\n\nb", " ", "c")), encoding="utf-8")
    assert load_probe(str(file)).texts == ("a\n\nb", "c")


@pytest.mark.parametrize("name", ["empty.txt", "blank.txt", "empty.jsonl", "blank.jsonl", "other.jsonl", "gone.txt"])
def test_a_probe_without_text_is_an_error(tmp_path: Path, name: str) -> None:
    content = {"blank.txt": " \n\n\t\n", "blank.jsonl": '{"text": " "}\n', "other.jsonl": '{"words": "a"}\n'}
    if name != "gone.txt":
        (tmp_path / name).write_text(content.get(name, ""), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_probe(str(tmp_path / name))
    (problem,) = caught.value.problems
    assert name in str(problem)
    if name == "other.jsonl":
        assert "missing field 'text'; the row has: words" in problem.what


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return Prompter(tokenizer)


def test_every_token_but_the_first_is_predicted_once(prompter: Prompter) -> None:
    text = "the cat sleeps and the dog sings in the house of the bird"
    (ids,) = prompter.encode([text])
    for length in (2, 5, 1000):
        (branches,) = probe_branches(Probe("x", (text, "a")), prompter, max_length=length)
        assert all(len(branch.prompt_ids) == 1 for branch in branches)
        assert max(len(branch.answer_ids) for branch in branches) <= length - 1
        assert np.concatenate([branch.answer_ids for branch in branches]).tolist() == ids[1:]
    assert prompter.stop.ids[0] not in ids


def test_passages_of_one_token_cannot_be_measured(prompter: Prompter) -> None:
    with pytest.raises(DataError, match="no passage of 'x' has two tokens"):
        probe_branches(Probe("x", ("a",)), prompter, max_length=8)


def measure(prompter: Prompter, *, trained: bool, probe: Probe | None = None, max_length: int = 256) -> dict[str, Any]:
    vocabulary = len(prompter.tokenizer)
    model = build_adapter(tiny.build_model("llama", vocabulary=vocabulary), LoraConfig(r=4), seed=0)[0]
    if trained:
        unlearn(model, prompter)
    found = measure_forgetting(
        model,
        probe or load_probe(None),
        prompter=prompter,
        planner=Planner(4096, layout="padded"),
        max_length=max_length,
        batch_size=8,
        resamples=200,
        device=torch.device("cpu"),
        reporter=Reporter(),
    )
    if trained and probe is None:
        check_by_hand(found, model, prompter)
    return found


def unlearn(model: Any, prompter: Prompter) -> None:
    """Train the adapter to predict the passages badly."""
    draw_adapter(model, seed=1)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    passages = probe_branches(load_probe(None), prompter, max_length=256)
    for branch in itertools.chain(*passages[:12]):
        ids = torch.tensor([[*branch.prompt_ids.tolist(), *branch.answer_ids.tolist()]])
        optimizer.zero_grad()
        (-model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()


def check_by_hand(found: dict[str, Any], model: Any, prompter: Prompter) -> None:
    """Hold perplexities against transformers' own loss, passage by passage."""
    nats, tokens = {"base": 0.0, "adapter": 0.0}, 0
    for branch in itertools.chain(*probe_branches(load_probe(None), prompter, max_length=256)):
        ids = torch.tensor([[*branch.prompt_ids.tolist(), *branch.answer_ids.tolist()]])
        tokens += ids.shape[1] - 1
        with torch.no_grad():
            nats["adapter"] += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            with model.disable_adapter():
                nats["base"] += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert found["tokens"] == tokens
    for side, total in nats.items():
        assert found[f"{side}_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    change = math.exp((nats["adapter"] - nats["base"]) / tokens) - 1
    assert found["perplexity_change"]["value"] == pytest.approx(change, rel=1e-3)


def test_an_untrained_adapter_has_forgotten_nothing(prompter: Prompter) -> None:
    found = measure(prompter, trained=False)
    assert found["rows"] == len(PROBE_TEXTS)  # though a byte-level tokenizer makes some too long for one window
    assert found["base_perplexity"] == found["adapter_perplexity"]
    assert found["difference"]["low"] == found["difference"]["high"] == 0.0
    assert found["kl_base_adapter"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["top1_agreement"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["reading"].startswith(f"no forgetting seen at n = {found['rows']}")


def test_a_disturbed_model_is_seen(prompter: Prompter) -> None:
    found = measure(prompter, trained=True)
    assert found["perplexity_change"]["low"] > 0
    assert found["reading"].startswith("perplexity on unrelated text rose by")
    assert found["difference"]["verdict"] == "worse"
    assert set(DISTANCES) < set(found)


def test_windows_of_two_passages_are_two_passages(prompter: Prompter) -> None:
    probe = Probe("two", tuple("".join(PROBE_TEXTS[start::2]) for start in (0, 1)))
    found = measure(prompter, trained=True, probe=probe, max_length=64)
    whole = measure(prompter, trained=True, probe=probe, max_length=100_000)
    assert (found["rows"], whole["rows"]) == (2, 2)
    assert found["tokens"] == whole["tokens"] > 20 * 64
    assert found["difference"]["low"] > 0
    assert found["reading"].startswith("no forgetting seen at n = 2: perplexity on unrelated text changed by +")
    assert found["reading"].endswith("; the interval leaves out 0, but the swap test has p = 0.5 (2 rows differ))")


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict", "reading"),
    [
        (
            math.log(1.12),
            math.log(1.08),
            math.log(1.15),
            "worse",
            "perplexity on unrelated text rose by 12 % (95% interval +8.0 % to +15 %, n = 30)",
        ),
        (
            math.log(0.9),
            math.log(0.8),
            math.log(0.95),
            "better",
            "perplexity on unrelated text fell by 10 % (95% interval -20 % to -5.0 %, n = 30)",
        ),
        (
            0.001,
            -0.01,
            0.012,
            _NOTHING,
            "no forgetting seen at n = 30: perplexity on unrelated text changed by +0.10 % "
            "(95% interval -1.0 % to +1.2 %)",
        ),
        (
            0.0,
            0.0,
            0.0,
            _NOTHING,
            "no forgetting seen at n = 30: perplexity on unrelated text changed by +0.00 % (95% interval ",
        ),
        (
            0.02,
            0.01,
            0.03,
            _NOTHING,
            "no forgetting seen at n = 30: perplexity on unrelated text changed by +2.0 % (95% interval +1.0 % to "
            "+3.0 %; the tests do not agree)",
        ),
    ],
)
def test_what_a_probe_says(value: float, low: float, high: float, verdict: str, reading: str) -> None:
    bounds = {"eval_loss": value, "low": low, "high": high, "level": 0.95}
    difference = bounds | {"verdict": verdict, "reason": "the tests do not agree"}
    assert read_forgetting(difference, rows=30).startswith(reading)


def test_one_passage_says_little_and_a_broken_model_is_no_exception() -> None:
    one = {"eval_loss": 0.5, "low": None, "high": None, "level": 0.95}
    assert read_forgetting(one, rows=1) == (
        "perplexity on unrelated text changed by +65 %; 1 passage is too few to say more"
    )
    huge = {"eval_loss": 900.0, "low": 800.0, "high": 1000.0, "level": 0.95, "verdict": "worse"}
    infinite = one | {"eval_loss": math.inf, "reason": "there is no interval"}
    assert read_forgetting(infinite, rows=30).endswith("changed by more than a number can say; there is no interval")
    assert "more than a number can say" in read_forgetting(huge, rows=30)
