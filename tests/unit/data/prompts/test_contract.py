"""The prompt contract: what it holds, and that any change of what is sent breaks it with a readable difference."""

import json
from typing import Any

import pytest

from loralab.data.prompts.contract import build_contract, check_contract, load_contracted
from loralab.data.prompts.prompter import Prompter
from loralab.data.prompts.templates import TEMPLATES
from loralab.errors import PromptContractError
from unit.data.prompters import CHATML, TRIMMING, build_prompter, build_tokenizer

ALL_TEMPLATES = {
    "alpaca": TEMPLATES["alpaca"],
    "none": TEMPLATES["none"],
    "chatml": CHATML,
    "trimming": TRIMMING,
    "bos": "{{ bos_token }}" + CHATML,
}


@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_contract_holds_for_the_same_tokenizer_after_json(name: str) -> None:
    contract = json.loads(json.dumps(build_contract(Prompter(build_tokenizer(ALL_TEMPLATES[name], bos=True)))))
    check_contract(Prompter(build_tokenizer(ALL_TEMPLATES[name], bos=True)), contract, where="w")
    assert len(contract["golden"]) == 3


def _golden(contract: dict[str, Any]) -> None:
    contract["golden"][2]["ids"][-1] += 1


def _template(contract: dict[str, Any]) -> None:
    contract["template"] += " "


def _stops(contract: dict[str, Any]) -> None:
    contract["stop_token_ids"] = contract["stop_token_ids"][::-1]


def _no_stops(contract: dict[str, Any]) -> None:
    del contract["stop_token_ids"]


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_golden, "Grüße"),
        (_template, "template differs"),
        (_stops, "stop tokens' ids differ"),
        (_no_stops, "trained with None"),
    ],
)
def test_broken_contract_is_refused(damage: Any, part: str) -> None:
    prompter = build_prompter(CHATML)
    contract = build_contract(prompter)
    damage(contract)
    with pytest.raises(PromptContractError, match=part) as caught:
        check_contract(prompter, contract, where="adapter/prompt_contract.json")
    assert caught.value.problems[0].what.startswith("prompt contract broken: ")
    assert caught.value.problems[0].where == "adapter/prompt_contract.json"


def test_tokenizer_with_other_merges_breaks_the_contract() -> None:
    contract = build_contract(build_prompter())
    other = build_tokenizer(TEMPLATES["alpaca"])
    other.add_tokens(["capital"])
    with pytest.raises(PromptContractError, match="gives other token ids"):
        check_contract(Prompter(other), contract, where="w")


def _saved(system: str | None = None) -> dict[str, Any]:
    contract = build_contract(Prompter(build_tokenizer(CHATML), system_prompt=system))
    return dict(json.loads(json.dumps(contract)))


def test_contract_has_everything_that_decides_on_a_prompt() -> None:
    contract = _saved("Be brief.")
    assert contract["system_prompt"] == "Be brief."
    assert contract["special_tokens"]["eos_token"] == "<|end|>"
    assert set(contract["versions"]) == {"loralab", "transformers", "tokenizers", "jinja2"}
    plain = _saved()
    assert all(len(a["ids"]) > len(b["ids"]) for a, b in zip(contract["golden"], plain["golden"], strict=True))


def test_loading_takes_up_the_system_prompt() -> None:
    assert load_contracted(build_tokenizer(CHATML), _saved("Be brief."), where="w").system_prompt == "Be brief."


def test_contract_of_the_first_version_still_holds() -> None:
    contract = _saved()
    del contract["system_prompt"], contract["versions"]
    contract |= {"version": 1, "special_tokens": "written by the template alone (add_special_tokens=False)"}
    assert load_contracted(build_tokenizer(CHATML), contract, where="w").system_prompt is None


