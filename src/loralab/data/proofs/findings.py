"""What the proofs and the survey find in rows: kinds, their weight and what to do about them.

Owns the table of kinds and the grouping of findings. Finding them is `proofs.py`'s and
`answer_survey.py`'s.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loralab.errors import MaskError, Problem

# Name in `KINDS`, and what was seen.
Seen: TypeAlias = tuple[str, str]

# How many findings of one kind are listed with what was seen; their count is always whole.
LISTED_FINDINGS = 20
_SHOWN_ROWS = 5
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding.

    Attributes:
        severity: an error is a proof that fails; a warning is a row that a person should see.
        title: what is wrong.
        fix: what to do about it.
    """

    severity: Literal["error", "warning"]
    title: str
    fix: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding in one row.

    Attributes:
        kind: its name in `KINDS`.
        source: name of the row's source.
        row: its number there, from 1.
        what: what was seen.
    """

    kind: str
    source: str
    row: int
    what: str


@dataclass(slots=True)
class Findings:
    """Findings by kind: the first of each, and how many rows there are."""

    _listed: dict[str, list[Finding]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, found: Iterable[Finding]) -> None:
        """Take findings in."""
        for finding in found:
            listed = self._listed.setdefault(finding.kind, [])
            if len(listed) < LISTED_FINDINGS:
                listed.append(finding)
            self._counts[finding.kind] = self._counts.get(finding.kind, 0) + 1

    def count(self, severity: str) -> int:
        """Return the number of findings of one severity."""
        return sum(count for kind, count in self._counts.items() if KINDS[kind].severity == severity)

    def as_list(self) -> list[dict[str, Any]]:
        """Return the groups, failed proofs first, as data."""
        groups = [
            {
                "kind": name,
                "severity": kind.severity,
                "title": kind.title,
                "fix": kind.fix,
                "count": self._counts[name],
                "rows": [{"source": f.source, "row": f.row, "what": f.what} for f in self._listed[name]],
            }
            for name, kind in KINDS.items()
            if name in self._counts
        ]
        return sorted(groups, key=lambda group: group["severity"] != "error")


def check_findings(groups: Iterable[dict[str, Any]]) -> None:
    """Check that no proof failed.

    Args:
        groups: as `Findings.as_list` returns them.

    Raises:
        MaskError: with one problem for each kind of failed proof.
    """
    problems = [
        Problem(f"{group['title']}: {group['rows'][0]['what']}", describe_rows(group), str(group["fix"]))
        for group in groups
        if group["severity"] == "error"
    ]
    if problems:
        raise MaskError.from_problems(problems)


def describe_rows(group: dict[str, Any]) -> str:
    """Return the first rows of a group of findings as text, such as "rows.jsonl row 3, 7"."""
    by_source: dict[str, list[int]] = {}
    for entry in group["rows"]:
        rows = by_source.setdefault(entry["source"], [])
        if entry["row"] not in rows:
            rows.append(entry["row"])
    parts = []
    for source, rows in by_source.items():
        more = ", ..." if len(rows) > _SHOWN_ROWS else ""
        numbers = ", ".join(map(str, rows[:_SHOWN_ROWS]))
        parts.append(f"{source} row{'s' if len(rows) > 1 else ''} {numbers}{more}" if rows[0] else source)
    places = f" ({group['count']:,} places)" if group["count"] > 1 else ""
    return "; ".join(parts) + places


def show_text(text: str, *, tail: bool = False) -> str:
    """Return text in quotes, cut to what fits into a message.

    Args:
        text: any.
        tail: keep the end, not the beginning.
    """
    if len(text) <= _SHOWN_CHARACTERS:
        return repr(text)
    return f"...{text[-_SHOWN_CHARACTERS:]!r}" if tail else f"{text[:_SHOWN_CHARACTERS]!r}..."


_MADE_ELSEWHERE = "make these tokens again: labels cover exactly an answer and its stop token"
_OTHER_TEMPLATE = "choose another data.template, or mend the Jinja file"

# Failed proofs first, each group in the order of the row: prompt, answer, end.
KINDS: dict[str, Kind] = {
    "contract_broken": Kind(
        "error",
        "the prompt contract does not hold",
        "restore the adapter folder's tokenizer files and prompt_contract.json, or train again",
    ),
    "doubled_bos": Kind(
        "error",
        "the row begins with two bos tokens",
        "write the bos token once: by the template, or by the tokenizer that made the tokens",
    ),
    "generation_prompt_missing": Kind(
        "error",
        "the prompt ends before the generation prompt that serving sends",
        "let the template write it where add_generation_prompt is set; tokens made elsewhere: render prompts with "
        "add_generation_prompt=True",
    ),
    "answer_in_prompt": Kind(
        "error",
        "the answer's first characters stand in the prompt, where they carry no loss",
        "tokenize prompt and answer apart, or set data.template so that a blank or line break is between them",
    ),
    "system_missing": Kind(
        "error",
        "the system message is not in the prompt",
        "choose a data.template that writes system messages, or take them out of the rows",
    ),
    "question_missing": Kind(
        "error", "the question is not in the prompt", "choose a data.template that writes it as the row has it"
    ),
    "tools_missing": Kind(
        "error",
        "the tools that may be called are not in the prompt",
        "choose a data.template that writes tools, such as qwen, or leave such rows out",
    ),
    "prompt_differs": Kind(
        "error",
        "the prompt's tokens differ from those that serving sends",
        f"{_OTHER_TEMPLATE}; tokens made elsewhere: render prompts with the tokenizer's own chat template",
    ),
    "picture_changed": Kind(
        "error",
        "a picture is no longer the file whose tokens are stored",
        "put back the file that was there, or run again, which looks at every changed picture anew",
    ),
    "picture_missing": Kind(
        "error",
        "the pictures before an answer are not those of the row",
        "remove the folder of data.cache_dir and run again; if it stays, please report it",
    ),
    "picture_differs": Kind(
        "error",
        "a picture's tokens are not those that the model's own processor makes of it",
        "use the processor of the model that is trained; if it is, please report it with the row's picture",
    ),
    "wrong_role": Kind(
        "error",
        "the turn of another role carries loss",
        f"set data.train_on: response; tokens made elsewhere: {_MADE_ELSEWHERE}",
    ),
    "turn_missing": Kind(
        "error", "the answers that carry loss are not those of the row", f"tokens made elsewhere: {_MADE_ELSEWHERE}"
    ),
    "answer_differs": Kind(
        "error", "the span that carries loss is not the answer", f"{_OTHER_TEMPLATE}; else {_MADE_ELSEWHERE}"
    ),
    "answer_ids_differ": Kind(
        "error",
        "the answer's tokens are not those of the answer behind its prompt",
        "tokenize the answer as a continuation of its prompt, with the tokenizer that generates",
    ),
    "stop_inside": Kind(
        "error",
        "a stop token stands inside an answer: generation would end there",
        "take its text out of the rows, or name another token in data.stop_tokens",
    ),
    "tool_call_missing": Kind(
        "error", "a tool call is not in the answer", "choose a data.template that writes tool calls, such as qwen"
    ),
    "text_differs": Kind(
        "error", "the tokens are not those of the text", "use the tokenizer of the model that is trained"
    ),
    "stop_masked": Kind(
        "error",
        "the stop token behind an answer carries no loss: the model would not learn to stop",
        "give it a label too; padding that is told by the token's id does this where pad = eos: choose another pad "
        "token, or mask by length",
    ),
    "no_stop": Kind(
        "error",
        "an answer ends without a token that generation stops on",
        "name the token that ends answers in data.stop_tokens, or end answers with the tokenizer's end token",
    ),
    "unknown_characters": Kind(
        "warning",
        "the tokenizer has no token for some characters of an answer",
        "use the tokenizer of the model that is trained, or leave such rows out",
    ),
    "cut": Kind(
        "warning",
        "an answer or text was cut, and does not learn to stop",
        "raise data.max_length, or set data.truncation: drop",
    ),
    "turns_cut": Kind(
        "warning",
        "later turns were left out: the prompt before them fills max_length",
        "raise data.max_length, or set data.truncation: left",
    ),
    "turns_dropped": Kind("warning", "oldest turns were left out of a prompt", "raise data.max_length"),
    "empty_answer": Kind(
        "warning",
        "an answer holds nothing but its stop token: the model learns to say nothing",
        "leave such rows out, or write their answers",
    ),
    "answer_altered": Kind(
        "warning", "the template trimmed or rewrote an answer", "choose another data.template if that is not wanted"
    ),
    "reasoning_left_out": Kind(
        "warning",
        "the template writes nothing of an answer's reasoning",
        "choose a data.template that writes reasoning, if it is to be learnt",
    ),
    "markers_in_answer": Kind(
        "warning",
        "an answer holds a template's markers as text",
        "take them out of the rows: the template writes its own",
    ),
    "marker_cut_off": Kind(
        "warning", "an answer ends in the middle of a marker", "mend the rows: they were cut before they came here"
    ),
    "answer_is_question": Kind("warning", "an answer repeats its question", "check the columns: data.columns"),
    "repeated_answer": Kind(
        "warning",
        "one answer is that of more than a fifth of the rows",
        "leave some of these rows out, unless the task has few answers",
    ),
}
