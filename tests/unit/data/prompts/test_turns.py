"""Conversations to turns: the serving call's text, the answer behind it, and what rendering did."""

import pytest

from loralab.data.example import Conversation, Message, ToolCall
from loralab.data.prompts.prompter import Prompter
from loralab.data.prompts.turns import Turn, split_turns, trained_turns
from loralab.errors import DataError, MaskError
from unit.data.prompters import CHATML, NO_STOP, TRIMMING, UNFAITHFUL, build_prompter, conversation

# What a tool-aware template does, in short: reasoning and calls of an answer, tools at the start.
TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}({{ message.reasoning_content | trim }}){% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Earlier answers lose their first letter, as templates lose earlier reasoning; the last one is whole.
REWRITING = CHATML.replace(
    "{{ message['content'] }}", "{{ message['content'] if loop.last or message.role != 'assistant' else '...' }}"
)
NO_PROMPT = CHATML[: CHATML.index("{% if add")]


def split(example: Conversation, turn: int, prompter: Prompter) -> tuple[str, str]:
    made = turn_of(example, turn, prompter)
    return made.prompt, made.answer


def turn_of(example: Conversation, turn: int, prompter: Prompter) -> Turn:
    (made,) = split_turns([(example, turn)], prompter)
    return made


def test_turns_are_the_serving_call_and_the_rest_up_to_the_stop() -> None:
    messages = conversation("system: s", "user: a", "assistant: b", "user: c", "assistant: d")
    prompter = build_prompter(CHATML)
    head = "<|start|>system\ns<|stop|>\n<|start|>user\na<|stop|>\n<|start|>assistant\n"
    # The line break behind the stop token is the template's, not the answer's.
    assert split(messages, 2, prompter) == (head, "b<|stop|>")
    rest = "b<|stop|>\n<|start|>user\nc<|stop|>\n<|start|>assistant\n"
    assert split(messages, 4, prompter) == (head + rest, "d<|stop|>")
    assert prompter.render(messages.messages[:4], add_generation_prompt=True) == head + rest


@pytest.mark.parametrize(("template", "content"), [(CHATML, "b<|stop|>c"), (TRIMMING, " b<|stop|>c\n")])
def test_stop_text_inside_the_content_does_not_end_the_answer(template: str, content: str) -> None:
    example = Conversation((Message("user", "a"), Message("assistant", content)))
    assert split(example, 1, build_prompter(template))[1] == "b<|stop|>c<|stop|>"


@pytest.mark.parametrize("content", ["  b \n", "b", ""])
def test_content_that_the_template_trims(content: str) -> None:
    example = Conversation((Message("user", "a"), Message("assistant", content)))
    assert split(example, 1, build_prompter(TRIMMING))[1] == content.strip() + "<|stop|>"


def test_answer_without_a_stop_token_in_the_template_is_the_whole_rest() -> None:
    assert split(conversation("user: a", "assistant: b"), 1, build_prompter(NO_STOP)) == ("a\n", "b\n")


def test_template_that_does_not_extend_its_prompt_names_the_turn() -> None:
    example = conversation("user: a", "assistant: b")
    with pytest.raises(DataError) as caught:
        split(example, 1, build_prompter(UNFAITHFUL))
    assert caught.value.problems[0].what == "the template does not extend its own prompt at turn 2 (assistant)"


def test_many_turns_in_one_call_are_those_of_single_calls() -> None:
    prompter = build_prompter(CHATML)
    examples = [
        conversation("user: a", "assistant: b", "user: c", "assistant: d"),
        conversation("user: x", "assistant: y"),
    ]
    requests = [(examples[0], 1), (examples[1], 1), (examples[0], 3), (examples[0], 2)]
    assert split_turns(requests, prompter) == [turn_of(*request, prompter) for request in requests]


def test_template_that_rewrites_earlier_turns_trains_each_under_its_own_prompt() -> None:
    prompter = build_prompter(REWRITING)
    example = conversation("user: a", "assistant: long answer", "user: c", "assistant: d")
    first, second = split_turns([(example, 1), (example, 3)], prompter)
    assert first.answer == "long answer<|stop|>"
    assert "long answer" not in second.prompt
    assert second.prompt == prompter.render(example.messages[:3], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("response", [2, 4]),
        ("last_response", [4]),
        ("all", [4]),
        (["assistant"], [2, 4]),
        (["user"], [1, 3]),
        (["system", "assistant"], [0, 2, 4]),
        (["tool"], []),
    ],
)
def test_trained_turns(train_on: str | list[str], expected: list[int]) -> None:
    messages = conversation("system: s", "user: a", "assistant: b", "user: c", "assistant: d").messages
    assert trained_turns(messages, train_on) == expected


def test_turn_that_says_so_carries_no_loss() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b", train=False),
        Message("user", "c"),
        Message("assistant", "d"),
    )
    assert trained_turns(messages, "response") == [3]
    assert trained_turns(messages[:2], "last_response") == []
    with pytest.raises(DataError, match="message 2 is not to be trained"):
        trained_turns(messages, "all")


