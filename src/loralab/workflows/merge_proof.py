"""The proof of a merge: the merged model, read from disk, answers as the live adapter does.

Owns what is asked, what is kept of the live adapter while it is not in memory, and the bars.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from loralab.data.example import Message, PlacedImage
from loralab.data.images.processor import PictureProcessor
from loralab.errors import LoralabError, MergeParityError
from loralab.evaluation.answers import Question
from loralab.evaluation.distances import DISTANCES, measure_distances
from loralab.evaluation.generate import GenerationSettings, answer_questions
from loralab.evaluation.probe_texts import PROBE_TEXTS
from loralab.evaluation.questions import spread
from loralab.models.load import max_positions
from loralab.progress import Reporter
from loralab.run import read_json
from loralab.workflows.evaluate import find_split
from loralab.workflows.session import Session

MOST_ROWS = 32
NEW_TOKENS = 16
# Most positions of a row, and most logits that are kept of all rows (256 MiB).
_POSITIONS, _KEPT = 16, 2**26
# Of a text without a prompt, so many tokens stand where a prompt would.
_BEGINNING = 8
_CANDIDATES = 8  # tokens of a place whose logits are kept
_AT_ONCE = 4  # positions in float64
# The bars, by the type of the merged weights.
LOGITS_BAR = 1e-4  # of the standard deviation of the live logits
LEAST_KL, KL_SHARE, LEAST_AGREEMENT = 1e-4, 0.01, 0.99
_KL_FIRST_SECOND = list(DISTANCES).index("kl_base_adapter")
_KINDS = "mm_token_type_ids"
# What the figures are, for `merge.json`.
DEFINITIONS = {
    "kl": "mean over the compared positions, in nats",
    "greedy_agreement": "share of the places of the adapter's own greedy answers at which the merged model chooses "
    "the same token, or one whose logit in the adapter is within two steps of the type of the largest: a tie",
    "greedy_agreement_strict": "the same without ties",
    "logits": "differences are at the compared positions; the standard deviation is that of the adapter's logits",
}


@dataclass(frozen=True, slots=True)
class ProofRow:
    """What both models read.

    Attributes:
        ids: token ids of prompt and answer.
        positions: where their logits are compared.
        prompt: token ids that an answer is generated to.
        images: pictures of the row.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    prompt: tuple[int, ...]
    images: Sequence[PlacedImage] = ()


@dataclass(slots=True)
class LiveAnswers:
    """What is kept of a live adapter.

    Attributes:
        logits: at the positions of each row (n, V), float32.
        answers: token ids of its greedy answer to each prompt.
        choices: the most likely tokens at each place of that answer, and their logits.
        kl_adapter_base: mean KL(adapter || base), nats.
    """

    logits: list[Tensor]
    answers: list[tuple[int, ...]]
    choices: list[tuple[Tensor, Tensor]]
    kl_adapter_base: float

    @property
    def spread(self) -> float:
        """Standard deviation of the logits."""
        return float(torch.cat([each.flatten() for each in self.logits]).double().std())


