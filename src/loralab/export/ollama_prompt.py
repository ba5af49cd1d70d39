"""The prompt template of an Ollama model, derived from the Jinja one and held against it.

Owns what values Ollama gives to a template (its `Messages`, `System`), how a Go template is found by rendering marked
conversations, and the proof that both write the same text. Source: ollama/ollama, docs/template.md and
template/template.go.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loralab.data.example import Message
from loralab.errors import PromptContractError, TemplateError
from loralab.export.go_template import GoTemplate, quote_text

# Messages -> the text of the serving call; raises TemplateError where the template refuses them.
Render: TypeAlias = Callable[[Sequence[Message]], str]

_SYSTEM, _USER, _ANSWER, _LATER = "loralabsystem1", "loralabuser2", "loralabanswer3", "loralabuser4"
_EVER = "{{ if .System }}"


@dataclass(frozen=True, slots=True)
class OllamaPrompt:
    """A Go template and what is known of it.

    Attributes:
        template: its text.
        turns: whether it was proved on conversations of several turns.
        system: whether it has a place for a system message.
        conversations: how many of them gave the same text under both templates.
        caveats: where both differ, in sentences.
    """

    template: str
    turns: bool
    system: bool
    conversations: int
    caveats: tuple[str, ...]


def render_ollama(template: GoTemplate, messages: Sequence[Message]) -> str:
    """Return the prompt that Ollama makes of messages: neighbours of one role joined, all system messages in one.

    Args:
        template: of the model.
        messages: of the request, a system message of the Modelfile included.
    """
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message.role:
            joined[-1]["Content"] += "\n\n" + message.content
        else:
            joined.append({"Role": message.role, "Content": message.content})
    if "Messages" in template.fields:
        return template.render({"System": system, "Messages": joined, "Response": ""})
    turns = [each for each in joined if each["Role"] == "user"]
    if len(turns) != 1 or len(joined) > 1 + bool(system):
        raise TemplateError(
            "a template without .Messages, and a conversation of several turns",
            where="the Modelfile's TEMPLATE",
            fix="ask one question at a time",
        )
    return template.render({"System": system, "Prompt": turns[0]["Content"], "Response": ""})


def derive_prompt(render: Render, *, drop: str, golden: Sequence[Sequence[Message]]) -> OllamaPrompt:
    """Find the Go template that writes what a Jinja template writes, and prove that it does.

    Args:
        render: the serving call as text.
        drop: what the program writes in front of a prompt by itself, as the bos token; it is taken from the front.
        golden: conversations of the prompt contract, also to be rendered alike.

    Returns:
        The template, with what was proved.

    Raises:
        TemplateError: no template that writes the same can be found.
    """

    def served(messages: Sequence[Message]) -> str:
        text = render(messages)
        if not text.startswith(drop):
            raise _irregular(f"a prompt does not begin with {drop!r}, which the program would write by itself")
        return text[len(drop) :]

    several, single = _several(served), _single(served)
    if several is not None:
        try:
            return _proved(several, served, golden, turns=True)
        except PromptContractError:  # a rule that some turns do not follow: one question may still do
            pass
    try:
        return _proved(single, served, golden, turns=False)
    except PromptContractError as error:
        raise _irregular(error.problems[0].what) from error


def _proved(template: str, served: Render, golden: Sequence[Sequence[Message]], *, turns: bool) -> OllamaPrompt:
    """Return a template with what was proved of it.

    Raises:
        PromptContractError: it writes something else than the Jinja template.
    """
    compared = sum(_prove(template, messages, served) for messages in [*_conversations(turns), *golden])
    has_system = ".System" in template
    return OllamaPrompt(template, turns, has_system, compared, tuple(_caveats(template, served, turns, has_system)))


def _single(served: Render) -> str:
    """Return the template of one question, with and without a system message."""
    before, after = _cut(served([Message("user", _USER)]), _USER)
    plain = f"{quote_text(before)}{{{{ .Prompt }}}}{quote_text(after)}"
    try:
        text = served([Message("system", _SYSTEM), Message("user", _USER)])
    except TemplateError:
        return plain
    first, between, last = _cut(text, _SYSTEM, _USER)
    framed = f"{quote_text(first)}{{{{ .System }}}}{quote_text(between)}{{{{ .Prompt }}}}{quote_text(last)}"
    return f"{_EVER}{framed}{{{{ else }}}}{plain}{{{{ end }}}}"


def _several(served: Render) -> str | None:
    """Return the template of conversations, or None where several turns do not follow one rule."""
    before, after = _cut(served([Message("user", _USER)]), _USER)
    talk = [Message("user", _USER), Message("assistant", _ANSWER), Message("user", _LATER)]
    try:
        opening, to_answer, to_user, closing = _cut(served(talk), _USER, _ANSWER, _LATER)
    except TemplateError:
        return None
    if (opening, closing) != (before, after):
        return None
    head = quote_text(before)
    try:
        first, between, last = _cut(served([Message("system", _SYSTEM), Message("user", _USER)]), _SYSTEM, _USER)
        if last != after:
            return None
        head = f"{_EVER}{quote_text(first)}{{{{ .System }}}}{quote_text(between)}{{{{ else }}}}{head}{{{{ end }}}}"
    except TemplateError:
        pass
    return (
        f"{head}{{{{ $later := false }}}}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $later }}}}{quote_text(to_user)}{{{{ end }}}}{{{{ .Content }}}}'
        f'{{{{ $later = true }}}}{{{{ else if eq .Role "assistant" }}}}{quote_text(to_answer)}{{{{ .Content }}}}'
        f"{{{{ end }}}}{{{{ end }}}}{quote_text(after)}"
    )


def _cut(text: str, *marks: str) -> list[str]:
    """Return the pieces of a text around marks that must stand in it once each, in order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            raise _irregular(f"it writes a message {text.count(mark)} times, or in another order")
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _conversations(turns: bool) -> list[list[Message]]:
    system = Message("system", "You answer briefly.")
    first, answer = Message("user", "What is 2 + 2?"), Message("assistant", "4")
    later = [
        Message("user", "And 3 + 3?\nExplain."),
        Message("assistant", "6, since 3 + 3 = 6."),
        Message("user", "é 世界"),
    ]
    found = [[first], [system, first]]
    if turns:
        longer = [first, answer, *later]
        found += [longer[:3], [system, *longer[:3]], longer, [system, *longer]]
    return found


