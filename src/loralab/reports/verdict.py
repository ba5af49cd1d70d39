"""Whether the adapter helped, in words: by the loss and by the task, for page and model card.

Owns the headline, its sentence and what weakens it. Nothing is judged again here: the evaluation holds the verdicts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loralab.config.metric_facts import ALWAYS, FACTS, owner_of
from loralab.reports.curves import watched_figure
from loralab.reports.facts import Facts, dig, dig_list, dig_number, dig_table
from loralab.reports.wording import SPACE, decimals_of, format_count, format_loss, format_signed
from loralab.run import Json

FEW_ROWS = 30
# What these measure is not whether answers are right: beside others they can spoil a result, but not make it.
SIDE_METRICS = frozenset({"calibration", "stop_rate", "length", "repetition"})
Outcome = Literal["better", "worse", "mixed", "none", "unknown", "missing"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the adapter is better than the base model.

    Attributes:
        outcome: `mixed` where loss and task do not say the same, `none` when no difference was seen, `unknown` without
            an interval or a verdict, `missing` without an evaluation.
        headline: the answer in a few words.
        sentence: the difference with its interval.
        caveats: what weakens the result.
    """

    outcome: Outcome
    headline: str
    sentence: str
    caveats: tuple[str, ...] = ()


def assess(facts: Facts) -> Verdict:
    """Return whether the adapter helped, by the loss of both on the same rows and by the task, if measured."""
    by_loss = _assess_loss(facts)
    tasks = headline_figures(facts)
    return _with_task(by_loss, facts, tasks) if tasks and by_loss.outcome != "missing" else by_loss


def headline_figures(facts: Facts) -> list[str]:
    """Return the figures of the task that the headline goes by: the watched one first, then those metrics show first.

    Figures of the loss alone are left out, as are those that have no better direction or were not compared.
    """
    watched, compared = watched_figure(facts), dig_table(facts.evaluation, "differences")
    own = [name for name in compared if _is_headline(name)]
    first = [watched] if watched in compared and watched not in ALWAYS else []
    names = [name for name in dict.fromkeys([*first, *own]) if name is not None]
    return [name for name in names if _verdict_of(facts, name)]


def _is_headline(figure: str) -> bool:
    owner = owner_of(figure)
    if owner is None:
        return figure not in ALWAYS  # a function of the user's own
    facts = FACTS[owner]
    return facts.needs != "losses" and figure in facts.headline and facts.figures[figure] is not None


def _verdict_of(facts: Facts, figure: str) -> str:
    judged = str(dig(facts.evaluation, "differences", figure, "verdict") or "")
    if judged.startswith("no difference"):
        return "none"
    return judged if judged in ("better", "worse") else ""


def _with_task(by_loss: Verdict, facts: Facts, tasks: Sequence[str]) -> Verdict:
    """Return the verdict by loss and task: green only where neither says the other way and one of them is better."""
    verdicts = {name: _verdict_of(facts, name) for name in tasks}
    better, worse, alike = ([n for n in tasks if verdicts[n] == kind] for kind in ("better", "worse", "none"))
    deciding = _deciding(facts, tasks)
    won = any(name in deciding for name in better)
    task: Outcome = "mixed" if better and worse else "better" if won else "worse" if worse else "none"
    if task == "none":
        alike = [name for name in deciding if name in alike]
        said = [f"no difference seen in {_listed(alike)}" + (f" ({_named(better)} better)" if better else "")]
    else:
        said = [f"{_named(names)} {kind}" for names, kind in ((better, "better"), (worse, "worse")) if names]
    outcome, opening = _COMBINED.get((by_loss.outcome, task), ("unknown", ""))
    loss = _loss_words(by_loss, facts)
    if outcome == "mixed" and task in ("better", "worse"):
        text = f"{loss}, but {said[0]}"
    elif by_loss.outcome == "none" and task != "none":
        text = f"{', '.join(said)}; {loss}"
    elif task == "none" and by_loss.outcome == "none":
        text = f"{said[0]}, nor in the loss"
    else:
        text = f"{loss}{'; ' if task == 'none' or by_loss.outcome == 'unknown' else ', '}{', '.join(said)}"
    headline = f"{opening}: {text}" if opening else f"{text[:1].upper()}{text[1:]}"
    return replace(by_loss, outcome=outcome, headline=headline)


# By the loss, by the task -> the whole and the word that it begins with. A lower loss alone is no better answer.
_COMBINED: dict[tuple[Outcome, Outcome], tuple[Outcome, str]] = {
    ("better", "better"): ("better", "Yes"),
    ("better", "worse"): ("mixed", "Mixed"),
    ("better", "mixed"): ("mixed", "Mixed"),
    ("better", "none"): ("mixed", ""),
    ("worse", "better"): ("mixed", "Mixed"),
    ("worse", "worse"): ("worse", "No"),
    ("worse", "mixed"): ("mixed", "Mixed"),
    ("worse", "none"): ("worse", "No"),
    ("none", "better"): ("better", "Yes"),
    ("none", "worse"): ("worse", "No"),
    ("none", "mixed"): ("mixed", "Mixed"),
    ("none", "none"): ("none", ""),
}


def _deciding(facts: Facts, tasks: Sequence[str]) -> list[str]:
    """Return the figures of which one must be better: the watched one, else those of right answers."""
    watched = watched_figure(facts)
    if watched is not None and watched in tasks:
        return [watched]
    return [name for name in tasks if owner_of(name) not in SIDE_METRICS] or list(tasks)