def test_assistant_that_speaks_first_answers_nobody() -> None:
    assert trained_turns(conversation("assistant: hi", "user: a", "assistant: b").messages, "response") == [2]
    assert trained_turns(conversation("assistant: hi").messages, "response") == []


@pytest.mark.parametrize(("template", "content"), [(CHATML, " b \n"), (TRIMMING, "b")])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_other_roles_carry_loss_on_content_and_the_stop_right_behind(template: str, content: str, role: str) -> None:
    example = Conversation((Message("system", "s"), Message(role, " b \n"), Message("assistant", "c")))
    turn = turn_of(example, 1, build_prompter(template))
    assert turn.prompt == f"<|start|>system\ns<|stop|>\n<|start|>{role}\n"
    assert turn.answer == f"{content}<|stop|>"
    assert (turn.answered, turn.notes) == (False, set() if content == " b \n" else {"answer_altered"})


def test_first_turn_of_another_role_has_its_header_as_prompt() -> None:
    assert split(conversation("user: a", "assistant: b"), 0, build_prompter(CHATML)) == ("<|start|>user\n", "a<|stop|>")


def test_other_role_that_the_template_rewrites_is_refused() -> None:
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}")
    with pytest.raises(DataError, match=r"cannot tell where the content of turn 1 \(user\) begins"):
        split(conversation("user: a", "assistant: b"), 0, build_prompter(template))


@pytest.mark.parametrize(
    ("template", "content", "notes"),
    [
        (CHATML, " b ", set()),
        (TRIMMING, "b", set()),
        (TRIMMING, " b ", {"answer_altered"}),
        (
            CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}"),
            "b",
            {"answer_altered", "question_altered"},
        ),
    ],
)
def test_altered_answers_are_noted(template: str, content: str, notes: set[str]) -> None:
    example = Conversation((Message("user", "why?"), Message("assistant", content)))
    assert turn_of(example, 1, build_prompter(template)).notes == notes


def test_system_message_that_the_template_leaves_out_is_noted() -> None:
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    example = conversation("system: be kind", "user: a", "assistant: b")
    assert turn_of(example, 2, build_prompter(template)).notes == {"system_left_out"}
    assert turn_of(example, 2, build_prompter(CHATML)).notes == set()


def test_template_without_a_generation_prompt_is_refused() -> None:
    with pytest.raises(
        MaskError, match=r"writes no generation prompt: the answer of turn 2 would begin with '<\|start\|>"
    ) as caught:
        split(conversation("user: a", "assistant: b"), 1, build_prompter(NO_PROMPT))
    assert caught.value.exit_code == 3


def test_blank_before_an_answer_needs_no_generation_prompt() -> None:
    asked, answered = "{{ '[I] ' + m.content + ' [/I]' }}", "{{ ' ' + m.content + '<|stop|>' }}"
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{asked}{{% else %}}{answered}{{% endif %}}{{% endfor %}}"
    )
    assert split(conversation("user: a", "assistant: b"), 1, build_prompter(template)) == ("[I] a [/I]", " b<|stop|>")


CALL = Message("assistant", "", reasoning="  think ", tool_calls=(ToolCall("find", {"what": "tea", "n": 2}),))
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}


def test_tools_calls_and_reasoning_are_in_the_turn() -> None:
    example = Conversation((Message("user", "a"), CALL, Message("tool", "green"), Message("assistant", "b")), (TOOL,))
    first, last = split_turns([(example, 1), (example, 3)], build_prompter(TOOLS))
    assert first.prompt == "[find]<|start|>user\na<|stop|>\n<|start|>assistant\n"
    assert first.answer == '(think)find{"what": "tea", "n": 2}<|stop|>'
    assert last.prompt == first.prompt + first.answer + "\n<|start|>tool\ngreen<|stop|>\n<|start|>assistant\n"
    assert (first.notes, last.notes) == (set(), set())


def test_template_that_knows_no_tools_is_told() -> None:
    plain = build_prompter(CHATML)
    with pytest.raises(DataError, match="writes nothing of the tool call 'find' of turn 2"):
        split(Conversation((Message("user", "a"), CALL)), 1, plain)
    example = Conversation((Message("user", "a"), Message("assistant", "b", reasoning="think")), (TOOL,))
    assert turn_of(example, 1, plain).notes == {"reasoning_left_out", "tools_left_out"}


@pytest.mark.parametrize(("content", "empty"), [("", True), (" \n", True), ("a", False)])
@pytest.mark.parametrize("lead", ["", " "])
def test_answer_that_says_nothing_is_noted_whatever_the_template_writes_before_it(
    content: str, empty: bool, lead: str
) -> None:
    said = "{{ '" + lead + "' + message['content'] if message.role == 'assistant' else message['content'] }}"
    prompter = build_prompter(CHATML.replace("{{ message['content'] }}", said))
    example = Conversation((Message("user", "why?"), Message("assistant", content)))
    assert ("empty_answer" in turn_of(example, 1, prompter).notes) is empty