def _prove(template: str, messages: Sequence[Message], served: Render) -> int:
    """Return 1 where both write the same, 0 where the Jinja template refuses the conversation."""
    try:
        trained = served(messages)
    except TemplateError:
        return 0
    sent = render_ollama(GoTemplate(template), messages)
    if sent != trained:
        raise PromptContractError(
            f"the Go template writes {sent[:80]!r}, and the chat template {trained[:80]!r}",
            where=f"a conversation of {' > '.join(message.role for message in messages)}",
            fix="export to vllm or gguf, which carry the Jinja template itself",
        )
    return 1


def _caveats(template: str, served: Render, turns: bool, has_system: bool) -> list[str]:
    go = GoTemplate(template)

    def differs(text: str) -> bool:
        messages = [Message("user", text)]
        try:
            return render_ollama(go, messages) != served(messages)
        except TemplateError:
            return True

    caveats = []
    if not turns:
        caveats.append("one question at a time: the chat template has no rule for several turns")
    if not has_system:
        caveats.append("a system message is left out: the chat template has no place for one")
    if differs(" blanks around \n"):
        caveats.append("the chat template takes blanks from both ends of a message, Ollama sends them")
    if differs("Add.\n\n### Input:\n1 and 2"):
        caveats.append(
            "the chat template words a question with '### Input:' in another way; Ollama sends the plain one"
        )
    caveats.append("tools and pictures are not covered")
    return caveats


def _irregular(what: str) -> TemplateError:
    return TemplateError(
        f"no Go template can be derived from this chat template: {what}",
        where="the adapter's chat template",
        fix="export to vllm or gguf, which carry the Jinja template itself; or write the Modelfile's TEMPLATE by hand",
    )


def describe_prompt(prompt: OllamaPrompt, *, promised: bool) -> dict[str, Any]:
    """Return what was proved of a template, as JSON holds it.

    Args:
        prompt: the template.
        promised: whether a prompt contract says what the adapter was trained on.
    """
    return {
        "compared_with": "the trained prompt" if promised else "the chat template (no trained prompt is known)",
        "conversations_equal": prompt.conversations,
        "several_turns": prompt.turns,
        "system_message": prompt.system,
        "caveats": list(prompt.caveats),
    }
