"""What was asked and what a model made of it: the evidence that metrics are measured on.

Owns the records alone. They come from `generate.py`, `score.py` and `teacher_forced.py`, three ways
of answering whose figures must never be mixed, and go to `metrics/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.config.metric_facts import Way
from loralab.data.example import PlacedImage
from loralab.evaluation.perplexity import FloatArray, SplitLoss


@dataclass(frozen=True, slots=True)
class Question:
    """One trained turn: a prompt, and the answer that the data has for it.

    Attributes:
        unit: index of its row within the rows that are measured; turns of one row share it.
        row: 1-based number of the row in its source.
        source: index of the source in the data report.
        prompt_ids: token ids of the prompt; at least one.
        reference_ids: token ids of the answer, stop token included.
        prompt: the prompt as text, as it is sent.
        reference: the answer as text, without its stop token.
        images: pictures in the prompt, in order.
    """

    unit: int
    row: int
    source: int
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    prompt: str
    reference: str
    images: tuple[PlacedImage, ...] = ()


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and a model's answer.

    Attributes:
        question: what was asked.
        text: the answer, without a stop token: generated, the most likely label, or the most likely
            token behind each of the reference's own tokens.
        ids: token ids of a generated answer, without its stop token; empty where none was generated.
        stopped: whether a generated answer ended by a stop token; None where none was generated.
        label_scores: log-probability of each closed label given the prompt, nats; None but for `score`.
    """

    question: Question
    text: str
    ids: tuple[int, ...] = ()
    stopped: bool | None = None
    label_scores: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that one model's metrics are measured on.

    Attributes:
        units: number of rows that are measured (examples).
        way: how the answers came about, or None where there are none.
        answers: in the order of the questions; empty where no metric needs any.
        losses: of the same rows, or None where no metric needs them.
        answer_bytes: UTF-8 bytes of the supervised text of each row (examples); with `losses`.
        answer_words: its blank-separated words (examples); with `losses`.
    """

    units: int
    way: Way | None = None
    answers: Sequence[Answered] = ()
    losses: SplitLoss | None = None
    answer_bytes: FloatArray | None = None
    answer_words: FloatArray | None = None
