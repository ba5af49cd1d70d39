"""Proofs of stored rows: silent on what is right, and by name, row and fix on each way of being wrong."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loralab.data.example import (
    Conversation,
    Message,
    ToolCall,
)
from loralab.data.prompts.prompter import Prompter
from loralab.data.prompts.templates import TEMPLATES
from loralab.data.proofs.findings import KINDS, Finding, Findings, check_findings
from loralab.data.proofs.prove import StoredRow
from loralab.data.tokens.tokenize import tokenize_examples
from loralab.errors import MaskError
from unit.data.prompters import CHATML, NO_STOP, TRIMMING, build_prompter, build_tokenizer, conversation
from unit.data.stored_rows import CHAT, changed, failure, kinds, prove, settings, stored

PLAIN = st.text(st.characters(exclude_categories=["Cs"]))
TWO_TURNS = conversation("system: be red", "user: a bird", "assistant: one two", "user: a cat", "assistant: three")
TOOLS = ({"type": "function", "function": {"name": "find_cat", "parameters": {}}},)
CALLING = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WITHOUT_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
WITHOUT_QUESTION = CHATML.replace(
    "{{ message['content'] }}", "{% if message['role'] != 'user' %}{{ message['content'] }}{% endif %}"
)
REASONING = CHATML.replace(
    "{{ message['content'] }}", "{{ message['reasoning_content'] | default('') }}{{ message['content'] }}"
)
PROMPTERS = {
    "chatml": build_prompter(CHATML),
    "trimming": build_prompter(TRIMMING),
    "no_stop": build_prompter(NO_STOP),
    "calling": build_prompter(CALLING),
    "reasoning": build_prompter(REASONING),
    "without_system": build_prompter(WITHOUT_SYSTEM),
    "without_question": build_prompter(WITHOUT_QUESTION),
    **{name: build_prompter(TEMPLATES[name]) for name in ("alpaca", "none")},
}


# --- what is right


@pytest.mark.parametrize("name", [name for name in PROMPTERS if not name.startswith("without_")])
@given(question=PLAIN.filter(str.strip), answer=PLAIN)
def test_what_this_program_tokenizes_is_proven(name: str, question: str, answer: str) -> None:
    prompter = PROMPTERS[name]
    assume(not any(token in question + answer for token in prompter.tokenizer.all_special_tokens))
    row = stored(conversation(f"user: {question}", f"assistant: {answer}"), prompter, max_length=100_000)
    assert [f for f in prove(row, prompter, max_length=100_000) if KINDS[f.kind].severity == "error"] == []


@pytest.mark.parametrize("train_on", ["response", "last_response", "all", ["assistant", "user"], ["user"]])
def test_every_choice_of_turns_is_proven(train_on: Any) -> None:
    assert prove(stored(TWO_TURNS, CHAT, train_on=train_on), train_on=train_on) == []


@pytest.mark.parametrize("max_length", range(14, 40))
@pytest.mark.parametrize("truncation", ["left", "right"])
def test_cut_rows_are_proven_and_told(max_length: int, truncation: str) -> None:
    chosen = {"max_length": max_length, "truncation": truncation}
    (units,) = tokenize_examples([TWO_TURNS], prompter=CHAT, settings=settings(**chosen))
    if units[0].dropped is not None:
        return
    found = kinds(prove(stored(TWO_TURNS, CHAT, **chosen), **chosen))
    assert sorted(found) == sorted({"truncated": "cut"}.get(note, note) for note in units[0].notes)


def test_turns_may_be_missing_only_where_their_prompt_leaves_no_room() -> None:
    row = stored(TWO_TURNS, CHAT)
    shorter = replace(row, units=((row.branches[0],),))
    assert kinds(prove(shorter)) == ["turn_missing"]
    prompt = len(row.branches[1].prompt_ids)
    assert kinds(prove(shorter, max_length=prompt)) == ["turns_cut"]
    assert kinds(prove(shorter, max_length=prompt + 1)) == ["turn_missing"]
    assert kinds(prove(shorter, max_length=prompt, truncation="left")) == ["turn_missing"]


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "none"])
@pytest.mark.parametrize("truncation", ["right", "left"])
def test_whole_conversations_that_were_cut_or_lost_turns_are_no_failures(name: str, truncation: str) -> None:
    prompter = build_prompter(TEMPLATES[name])
    talk = conversation("system: s", "user: q 0", "assistant: a", "user: r", "assistant: b", "user: t", "assistant: c")
    proven = 0
    for length in range(2, 90):
        chosen = {"train_on": "all", "truncation": truncation, "max_length": length}
        (units,) = tokenize_examples([talk], prompter=prompter, settings=settings(**chosen))
        if units[0].dropped is None:
            proven += 1
            told = kinds(prove(stored(talk, prompter, **chosen), prompter, **chosen))
            assert set(told) <= {"cut", "turns_dropped"}, (length, told)
    assert proven > 20


@pytest.mark.parametrize("train_on", [["user"], ["user", "assistant"]])
def test_turns_of_other_roles_that_were_cut_off_are_no_failures(train_on: Any) -> None:
    prompter = build_prompter(TEMPLATES["alpaca"])
    talk = conversation("system: s", "user: q 0", "assistant: a", "user: r", "assistant: b")
    told: set[str] = set()
    for length in range(2, 90):
        chosen = {"train_on": train_on, "max_length": length}
        (units,) = tokenize_examples([talk], prompter=prompter, settings=settings(**chosen))
        if units[0].dropped is None:
            told |= set(kinds(prove(stored(talk, prompter, **chosen), prompter, **chosen)))
    assert told == {"cut", "turns_cut"}


def test_proof_of_a_long_conversation_without_its_oldest_turns_is_not_cubic() -> None:
    prompter = build_prompter(CHATML)
    rendered = 0

    class Counting(Prompter):
        def serve(self, *given: Any) -> list[int]:
            nonlocal rendered
            rendered += 1
            return super().serve(*given)

    turns = 120
    talk = conversation(*(f"{('user', 'assistant')[place % 2]}: red {place}" for place in range(turns)))
    row = stored(talk, prompter, truncation="left", max_length=80)
    assert set(kinds(prove(row, Counting(prompter.tokenizer), truncation="left", max_length=80))) == {"turns_dropped"}
    assert rendered < turns * 8


def test_a_system_message_of_the_configuration_is_a_part_of_the_prompt() -> None:
    row = stored(conversation("user: a", "assistant: b"), CHAT, system="be blue")
    assert prove(row, system="be blue") == []
    assert kinds(prove(row)) == ["prompt_differs"]


def test_tool_calls_and_reasoning_are_proven() -> None:
    call = Message("assistant", "so: ", tool_calls=(ToolCall("find_cat", {"colour": "red"}),))
    example = Conversation((Message("user", "a cat"), call), TOOLS)
    assert prove(stored(example, PROMPTERS["calling"]), PROMPTERS["calling"]) == []
    thinking = Conversation((Message("user", "a cat"), Message("assistant", "red", reasoning="a cat is")))
    assert prove(stored(thinking, PROMPTERS["reasoning"]), PROMPTERS["reasoning"]) == []
    assert kinds(prove(stored(thinking, CHAT))) == ["reasoning_left_out"]


# --- the seeded faults, in what is stored


def row_of(*turns: str, prompter: Prompter = CHAT) -> tuple[StoredRow, list[int], list[int]]:
    row = stored(conversation(*turns), prompter)
    (branch,) = row.branches
    return row, branch.prompt_ids.tolist(), branch.answer_ids.tolist()


def test_stop_token_masked() -> None:
    row, prompt, answer = row_of("user: a", "assistant: red bird")
    found = prove(changed(row, (prompt, answer[:-1])))
    assert kinds(found) == ["no_stop"]
    assert "generation stops on '<|stop|>', '<|end|>'" in str(failure(found))


def test_generation_prompt_missing() -> None:
    row, prompt, answer = row_of("user: a", "assistant: red bird")
    header = CHAT.encode(["<|start|>assistant\n"])[0]
    found = prove(changed(row, (prompt[: -len(header)], [*header, *answer])))
    assert "generation_prompt_missing" in kinds(found)
    assert "'<|start|>assistant\\n'" in str(failure(found))


def test_doubled_bos() -> None:
    tokenizer = build_tokenizer("{{ bos_token }}" + CHATML, bos=True)
    prompter = Prompter(tokenizer)
    row, prompt, answer = row_of("user: a", "assistant: b", prompter=prompter)
    assert prove(row, prompter) == []
    found = prove(changed(row, ([tokenizer.bos_token_id, *prompt], answer)), prompter)
    assert kinds(found) == ["doubled_bos"]
    assert "'<|bos|>' twice" in str(failure(found))


def test_first_characters_of_the_answer_in_the_prompt() -> None:
    row, prompt, answer = row_of("user: a", "assistant: red bird")
    found = prove(changed(row, ([*prompt, *answer[:1]], answer[1:])))
    assert kinds(found) == ["answer_in_prompt"]
    assert "the beginning of the answer" in str(failure(found))


def test_first_characters_of_the_answer_merged_into_the_last_token_of_the_prompt() -> None:
    prompter = PROMPTERS["none"]
    row, prompt, answer = row_of("user: r", "assistant: iver sings", prompter=prompter)
    merged = prompter.encode(["river sings"])[0]
    assert [*prompt, *answer[:-1]] != merged  # one text makes one token of both sides of the border
    found = prove(changed(row, (merged[:1], [*merged[1:], answer[-1]])), prompter)
    assert kinds(found) == ["answer_in_prompt"]
    assert "ends with 'i'" in str(failure(found))


def test_system_message_dropped_from_what_is_stored() -> None:
    row, prompt, answer = row_of("system: be red", "user: a", "assistant: b")
    without = CHAT.encode_prompt(row.example.messages[1:2])  # type: ignore[union-attr]
    found = prove(changed(row, (without, answer)))
    assert kinds(found) == ["system_missing"]
    assert "'be red'" in str(failure(found))
    assert prompt != without


@pytest.mark.parametrize(
    ("name", "kind", "seen"),
    [("without_system", "system_missing", "'be red'"), ("without_question", "question_missing", "'a bird'")],
)
def test_template_that_leaves_out_what_the_row_says(name: str, kind: str, seen: str) -> None:
    example = conversation("system: be red", "user: a bird", "assistant: b")
    found = prove(stored(example, PROMPTERS[name]), PROMPTERS[name])
    assert kinds(found) == [kind]
    assert seen in str(failure(found))


def test_template_that_leaves_out_tools() -> None:
    example = Conversation((Message("user", "a"), Message("assistant", "b")), TOOLS)
    found = prove(stored(example, CHAT))
    assert kinds(found) == ["tools_missing"]
    assert "'find_cat'" in str(failure(found))


def test_wrong_role_labelled() -> None:
    row, prompt, _ = row_of("user: a bird", "assistant: b")
    user = CHAT.encode(["<|start|>user\n"])[0]
    content = prompt[len(user) : len(user) + len(CHAT.encode(["a bird<|stop|>"])[0])]
    found = prove(changed(row, (user, content)))
    assert "wrong_role" in kinds(found)
    assert "'a bird' is turn 1 (user), not an answer" in str(failure(found))


def test_another_answer_is_no_answer() -> None:
    row, prompt, answer = row_of("user: a", "assistant: red bird")
    other = [*CHAT.encode(["red cat"])[0], answer[-1]]
    assert kinds(prove(changed(row, (prompt, other)))) == ["answer_differs"]
    assert kinds(prove(changed(row, (prompt, answer), (prompt, answer)))) == ["turn_missing"]


def test_answer_in_other_tokens() -> None:
    row, prompt, answer = row_of("user: a", "assistant: the")
    letters = CHAT.tokenizer.convert_tokens_to_ids(list("the"))
    assert answer[:-1] != letters
    assert kinds(prove(changed(row, (prompt, [*letters, answer[-1]])))) == ["answer_ids_differ"]


def test_empty_answer_is_told_and_no_failure() -> None:
    (found,) = prove(row_of("user: a", "assistant: ")[0])
    assert (found.kind, KINDS[found.kind].severity) == ("empty_answer", "warning")
    assert KINDS[found.kind].fix


def test_trimmed_answer_is_told() -> None:
    row = stored(conversation("user: a", "assistant:  b "), PROMPTERS["trimming"])
    assert kinds(prove(row, PROMPTERS["trimming"])) == ["answer_altered"]


def mutations(prompt: list[int], answer: list[int]) -> dict[str, tuple[list[int], list[int]]]:
    """Return every way in which one token of a branch can be on the wrong side, gone, doubled or another."""
    other = max(*prompt, *answer) - 1
    return {
        "border to the left": (prompt[:-1], [*prompt[-1:], *answer]),
        "border to the right": ([*prompt, *answer[:1]], answer[1:]),
        **{f"prompt without {i}": (prompt[:i] + prompt[i + 1 :], answer) for i in range(len(prompt))},
        **{f"prompt with other {i}": ([*prompt[:i], other, *prompt[i + 1 :]], answer) for i in range(len(prompt))},
        **{f"answer without {i}": (prompt, answer[:i] + answer[i + 1 :]) for i in range(len(answer))},
        **{f"answer with other {i}": (prompt, [*answer[:i], other, *answer[i + 1 :]]) for i in range(len(answer))},
        **{f"answer with {i} twice": (prompt, [*answer[: i + 1], *answer[i:]]) for i in range(len(answer))},
    }


@pytest.mark.parametrize("name", ["chatml", "alpaca", "none", "no_stop", "trimming"])
def test_every_single_mutation_fails_a_proof(name: str) -> None:
    row, prompt, answer = row_of("user: the cat of red", "assistant: one blue bird", prompter=PROMPTERS[name])
    assert prove(row, PROMPTERS[name]) == []
    unseen = [
        mutation
        for mutation, branch in mutations(prompt, answer).items()
        if branch != (prompt, answer)
        and not any(KINDS[f.kind].severity == "error" for f in prove(changed(row, branch), PROMPTERS[name]))
    ]
    assert unseen == []


def test_every_single_mutation_of_another_role_fails_a_proof() -> None:
    chosen = {"train_on": ["user"]}
    row = stored(conversation("user: a", "assistant: b", "user: the cat of red"), CHAT, **chosen)
    first, last = ((branch.prompt_ids.tolist(), branch.answer_ids.tolist()) for branch in row.branches)
    without_stop = (last[0], last[1][:-1])  # such a turn need not end
    for mutation, branch in mutations(*last).items():
        if branch not in (last, without_stop):
            found = prove(changed(row, first, branch), **chosen)
            assert any(KINDS[f.kind].severity == "error" for f in found), mutation


# --- findings


def test_findings_are_grouped_and_counted_whole() -> None:
    findings = Findings()
    findings.add(Finding("empty_answer", "a.jsonl", row, "''") for row in range(1, 40))
    findings.add([Finding("no_stop", "a.jsonl", 3, "x"), Finding("no_stop", "b.jsonl", 4, "y")])
    first, second = findings.as_list()
    assert (first["kind"], first["count"], second["kind"], second["count"]) == ("no_stop", 2, "empty_answer", 39)
    assert len(second["rows"]) == 20
    assert (findings.count("error"), findings.count("warning")) == (2, 39)
    with pytest.raises(MaskError) as caught:
        check_findings(findings.as_list())
    (problem,) = caught.value.problems
    assert problem.where == "a.jsonl row 3; b.jsonl row 4 (2 places)"
    assert caught.value.exit_code == 3


def test_warnings_alone_fail_nothing() -> None:
    findings = Findings()
    findings.add([Finding("cut", "a.jsonl", 1, "x")])
    check_findings(findings.as_list())