def _loss_words(by_loss: Verdict, facts: Facts) -> str:
    if by_loss.outcome == "unknown":
        return by_loss.headline
    if by_loss.outcome == "none":
        return "no difference seen in the loss"
    split = dig(facts.evaluation, "split")
    where = f"on the {split} split" if split else "on the evaluated rows"
    return f"loss {where} is {'lower' if by_loss.outcome == 'better' else 'higher'}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _named(names: Sequence[str]) -> str:
    return f"{_listed(names)} {'are' if len(names) > 1 else 'is'}"


def _assess_loss(facts: Facts) -> Verdict:
    evaluation = facts.evaluation
    change = dig_number(evaluation, "difference", "eval_loss")
    if change is None:
        return _not_measured(facts)
    low, high = dig_number(evaluation, "difference", "low"), dig_number(evaluation, "difference", "high")
    split = dig(evaluation, "split")
    where = f"on the {split} split" if split else "on the evaluated rows"
    rows = dig_number(evaluation, "num_examples")
    counted = f", {format_count(rows)} row{'' if rows == 1 else 's'}" if rows is not None else ""
    caveats = tuple(_caveats(facts, rows))
    direction = "lower" if change < 0 else "higher"
    if low is None or high is None:
        sentence = f"Loss is {direction} by {format_loss(abs(change))} nats per token; there is no interval{counted}."
        return Verdict("unknown", f"Loss {where} is {direction}; how sure that is was not measured", sentence, caveats)
    return _judged(evaluation, change, low, high, where=where, counted=counted, caveats=caveats)


def _judged(
    evaluation: Json, change: float, low: float, high: float, *, where: str, counted: str, caveats: tuple[str, ...]
) -> Verdict:
    """Return the verdict that the evaluation holds, in words; it is not judged again here."""
    level = f"{100 * (dig_number(evaluation, 'difference', 'level') or 0.95):.4g}{SPACE}% interval"
    decimals = decimals_of(high - low)
    direction = "lower" if change < 0 else "higher"
    said = f"Loss is {direction} by {abs(change):.{decimals}f} nats per token"
    judged = str(dig(evaluation, "difference", "verdict") or "")
    if judged in ("better", "worse"):
        near, far = sorted((abs(low), abs(high)))
        sentence = f"{said} ({level} {near:.{decimals}f} to {far:.{decimals}f}{counted})."
        headline = f"Yes: loss {where} is lower"
        if judged == "worse":
            headline = f"No: loss {where} is higher than the base model\u2019s"
        return Verdict("better" if judged == "better" else "worse", headline, sentence, caveats)
    span = f"{level} of the change from {format_signed(low, decimals)} to {format_signed(high, decimals)}{counted}"
    if low <= 0 <= high:
        return Verdict("none", "No difference seen", f"{said}, within chance: {span}.", caveats)
    if judged:
        why = str(dig(evaluation, "difference", "reason") or "the tests do not agree")
        return Verdict("none", "No difference seen", f"{said}, which may be chance: {why}; {span}.", caveats)
    # A record of an earlier version: an interval alone does not decide.
    headline = f"Loss {where} is {direction}; whether by more than chance was not judged"
    return Verdict("unknown", headline, f"{said}; {span}.", caveats)


def _caveats(facts: Facts, rows: float | None) -> list[str]:
    split = dig(facts.evaluation, "split")
    training = dig(facts.config, "training") or {}
    caveats = []
    if split == "train":
        caveats.append("These rows were trained on: this shows fit, not how new rows are answered.")
    if split == "validation" and (dig(training, "load_best_model_at_end") or dig(training, "early_stopping")):
        caveats.append(
            "The same rows chose when to stop or which checkpoint to keep, which flatters the adapter a bit."
        )
    if rows is not None and 1 < rows < FEW_ROWS:  # of one row there is no interval
        caveats.append(f"Few rows ({format_count(rows)}): the interval is rough.")
    return [*caveats, *_one_answer_caveats(facts)]


def _one_answer_caveats(facts: Facts) -> Iterator[str]:
    """Yield, for each metric, that a side gives one and the same answer to every row."""
    for metric in dig_table(facts.evaluation, "details"):
        ours, theirs = (
            _only_answer(dig_table(side, "details", metric))
            for side in (facts.evaluation, dig_table(facts.evaluation, "base"))
        )
        if ours is not None and ours == theirs:
            yield f"Base model and adapter both answer {ours} to every row ({metric})."
        elif ours is not None:
            yield f"The adapter answers {ours} to every row ({metric})."


def _only_answer(details: Json) -> str | None:
    """Return the one answer that every row got, or None where there are several, or one row."""
    columns, counts = dig_list(details, "columns"), dig_list(details, "confusion_matrix")
    if not all(isinstance(row, list) and len(row) == len(columns) for row in counts):
        return None
    numbers = [[n if isinstance(n, int) else 0 for n in row] for row in counts]
    sums = [sum(row[place] for row in numbers) for place in range(len(columns))]
    used = [place for place, total in enumerate(sums) if total]
    if len(used) != 1 or sums[used[0]] < 2:
        return None
    answer = columns[used[0]]
    # The last column holds what is none of the classes: many answers, that have nothing in common but that.
    return f"\u201c{answer}\u201d" if answer in dig_list(details, "classes") or used[0] < len(columns) - 1 else None


def _not_measured(facts: Facts) -> Verdict:
    status = facts.record.get("status")
    data = dig(facts.config, "data")
    if facts.evaluation:
        why = "The evaluation holds no finite difference between adapter and base model."
    elif status in ("interrupted", "failed", "running"):
        why = f"The run has no final evaluation; its status is \u201c{status}\u201d."
    elif data and dig(data, "validation") is None and dig(data, "test") is None:
        why = "The run has no validation and no test data."
    else:
        why = "There is no evaluation.json in the run folder; `loralab eval` writes one."
    return Verdict("missing", "Not measured", why)