def find_rows(session: Session, reporter: Reporter) -> tuple[str, list[ProofRow]]:
    """Return what base and adapter are compared on, and what that is in words.

    Args:
        session: the live adapter.
        reporter: told of it.
    """
    name, rows = "", list[ProofRow]()
    if session.target.folder is not None:
        try:
            name, rows = _held_out(session, reporter)
        except LoralabError as error:  # the data may be gone or have changed since; the adapter can still be asked
            reporter.say(f"the run's own rows cannot be read ({error.problems[0].what}): built-in prompts instead")
    if not rows:
        golden = _golden(session)
        name = "golden prompts and built-in texts" if golden else "built-in texts"
        rows = list(_built_in(session, golden))
    vocabulary = session.model.vocabulary
    most = max(1, min(_POSITIONS, _KEPT // vocabulary // max(len(rows), 1)))
    rows = [replace(row, positions=tuple(row.positions[at] for at in spread(len(row.positions), most))) for row in rows]
    reporter.say(f"compared on {len(rows)} rows: {name}")
    return name, rows


def _held_out(session: Session, reporter: Reporter) -> tuple[str, list[ProofRow]]:
    evaluation = session.config.evaluation.model_copy(update={"split": "train"})
    asking = replace(session, config=session.config.model_copy(update={"evaluation": evaluation}))
    splits = find_split(asking, None, None, reporter).data.splits
    name = next((each for each in ("test", "validation") if len(splits.get(each, ()))), "train")
    split = splits[name]
    words = f"{name} split" + (", since the run held no rows out" if name == "train" else "")
    rows = []
    for index in spread(len(split), MOST_ROWS):
        branch = split[index].branches[-1]
        prompt, answer = branch.prompt_ids.tolist(), branch.answer_ids.tolist()
        ids = (*prompt, *answer)
        positions = tuple(range(len(prompt) - 1, len(ids) - 1))
        asked = tuple(prompt) if len(prompt) > 1 else ids[:_BEGINNING]
        rows.append(ProofRow(ids, positions, asked, tuple(branch.images)))
    return words, rows


def _golden(session: Session) -> list[tuple[int, ...]]:
    """Return the ids of the prompts that the adapter's contract fixes; it need not have one."""
    if session.template in (None, "none"):
        return []
    contract = read_json(session.target.adapter / "prompt_contract.json")
    return [tuple(session.prompter.encode_prompt([Message("user", each["prompt"])])) for each in contract["golden"]]


def _built_in(session: Session, asked: Sequence[tuple[int, ...]]) -> Iterator[ProofRow]:
    prompter, limit = session.prompter, max_positions(session.model.language_model.config)
    texts = [tuple(ids) for ids in prompter.encode(PROBE_TEXTS)]
    for number, ids in enumerate((*asked, *texts)):
        kept = ids[: limit and limit - NEW_TOKENS]
        if len(kept) < 2:
            continue
        whole = number < len(asked)
        yield ProofRow(kept, tuple(range(len(kept))), kept if whole else kept[:_BEGINNING])


def ask_live(session: Session, rows: Sequence[ProofRow], reporter: Reporter, *, compared: bool = True) -> LiveAnswers:
    """Return what a live adapter answers.

    Args:
        session: the live adapter, all adapters of the merge active.
        rows: what it reads.
        reporter: told of progress.
        compared: whether its base is asked too.
    """
    model, pictures = session.model, session.prompter.pictures
    questions = [Question(n, n, 0, row.prompt, (), "", "", tuple(row.images)) for n, row in enumerate(rows)]
    answers = answer_questions(
        model,
        questions,
        prompter=session.prompter,
        settings=GenerationSettings(max_new_tokens=NEW_TOKENS),
        batch_size=session.config.evaluation.batch_size,
        reporter=reporter,
        label="answer with adapter",
    )
    found = LiveAnswers([], [answer.ids for answer in answers], [], 0.0)
    total, count = 0.0, 0
    for number, row in enumerate(rows, start=1):
        live = _logits(model, row, row.positions, pictures)
        found.logits.append(live)
        found.choices.append(_choices(model, row, found.answers[number - 1], pictures))
        if compared:
            with model.disable_adapter():
                base = _logits(model, row, row.positions, pictures)
            total += _divergence(live, base)
            count += len(live)
        reporter.progress("live adapter", number, len(rows))
    reporter.finish("live adapter")
    found.kl_adapter_base = total / max(count, 1)
    return found


def _logits(
    model: Any, row: ProofRow, positions: Sequence[int], pictures: PictureProcessor | None, ids: Sequence[int] = ()
) -> Tensor:
    """Return a model's logits at positions of a row (n, V), float32 on the CPU.

    Args:
        model: merged model, or base with adapter.
        row: what it reads, pictures included.
        positions: where.
        pictures: reads the row's pictures.
        ids: read these instead of the row's.
    """
    inner = getattr(model, "language_model", model) if hasattr(model, "peft_config") else model
    accepted = inspect.signature(type(inner).forward).parameters
    device = inner.get_input_embeddings().weight.device
    tokens = torch.tensor([list(ids or row.ids)], device=device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    if row.images and pictures is not None:
        made = pictures.join([pictures.read([image.file]) for image in row.images])
        inputs |= {name: value.to(device) for name, value in made.items()}
        if _KINDS in accepted:
            inputs[_KINDS] = (tokens == pictures.token).to(torch.int64)
    places = torch.tensor(list(positions), device=device)
    gathers = "logits_to_keep" in accepted
    if gathers:
        inputs["logits_to_keep"] = places
    with torch.no_grad():
        found = cast(Tensor, model(**inputs).logits)[0]
    return (found if gathers else found[places]).float().cpu()


def _choices(
    model: Any, row: ProofRow, answer: Sequence[int], pictures: PictureProcessor | None
) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens at each place of an answer, the one that ends it included, and their logits."""
    first = len(row.prompt) - 1
    places = range(first, first + min(len(answer) + 1, NEW_TOKENS))
    found = _logits(model, row, places, pictures, (*row.prompt, *answer))
    values, tokens = found.topk(min(_CANDIDATES, found.shape[-1]), dim=-1)
    return tokens, values


def _agree(live: tuple[Tensor, Tensor], merged: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[int, int]:
    """Return at how many places both choose one token: strictly, and where the live one's type tells them apart.

    Two logits of each model are rounded to the type: a lead of less than two steps of it is rounding, not a choice.
    """
    tokens, values = live
    chosen, best = merged[0][:, :1], values[:, :1]
    close = values >= best - 2 * torch.finfo(dtype).eps * best.abs()
    strict = tokens[:, :1] == chosen
    equal = ((tokens == chosen) & close).any(dim=-1, keepdim=True)
    return int(strict.sum()), int((strict | equal).sum())


def _divergence(first: Tensor, second: Tensor) -> float:
    """Return the sum of KL(first || second) over positions, nats."""
    width = min(first.shape[-1], second.shape[-1])
    chunks = zip(first[:, :width].split(_AT_ONCE), second[:, :width].split(_AT_ONCE), strict=True)
    return float(sum(measure_distances(a, b)[_KL_FIRST_SECOND].sum() for a, b in chunks))


def compare_merged(
    merged: Any,
    rows: Sequence[ProofRow],
    live: LiveAnswers,
    *,
    dtype: torch.dtype,
    pictures: PictureProcessor | None,
    where: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return how far a merged model is from what a live adapter answered.

    Args:
        merged: the model, as transformers loads it.
        rows: what the live adapter read.
        live: what it answered.
        dtype: that both computed in.
        pictures: reads pictures.
        where: the adapter, for an error.
        reporter: told of progress.

    Raises:
        MergeParityError: the merged model computes no numbers.
    """
    largest, divergence, strict, equal, places, count, spare = 0.0, 0.0, 0, 0, 0, 0, 0
    for number, (row, logits, answer, choices) in enumerate(
        zip(rows, live.logits, live.answers, live.choices, strict=True), start=1
    ):
        own = _logits(merged, row, row.positions, pictures)
        if not torch.isfinite(own).all():
            raise _not_alike(["it gives logits that are no finite numbers"], where)
        spare = max(spare, abs(own.shape[-1] - logits.shape[-1]))
        width = min(own.shape[-1], logits.shape[-1])
        largest = max(largest, float((own[:, :width] - logits[:, :width]).abs().max()))
        divergence += _divergence(logits, own)
        count += len(own)
        same, alike = _agree(choices, _choices(merged, row, answer, pictures), dtype)
        strict, equal, places = strict + same, equal + alike, places + len(choices[0])
        reporter.progress("merged model", number, len(rows))
    reporter.finish("merged model")
    deviation = live.spread
    return {
        "rows": len(rows),
        "positions": count,
        "max_logit_difference": largest,
        "logit_standard_deviation": deviation,
        "relative_logit_difference": largest / deviation if deviation else largest,
        "kl_adapter_merged": divergence / max(count, 1),
        "kl_adapter_base": live.kl_adapter_base,
        "greedy_agreement": equal / max(places, 1),
        "greedy_agreement_strict": strict / max(places, 1),
        "greedy_tokens": places,
        "vocabulary_difference": spare,
    }


def bars_of(figures: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Return the bars that a merge has to hold.

    Args:
        figures: as `compare_merged` has them.
        dtype: of the merged weights.
    """
    if dtype == torch.float32:
        return {"max_logit_difference": LOGITS_BAR * figures["logit_standard_deviation"]}
    return {
        "kl_adapter_merged": max(LEAST_KL, KL_SHARE * figures["kl_adapter_base"]),
        "greedy_agreement": LEAST_AGREEMENT,
    }


def check_bars(figures: dict[str, Any], bars: dict[str, float], where: str) -> None:
    """Check that the figures of a merge hold its bars.

    Raises:
        MergeParityError: one does not; what was written is to be removed.
    """
    failed = []
    for name, bar in bars.items():
        value = figures[name]
        at_least = name == "greedy_agreement"
        holds = value >= bar if at_least else value <= bar
        if not holds:  # also where it is no number
            failed.append(f"{name} {value:.3g}, {'at least' if at_least else 'at most'} {bar:.3g} is allowed")
    if figures["vocabulary_difference"]:
        failed.append(f"{figures['vocabulary_difference']} logits more or fewer than the live model has")
    if failed:
        raise _not_alike(failed, where)


def _not_alike(failed: Sequence[str], where: str) -> MergeParityError:
    return MergeParityError(
        f"the merged model does not answer as the adapter does: {'; '.join(failed)}",
        where=where,
        fix="nothing was kept; try --dtype float32, which rounds least, or use the adapter as it is",
    )
