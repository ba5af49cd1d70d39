"""From examples to tokens: what carries loss, what is cut, and what is left out."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loralab.data.example import Conversation, Document, Message, Preformatted, Segment, Tokens
from loralab.data.prompts.prompter import Prompter
from loralab.data.prompts.templates import TEMPLATES
from loralab.data.tokens.tokenize import IGNORED, TokenizeSettings, Unit, tokenize_examples
from loralab.errors import DataError, MaskError
from support import tiny
from unit.data.prompters import CHATML, NO_STOP, TRIMMING, build_prompter, build_tokenizer, conversation

PROMPTERS = {
    "alpaca": build_prompter(TEMPLATES["alpaca"]),
    "none": build_prompter(TEMPLATES["none"]),
    "chatml": build_prompter(CHATML),
    "trimming": build_prompter(TRIMMING),
}
ALPACA, CHAT = PROMPTERS["alpaca"], PROMPTERS["chatml"]
TWO_TURNS = conversation("system: s", "user: a b", "assistant: one two", "user: c", "assistant: three")
PLAIN = st.text(st.characters(exclude_categories=["Cs"]))


def settings(**chosen: Any) -> TokenizeSettings:
    values = {"train_on": "response", "max_length": 512, "truncation": "right", "long_text": "split", **chosen}
    return TokenizeSettings(**values)


def units_of(example: Any, *, prompter: Prompter = ALPACA, **chosen: Any) -> list[Unit]:
    (units,) = tokenize_examples([example], prompter=prompter, settings=settings(**chosen))
    return units


def unit_of(example: Any, **chosen: Any) -> Unit:
    (unit,) = units_of(example, **chosen)
    return unit


def text_of(prompter: Prompter, ids: Any) -> str:
    return prompter.tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)


def pairs(unit: Unit) -> list[tuple[list[int], list[int]]]:
    return [(branch.prompt_ids.tolist(), branch.answer_ids.tolist()) for branch in unit.branches]


@pytest.mark.parametrize("name", PROMPTERS)
@given(question=PLAIN.filter(bool), answer=PLAIN)
def test_supervised_tokens_are_exactly_answer_and_stop(name: str, question: str, answer: str) -> None:
    prompter = PROMPTERS[name]
    assume(not any(token in question + answer for token in prompter.tokenizer.all_special_tokens))
    messages = (Message("user", question), Message("assistant", answer))
    (branch,) = unit_of(Conversation(messages), prompter=prompter, max_length=100_000).branches
    kept = answer.strip() if name == "trimming" else answer
    assert text_of(prompter, branch.answer_ids) == kept + prompter.stop.texts[0]
    prompt = prompter.render(messages[:1], add_generation_prompt=True)
    assert text_of(prompter, branch.prompt_ids) == prompt
    assert branch.prompt_ids.tolist() == prompter.encode_prompt(messages[:1])
    whole = prompter.render(messages, add_generation_prompt=False)
    assert (text_of(prompter, branch.prompt_ids) + text_of(prompter, branch.answer_ids)).rstrip() == whole.rstrip()


def test_every_answer_of_a_conversation_is_a_branch() -> None:
    unit = unit_of(TWO_TURNS, prompter=CHAT)
    assert [text_of(CHAT, branch.answer_ids) for branch in unit.branches] == ["one two<|stop|>", "three<|stop|>"]
    assert [branch.prompt_ids.tolist() for branch in unit.branches] == [
        CHAT.encode_prompt(TWO_TURNS.messages[:2]),
        CHAT.encode_prompt(TWO_TURNS.messages[:4]),
    ]


def test_last_response_is_the_last_branch() -> None:
    both = unit_of(TWO_TURNS, prompter=CHAT)
    last = unit_of(TWO_TURNS, prompter=CHAT, train_on="last_response")
    assert pairs(last) == pairs(both)[1:]


def test_all_supervises_every_token_but_the_first() -> None:
    (branch,) = unit_of(TWO_TURNS, prompter=CHAT, train_on="all").branches
    ((prompt, answer),) = pairs(unit_of(TWO_TURNS, prompter=CHAT, train_on="last_response"))
    assert branch.prompt_ids.tolist() == prompt[:1]
    assert branch.answer_ids.tolist() == prompt[1:] + answer


def test_examples_of_one_call_do_not_mix() -> None:
    examples = [TWO_TURNS, Document("a b"), Tokens((1, 2), (IGNORED, 2)), conversation("user: x", "assistant: y")]
    together = list(tokenize_examples(examples, prompter=CHAT, settings=settings()))
    alone = [units_of(example, prompter=CHAT) for example in examples]
    assert [[pairs(u) for u in units] for units in together] == [[pairs(u) for u in units] for units in alone]


def test_stop_token_is_added_where_the_template_writes_none() -> None:
    prompter = build_prompter(NO_STOP)
    (branch,) = unit_of(conversation("user: a", "assistant: b"), prompter=prompter).branches
    assert text_of(prompter, branch.answer_ids) == f"b\n{tiny.END}"
    assert branch.answer_ids.tolist().count(prompter.stop.ids[0]) == 1


@pytest.mark.parametrize("train_on", ["response", "last_response", "all"])
def test_conversation_without_an_answer_is_left_out(train_on: str) -> None:
    unit = unit_of(conversation("user: a"), prompter=CHAT, train_on=train_on)
    assert (unit.dropped, unit.branches) == ("no_assistant_turn", [])


def test_empty_prompt_is_left_out() -> None:
    assert unit_of(conversation("user: ", "assistant: b"), prompter=PROMPTERS["none"]).dropped == "empty_prompt"


@pytest.mark.parametrize(("answer", "empty"), [("", True), ("x", False)])
def test_empty_answer_is_kept_and_flagged(answer: str, empty: bool) -> None:
    unit = unit_of(conversation("user: a", f"assistant: {answer}"), prompter=CHAT)
    assert ("empty_answer" in unit.notes) is empty
    assert unit.branches[0].answer_ids.tolist()[-1] == CHAT.stop.ids[0]
    assert (len(unit.branches[0].answer_ids) == 1) is empty


@pytest.mark.parametrize("answer", ["b<|stop|>c", f"b{tiny.END}c", "<|stop|>"])
def test_stop_token_inside_an_answer_is_left_out(answer: str) -> None:
    unit = unit_of(conversation("user: a", f"assistant: {answer}"), prompter=CHAT)
    assert unit.dropped == "stop_token_inside_answer"


def test_stop_token_inside_a_question_is_kept() -> None:
    assert unit_of(conversation("user: a<|stop|>", "assistant: b"), prompter=CHAT).dropped is None


LONG = conversation("user: a b", "assistant: one two three red blue green")


def test_right_truncation_cuts_the_answer_to_max_length() -> None:
    ((prompt, answer),) = pairs(unit_of(LONG, prompter=CHAT))
    for cut in range(1, len(answer) + 1):
        unit = unit_of(LONG, prompter=CHAT, max_length=len(prompt) + cut)
        assert pairs(unit) == [(prompt, answer[:cut])]
        assert ("truncated" in unit.notes) == (cut < len(answer))


@pytest.mark.parametrize("below", [0, 1])
def test_prompt_that_fills_max_length_is_left_out(below: int) -> None:
    ((prompt, _),) = pairs(unit_of(LONG, prompter=CHAT))
    unit = unit_of(LONG, prompter=CHAT, max_length=len(prompt) - below)
    assert (unit.dropped, unit.branches) == ("prompt_too_long", [])


def test_drop_and_error_begin_one_token_above_max_length() -> None:
    ((prompt, answer),) = pairs(unit_of(LONG, prompter=CHAT))
    length = len(prompt) + len(answer)
    for truncation in ("drop", "error"):
        kept = unit_of(LONG, prompter=CHAT, max_length=length, truncation=truncation)
        assert (pairs(kept), kept.notes) == ([(prompt, answer)], set())
    assert unit_of(LONG, prompter=CHAT, max_length=length - 1, truncation="drop").dropped == "too_long"
    with pytest.raises(DataError) as caught:
        unit_of(LONG, prompter=CHAT, max_length=length - 1, truncation="error")
    assert caught.value.problems[0].what == f"{length} tokens, but data.max_length is {length - 1}"


def test_all_is_cut_as_one_text() -> None:
    ((prompt, answer),) = pairs(unit_of(LONG, prompter=CHAT))
    unit = unit_of(LONG, prompter=CHAT, train_on="all", max_length=len(prompt))
    assert pairs(unit) == [(prompt[:1], prompt[1:])]
    assert "truncated" in unit.notes
    assert answer


@given(words=st.integers(1, 40), max_length=st.integers(2, 12))
def test_text_windows_predict_every_token_exactly_once(words: int, max_length: int) -> None:
    text = " ".join(["red", "blue", "x"][i % 3] for i in range(words))
    whole = [*ALPACA.encode([text])[0], ALPACA.stop.ids[0]]
    units = units_of(Document(text), max_length=max_length)
    branches = [branch for unit in units for branch in unit.branches]
    assert [token for branch in branches for token in branch.answer_ids.tolist()] == whole[1:]
    lasts = [whole[0], *(int(branch.answer_ids[-1]) for branch in branches)]
    assert [branch.prompt_ids.tolist() for branch in branches] == [[token] for token in lasts[:-1]]
    assert all(len(branch.answer_ids) < max_length for branch in branches)
    assert not any(unit.notes for unit in units)


def test_text_begins_with_bos_where_the_tokenizer_adds_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(NO_STOP, bos=True)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    prompter = Prompter(tokenizer)
    text = prompter.encode(["red dog"])[0]
    assert pairs(unit_of(Document("red dog"), prompter=prompter)) == [([bos], [*text, prompter.stop.ids[0]])]


def test_truncated_text_is_the_first_window() -> None:
    text = "red blue green cat dog"
    first = units_of(Document(text), max_length=4)[0]
    unit = unit_of(Document(text), max_length=4, long_text="truncate")
    assert pairs(unit) == pairs(first)
    assert "truncated" in unit.notes
    assert not unit_of(Document(text), long_text="truncate").notes


def test_text_that_gives_no_window_is_left_out() -> None:
    assert unit_of(Document("")).dropped == "empty_text"
    assert unit_of(Document("a"), max_length=1).dropped == "max_length_below_2"


X = IGNORED


@pytest.mark.parametrize(
    ("labels", "branches"),
    [
        ((X, X, 7, 8), [([5, 6], [7, 8])]),
        ((X, 6, X, 8), [([5], [6]), ([5, 6, 7], [8])]),
        ((5, 6, X, X), [([5], [6])]),  # nothing stands before the first position
        ((5, 6, 7, 8), [([5], [6, 7, 8])]),
    ],
)
def test_labels_of_tokenized_rows_become_spans(labels: tuple[int, ...], branches: list[Any]) -> None:
    assert pairs(unit_of(Tokens((5, 6, 7, 8), labels))) == branches


@pytest.mark.parametrize("tokens", [Tokens((5, 6), (X, X)), Tokens((5,), (5,)), Tokens((), ())])
def test_tokenized_row_without_a_predictable_label_is_left_out(tokens: Tokens) -> None:
    assert unit_of(tokens).dropped == "no_supervised_tokens"


def test_padding_of_tokenized_rows_is_found_by_mask_even_where_pad_is_eos() -> None:
    from loralab.data.formats.table import FORMATS

    end = ALPACA.stop.ids[0]
    row = {"input_ids": [9, 8, end, end, end], "labels": [X, 8, end, X, X], "attention_mask": [1, 1, 1, 0, 0]}
    assert pairs(unit_of(FORMATS["tokenized"].build(row))) == [([9], [8, end])]


def test_long_tokenized_rows() -> None:
    row = Tokens((5, 6, 7, 8), (X, 6, X, 8))
    cut = unit_of(row, max_length=3)
    assert (pairs(cut), cut.notes) == ([([5], [6])], {"truncated", "no_stop"})
    assert unit_of(row, max_length=3, truncation="drop").dropped == "too_long"
    assert unit_of(row, max_length=4, truncation="drop").dropped is None
    with pytest.raises(DataError, match=r"4 tokens, but data\.max_length is 3"):
        unit_of(row, max_length=3, truncation="error")


def test_roles_are_trained_on_their_content() -> None:
    unit = unit_of(TWO_TURNS, prompter=CHAT, train_on=["user", "assistant"])
    texts = [text_of(CHAT, branch.answer_ids) for branch in unit.branches]
    assert texts == ["a b<|stop|>", "one two<|stop|>", "c<|stop|>", "three<|stop|>"]
    assert unit_of(TWO_TURNS, prompter=CHAT, train_on=["tool"]).dropped == "no_trained_turn"


def test_user_turn_takes_no_stop_token_that_the_template_does_not_write() -> None:
    example = conversation("user: a", "assistant: b")
    question, answer = unit_of(example, prompter=ALPACA, train_on=["user", "assistant"]).branches
    assert text_of(ALPACA, question.answer_ids) == "a"
    assert text_of(ALPACA, answer.answer_ids) == f"b{tiny.END}"


def test_system_setting_stands_before_conversations_without_one() -> None:
    bare = conversation("user: a", "assistant: b")
    unit = unit_of(bare, prompter=CHAT, system="be kind")
    assert pairs(unit) == pairs(unit_of(conversation("system: be kind", *["user: a", "assistant: b"]), prompter=CHAT))
    assert unit.system == "be kind"
    own = unit_of(TWO_TURNS, prompter=CHAT, system="be kind")
    assert (pairs(own), own.system) == (pairs(unit_of(TWO_TURNS, prompter=CHAT)), "s")
    assert unit_of(bare, prompter=CHAT).system is None


THREE = conversation(
    "system: s", "user: a b c", "assistant: one", "user: red", "assistant: two", "user: x", "assistant: three"
)


def test_left_truncation_leaves_out_whole_oldest_exchanges_but_never_the_system_message() -> None:
    whole = pairs(unit_of(THREE, prompter=CHAT))
    lengths = [len(prompt) + len(answer) for prompt, answer in whole]
    shorter = conversation("system: s", "user: red", "assistant: two", "user: x", "assistant: three")
    shortest = conversation("system: s", "user: x", "assistant: three")
    for kept, expected in (
        (shorter, pairs(unit_of(shorter, prompter=CHAT))[-1]),
        (shortest, pairs(unit_of(shortest, prompter=CHAT))[-1]),
    ):
        length = sum(map(len, expected))
        unit = unit_of(THREE, prompter=CHAT, train_on="last_response", truncation="left", max_length=length)
        assert pairs(unit) == [expected], kept
        assert unit.notes == {"turns_dropped"}
    fits = unit_of(THREE, prompter=CHAT, truncation="left", max_length=max(lengths))
    assert (pairs(fits), fits.notes) == (whole, set())
    too_short = sum(map(len, pairs(unit_of(shortest, prompter=CHAT))[0])) - 1
    assert (
        unit_of(THREE, prompter=CHAT, train_on="last_response", truncation="left", max_length=too_short).dropped
        == "too_long"
    )


def test_left_truncation_keeps_as_many_exchanges_as_fit_in_few_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [turn for number in range(64) for turn in (f"user: a {number}", "assistant: one two")]
    example = conversation(*turns)
    renderings: list[int] = []
    render_all = Prompter.render_all

    def counted(self: Prompter, requests: Any, **options: Any) -> Any:
        renderings.append(len(requests))
        return render_all(self, requests, **options)

    monkeypatch.setattr(Prompter, "render_all", counted)
    for length in (40, 100, 300):
        renderings.clear()
        unit = unit_of(example, prompter=CHAT, train_on="last_response", truncation="left", max_length=length)
        assert len(renderings) < 20
        ((prompt, answer),) = pairs(unit)
        kept = text_of(CHAT, prompt).count("<|start|>user")
        more = conversation(*turns[-2 * (kept + 1) :])
        assert len(prompt) + len(answer) <= length < sum(map(len, pairs(unit_of(more, prompter=CHAT))[-1]))


def test_system_message_in_the_middle_is_none_that_a_conversation_begins_with() -> None:
    assert unit_of(conversation("user: a", "system: s", "assistant: b"), prompter=CHAT).system is None


def test_left_truncation_keeps_early_turns_that_fit() -> None:
    whole = pairs(unit_of(THREE, prompter=CHAT))
    unit = unit_of(THREE, prompter=CHAT, truncation="left", max_length=max(sum(map(len, pair)) for pair in whole) - 1)
    assert pairs(unit)[:2] == whole[:2]
    assert len(pairs(unit)[2][0]) < len(whole[2][0])
    assert pairs(unit)[2][1] == whole[2][1]


@pytest.mark.parametrize("template", [CHATML, TEMPLATES["alpaca"]])
def test_left_truncation_prompts_are_serving_prompts(template: str) -> None:
    prompter = build_prompter(template)
    unit = unit_of(THREE, prompter=prompter, train_on="last_response", truncation="left", max_length=70)
    messages = THREE.messages
    served = [prompter.encode_prompt((messages[0], *messages[start:6])) for start in (1, 3, 5)]
    assert pairs(unit)[0][0] in served


def test_segments_are_supervised_where_they_say_so() -> None:
    example = Preformatted(
        (
            Segment("a b", False),
            Segment(" one", True),
            Segment(" two<|end|>", True),
            Segment(" c", False),
            Segment("red<|end|>", True),
        )
    )
    unit = unit_of(example, prompter=CHAT)
    assert [(text_of(CHAT, b.prompt_ids), text_of(CHAT, b.answer_ids)) for b in unit.branches] == [
        ("a b", " one two<|end|>"),
        ("a b one two<|end|> c", "red<|end|>"),
    ]
    assert unit.notes == set()


def test_segments_without_an_end_are_noted() -> None:
    example = Preformatted((Segment("a", False), Segment("b", True), Segment("c", False), Segment("d<|end|>", True)))
    assert unit_of(example, prompter=CHAT).notes == {"no_stop"}
    text = Preformatted((Segment("a b c", True),))
    assert unit_of(text, prompter=CHAT).notes == set()


def test_answers_of_tokenized_rows_that_do_not_end_are_noted() -> None:
    end = ALPACA.stop.ids[0]
    assert unit_of(Tokens((5, 6, 7), (X, X, 7))).notes == {"no_stop"}
    assert unit_of(Tokens((5, 6, end), (X, 6, X))).notes == {"no_stop"}
    assert unit_of(Tokens((5, 6, end), (X, 6, end))).notes == set()
    assert unit_of(Tokens((5, 6, end, 7, 8), (X, 6, end, X, 8))).notes == {"no_stop"}


@pytest.mark.parametrize("bos", [True, False])
def test_row_that_begins_with_two_bos_tokens_is_refused(bos: bool) -> None:
    template = "{{ bos_token }}{{ bos_token }}" if bos else "{{ bos_token }}"
    prompter = Prompter(build_tokenizer(template + CHATML, bos=True))
    example = conversation("user: a", "assistant: b")
    if not bos:
        assert unit_of(example, prompter=prompter).dropped is None
        return
    for train_on in ("response", "all"):
        with pytest.raises(MaskError, match="begins with two bos tokens"):
            unit_of(example, prompter=prompter, train_on=train_on)
    bos_id = prompter.tokenizer.bos_token_id
    with pytest.raises(MaskError, match="begins with two bos tokens"):
        unit_of(Tokens((bos_id, bos_id, 7), (X, X, 7)), prompter=prompter)


def long_talk(turns: int) -> Conversation:
    return conversation(
        "system: s", *(text for i in range(turns) for text in (f"user: red {i}", f"assistant: blue {i}"))
    )


@pytest.mark.parametrize("turns", [1, 7, 8, 9, 16, 17, 30])
def test_long_conversations_give_the_branches_of_their_turns_one_by_one(turns: int) -> None:
    talk = long_talk(turns)
    branches = pairs(unit_of(talk, prompter=CHAT, max_length=10_000))
    alone = [
        pairs(
            unit_of(
                Conversation(talk.messages[: 3 + 2 * turn]), prompter=CHAT, train_on="last_response", max_length=10_000
            )
        )
        for turn in range(turns)
    ]
    assert [[branch] for branch in branches] == alone


@pytest.mark.parametrize("kept", [1, 5, 8, 12, 20])
def test_right_truncation_keeps_the_turns_that_fit(kept: int) -> None:
    whole = pairs(unit_of(long_talk(20), prompter=CHAT, max_length=10_000))
    room = sum(map(len, whole[kept - 1]))
    unit = unit_of(long_talk(20), prompter=CHAT, max_length=room)
    assert pairs(unit)[:kept] == whole[:kept]
    assert unit.dropped is None
    assert ("turns_cut" in unit.notes) == (kept < 20)
    assert unit_of(long_talk(20), prompter=CHAT, max_length=len(whole[0][0])).dropped == "prompt_too_long"


def test_left_truncation_of_long_conversations_keeps_as_much_as_fits_and_every_answer() -> None:
    talk = long_talk(30)
    unit = unit_of(talk, prompter=CHAT, truncation="left", max_length=70)
    whole = pairs(unit_of(talk, prompter=CHAT, max_length=10_000))
    assert [answer for _, answer in pairs(unit)] == [answer for _, answer in whole]
    assert unit.notes == {"turns_dropped"}
    for turn, (prompt, answer) in enumerate(pairs(unit)):
        starts = range(1, 2 + 2 * turn, 2)
        served = [CHAT.encode_prompt((talk.messages[0], *talk.messages[start : 2 + 2 * turn])) for start in starts]
        assert prompt == next(ids for ids in served if len(ids) + len(answer) <= 70)


def test_system_message_stays_where_the_assistant_speaks_first() -> None:
    talk = conversation(
        "system: s", "assistant: hello there", "user: a b c", "assistant: one", "user: x", "assistant: two"
    )
    for kept in (
        Conversation((talk.messages[0], *talk.messages[2:])),
        Conversation((talk.messages[0], *talk.messages[4:])),
    ):
        expected = pairs(unit_of(kept, prompter=CHAT, train_on="last_response"))
        room = sum(map(len, expected[0]))
        unit = unit_of(talk, prompter=CHAT, truncation="left", train_on="last_response", max_length=room)
        assert pairs(unit) == expected


def test_of_all_what_comes_behind_the_last_answer_is_noted() -> None:
    assert unit_of(TWO_TURNS, prompter=CHAT, train_on="all").notes == set()
    open_end = Conversation((*TWO_TURNS.messages, Message("user", "and?")))
    unit = unit_of(open_end, prompter=CHAT, train_on="all")
    assert unit.notes == {"end_left_out"}
    assert pairs(unit) == pairs(unit_of(TWO_TURNS, prompter=CHAT, train_on="all"))


def test_a_turn_that_is_left_out_leaves_no_note() -> None:
    prompter = PROMPTERS["trimming"]
    talk = Conversation(
        (*conversation("user: a", "assistant: b").messages, Message("user", "c"), Message("assistant", " d "))
    )
    whole = unit_of(talk, prompter=prompter)
    assert whole.notes == {"answer_altered"}
    cut = unit_of(talk, prompter=prompter, max_length=len(whole.branches[1].prompt_ids))
    assert (len(cut.branches), cut.notes) == (1, {"turns_cut"})
