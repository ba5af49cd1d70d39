"""Closed answers, scored: the log-probability of every label behind each prompt, and the most likely one.

Owns which token ids stand for a label, and that a prompt (and the beginning that prompts share) is read
once for all labels. Calibration and accuracy are `metrics/`'s.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError, ModelError
from loralab.evaluation.answers import Answered, Question
from loralab.evaluation.forwards import observe_batches
from loralab.evaluation.questions import as_example, spread
from loralab.layout.collate import MicroBatch
from loralab.layout.paths import token_keys
from loralab.layout.planner import Planner
from loralab.models.load import max_positions
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.token_loss import TokenLosses
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes

LabelIds = Mapping[str, tuple[int, ...]]
_WHERE = "key evaluation.labels"
# References that are looked at to see how answers are written.
_LOOKED_AT = 200


@dataclass(frozen=True, slots=True, eq=False)
class WrittenLabels(Mapping[str, tuple[int, ...]]):
    """Token ids by label, as a user names it, and the text that they are.

    Attributes:
        ids: token ids by label.
        texts: what the ids say, without outer blanks, by label; a stop token that ends them left out.
    """

    ids: LabelIds
    texts: Mapping[str, str]

    def __getitem__(self, label: str) -> tuple[int, ...]:
        return self.ids[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def label_ids(labels: Sequence[str], prompter: Prompter, questions: Sequence[Question] = ()) -> Resolved[WrittenLabels]:
    """Choose the token ids that stand for each label.

    A label is tokenized as an answer behind a prompt, with what most references have before it (a template may
    put a blank there, or an empty thought) and in the case that they write it in. The stop token is left out,
    since what ends an answer says nothing about which one it is; where one label begins as another does, it
    takes part in all of them.

    Args:
        labels: as a user names them; blanks around them do not count.
        prompter: knows stop tokens and how answers are tokenized.
        questions: whose references show how answers are written.

    Returns:
        Token ids by label, in order.

    Raises:
        DataError: fewer than two labels, one without tokens, or two that are the same to the model.
    """
    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise DataError(f"not two or more different labels: {list(labels)}", where=_WHERE, fix="name each answer once")
    form = _find_form(labels, prompter, questions)
    encoded = prompter.encode_answers([form.value.write(label) for label in labels])
    ids = {label: _without_stop(found, prompter) for label, found in zip(labels, encoded, strict=True)}
    _check_labels(ids, prompter)
    # As references become text, so that a label and a reference of the same tokens are the same text.
    texts = {label: prompter.decode(list(found)).strip() for label, found in ids.items()}
    clash = _find_prefix(ids)
    if clash is None:
        why = "stop tokens left out, which say nothing about the label"
        return Resolved(WrittenLabels(ids, texts), f"{form.reason}; {why}")
    stopped = {label: (*found, prompter.stop.ids[0]) for label, found in ids.items()}
    why = f"each with its stop token, since {clash[1]!r} begins with all tokens of {clash[0]!r}"
    return Resolved(WrittenLabels(stopped, texts), f"{form.reason}; {why}")


@dataclass(frozen=True, slots=True)
class _Form:
    """How references write answers.

    Attributes:
        lead: what stands before a label.
        spellings: how a label is written, by its name in lower case.
    """

    lead: str = ""
    spellings: Mapping[str, str] = field(default_factory=dict)

    def write(self, label: str) -> str:
        """Return the text that stands for a label; none for one of blanks, which the lead would hide."""
        name = label.strip()
        return self.lead + self.spellings.get(name.lower(), name) if name else ""


def _find_form(labels: Sequence[str], prompter: Prompter, questions: Sequence[Question]) -> Resolved[_Form]:
    """Choose how labels are written: as most references that end with one do it."""
    endings = sorted((label.strip().lower() for label in labels if label.strip()), key=len, reverse=True)
    leads: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    seen = [questions[index] for index in spread(len(questions), _LOOKED_AT)]
    for question in seen:
        text = _answer_text(question, prompter)
        ending = next((each for each in endings if text.lower().endswith(each)), None)
        if ending is not None:
            border = len(text) - len(ending)
            leads[text[:border]] += 1
            spellings.setdefault(ending, Counter())[text[border:]] += 1
    lead, count = leads.most_common(1)[0] if leads else ("", 0)
    if 2 * count <= len(seen):
        why = (
            f"no beginning is that of most of the {len(seen)} references looked at"
            if seen
            else "no references are there"
        )
        return Resolved(_Form(), f"labels stand right behind the prompt: {why}")
    # Labels that differ in case alone are written as they are named.
    written = {name: forms.most_common(1)[0][0] for name, forms in spellings.items() if endings.count(name) == 1}
    place = f"behind {lead!r}" if lead else "right behind the prompt"
    return Resolved(_Form(lead, written), f"labels stand {place}, as in {count} of {len(seen)} references looked at")


def _answer_text(question: Question, prompter: Prompter) -> str:
    """Return a reference as text behind its prompt: by itself, many decoders take its first blank away."""
    ids = [*question.prompt_ids, *_without_stop(question.reference_ids, prompter)]
    whole = str(prompter.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    text = whole[len(question.prompt) :] if whole.startswith(question.prompt) else question.reference
    return text.rstrip()


def _without_stop(ids: Sequence[int], prompter: Prompter) -> tuple[int, ...]:
    kept = list(ids)
    while kept and kept[-1] in prompter.stop.ids:
        kept.pop()
    return tuple(kept)


def _check_labels(ids: LabelIds, prompter: Prompter) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for label, found in ids.items():
        if not found:
            raise DataError(f"label {label!r} has no tokens", where=_WHERE, fix="write the answer that it stands for")
        if any(token in prompter.stop.ids for token in found):
            raise DataError(
                f"label {label!r} holds a stop token", where=_WHERE, fix="leave it out: no answer goes on behind it"
            )
        if found in seen:
            raise DataError(
                f"labels {seen[found]!r} and {label!r} are the same tokens to the model",
                where=_WHERE,
                fix="keep one of them",
            )
        seen[found] = label


def _find_prefix(ids: LabelIds) -> tuple[str, str] | None:
    """Return two labels of which the second goes on where the first ends, or None."""
    pairs = ((short, long) for short in ids for long in ids if short != long)
    return next((pair for pair in pairs if ids[pair[1]][: len(ids[pair[0]])] == ids[pair[0]]), None)


def score_labels(
    model: SupervisedPeftModel,
    questions: Sequence[Question],
    *,
    labels: LabelIds,
    planner: Planner,
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
    label: str = "score labels",
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
    count_tokens: Callable[[int], None] = lambda _: None,
) -> list[Answered]:
    """Measure how likely each label is behind each prompt.

    Args:
        model: base with adapter; put into evaluation mode meanwhile.
        questions: what is asked.
        labels: token ids by label, of `label_ids`.
        planner: lays out each batch; the scores are the same however it does.
        batch_size: questions per batch at the least; a batch goes on to the end of a shared beginning.
        device: where the model is.
        reporter: told of progress under `label`.
        label: name of the stage.
        should_stop: asked before every batch, in every process; they must agree.
        processes: those that share the work; all of them know all scores in the end.
        count_tokens: told how many tokens this process's model reads, micro-batch by micro-batch, without padding.

    Returns:
        One answer per question, in order: the most likely label as it was scored (in the spelling of the references,
        which an exact match is held against), and every label's log-probability in nats, summed over its tokens.

    Raises:
        ModelError: a prompt leaves no position for a label.
        Interrupted: `should_stop` answered yes.
    """
    codes = list(labels.values())
    if _find_prefix(labels) is not None:
        raise ValueError("no label may begin as another one does")
    for question in questions:
        check_room(model, len(question.prompt_ids), labels, where=f"row {question.row}")
    # Sorted, so that prompts that begin alike are laid out together; the same prompt is asked once.
    keys = [_keys(question) for question in questions]
    asked = dict(zip(keys, questions, strict=True))
    prompts = sorted(asked)
    cuts = _cut(prompts, batch_size)
    scores = np.zeros((len(prompts), len(codes)))

    def observe(number: int, batch: MicroBatch, result: TokenLosses) -> None:
        count_tokens(batch.tokens)
        losses = result.losses.double().cpu().numpy()
        for example, code, place in _read_codes(batch, codes):
            scores[cuts[number][0] + example, code] = -losses[place].sum()

    observe_batches(
        model,
        [end - start for start, end in cuts],
        lambda number: [as_example(asked[prompt], codes) for prompt in prompts[slice(*cuts[number])]],
        observe,
        planner=_eager(planner),
        device=device,
        reporter=reporter,
        label=label,
        should_stop=should_stop,
        processes=processes,
    )
    # Each prompt was scored by one process and is zero in the others, so these sums are exact.
    rows = dict(zip(prompts, processes.sum(scores).tolist(), strict=True))
    texts = labels.texts if isinstance(labels, WrittenLabels) else {label: label for label in labels}
    found = (
        (question, dict(zip(labels, rows[key], strict=True))) for question, key in zip(questions, keys, strict=True)
    )
    return [
        Answered(question, texts[max(scores, key=lambda label: scores[label])], label_scores=scores)
        for question, scores in found
    ]


def check_room(model: SupervisedPeftModel, prompt_tokens: int, labels: LabelIds, *, where: str) -> None:
    """Check that the model has positions for a prompt with the longest label behind it.

    Args:
        model: base with adapter.
        prompt_tokens: length of the prompt.
        labels: token ids by label; none need no room.
        where: what an error names.

    Raises:
        ModelError: it has not.
    """
    limit, longest = max_positions(model.language_model.config), max(map(len, labels.values()), default=0)
    # A label's last token is predicted, never read.
    if limit is not None and prompt_tokens + longest - 1 > limit:
        raise ModelError(
            f"prompt of {prompt_tokens} tokens and label of {longest}, but the model has {limit} positions",
            where=where,
            fix=f"set data.max_length: {limit - longest + 1} or less, or shorten the labels",
        )


def _keys(question: Question) -> tuple[int, ...]:
    """Return what tells a prompt's tokens from others: pictures of one size have the same ids."""
    if not question.images:
        return question.prompt_ids
    return tuple(token_keys(np.asarray(question.prompt_ids, dtype=np.int64), question.images).tolist())