def test_one_changed_character_is_shown_on_both_sides() -> None:
    changed = build_tokenizer(CHATML.replace("<|stop|>\n", "<|stop|>\t"))
    with pytest.raises(PromptContractError) as caught:
        load_contracted(changed, _saved(), where="w")
    what = caught.value.problems[0].what
    assert f"the template differs at character {CHATML.index('<|stop|>') + 9} (line 2" in what
    trained, now = what.partition("trained with ")[2].split(", now ")
    assert r"<|stop|>\n" in trained
    assert r"<|stop|>\t" in now
    assert caught.value.exit_code == 3


def test_damaged_template_is_compared_before_it_is_rendered() -> None:
    with pytest.raises(PromptContractError, match="the template differs"):
        load_contracted(build_tokenizer("{% for %}"), _saved(), where="w")


def test_changed_end_token_breaks_the_contract() -> None:
    tokenizer = build_tokenizer(CHATML)
    tokenizer.eos_token = "<|start|>"
    with pytest.raises(PromptContractError, match="the tokenizer's eos_token differs"):
        load_contracted(tokenizer, _saved(), where="w")


def test_golden_difference_shows_ids_and_text_from_the_first_one() -> None:
    contract = _saved()
    contract["golden"][0]["ids"][3] += 1
    with pytest.raises(PromptContractError, match="gives other token ids, from token 4"):
        load_contracted(build_tokenizer(CHATML), contract, where="w")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ({"golden": [None]}, "a golden prompt is damaged"),
        ({"golden": [{"prompt": 3}]}, "a golden prompt is damaged"),
        ({"golden": "text"}, "a golden prompt is damaged"),
        ({"golden": []}, "the contract has no golden"),
        ({"golden": [{"prompt": "a", "ids": "b"}]}, "gives other token ids"),
        ({"stop_tokens": "text"}, "no text and list"),
        ({"stop_tokens": ["<|unknown|>"]}, "the tokenizer has no '<|unknown|>'"),
        ({"stop_tokens": [["<|stop|>"]]}, "the tokenizer has no"),
        ({"template": 7}, "no text and list"),
        ({"system_prompt": 7}, "system_prompt is int"),
        ({"template_sha256": "0" * 64}, "not the one whose hash it holds"),
        ({"template": CHATML + "{# #}"}, "not the one whose hash it holds"),
        ({"special_tokens": "text"}, "special_tokens are damaged"),
        ({"special_tokens": {"eos_token": "<|end|>"}}, "special_tokens are damaged"),
        ({"version": None}, "version is 'None'"),
        ({"version": 0}, "version is '0'"),
    ],
)
def test_damaged_contract_is_refused(damage: dict[str, Any], part: str) -> None:
    with pytest.raises(PromptContractError, match=part):
        load_contracted(build_tokenizer(CHATML), _saved() | damage, where="w")


def test_token_that_no_golden_prompt_holds_breaks_the_contract() -> None:
    tokenizer = build_tokenizer(CHATML)
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(PromptContractError, match=r"vocabulary or rules differ: trained with .*, now ") as caught:
        load_contracted(tokenizer, _saved(), where="w")
    assert str(len(tokenizer)) in caught.value.problems[0].what
    # Other versions of the libraries may write the same tokenizer in other words.
    contract = _saved()
    load_contracted(tokenizer, contract | {"versions": contract["versions"] | {"tokenizers": "0.1"}}, where="w")
    load_contracted(tokenizer, {name: held for name, held in contract.items() if name != "tokenizer"}, where="w")


def test_padding_of_an_earlier_call_is_no_difference() -> None:
    prompter = build_prompter(CHATML)
    prompter.tokenizer.backend_tokenizer.enable_padding()
    prompter.tokenizer.backend_tokenizer.enable_truncation(2)
    assert build_contract(prompter) == _saved()


def test_contract_of_a_later_version_is_refused() -> None:
    with pytest.raises(PromptContractError, match=r"of version 3, and this loralab knows them up to 2") as caught:
        load_contracted(build_tokenizer(CHATML), {"version": 3, "what": "comes"}, where="w")
    assert "install" in caught.value.problems[0].fix


def test_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(PromptContractError, match="chat template is missing"):
        load_contracted(build_tokenizer(None), _saved(), where="w")