def _eager(planner: Planner) -> Planner:
    """Return the planner for prompts with many short answers, which pay to be shared however short the prompt is."""
    return replace(planner, cost=replace(planner.cost, min_tokens=1))


def _cut(prompts: Sequence[tuple[int, ...]], batch_size: int) -> list[tuple[int, int]]:
    """Return start and end of batches of `batch_size` to twice as many prompts, cut where the least is shared.

    What two batches share is read twice.
    """
    shared = [0, *(_common(before, after) for before, after in pairwise(prompts)), 0]
    cuts = [0]
    while cuts[-1] < len(prompts):
        first = min(cuts[-1] + batch_size, len(prompts))
        last = min(cuts[-1] + 2 * batch_size, len(prompts))
        cuts.append(min(range(first, last + 1), key=lambda place: shared[place]))
    return list(pairwise(cuts))


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    differing = (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(first), len(second)))


def _read_codes(batch: MicroBatch, codes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int, slice]]:
    """Yield example, label number and place of the labels of each branch.

    A micro-batch tells which example a label belongs to, not which branch. The labels of a branch lie together and
    no label begins as another does, so they read as words of a code.
    """
    tokens, owners = batch.labels.tolist(), batch.label_examples.tolist()
    place = 0
    while place < len(tokens):
        number = next(n for n, code in enumerate(codes) if tuple(tokens[place : place + len(code)]) == code)
        end = place + len(codes[number])
        yield owners[place], number, slice(place, end)
        place = end
