"""Answers: batched generation from prompt ids, stopped by the prompt's own stop tokens.

Owns generation settings; the prompts come from the `Prompter` (or from tokenized rows, which
came from it).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast, overload

import torch
from torch import Tensor
from transformers import GenerationConfig

from loralab.config.schema import EvaluationConfig
from loralab.data.example import PlacedImage
from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError, ModelError
from loralab.evaluation.answers import Answered, Question
from loralab.evaluation.forwards import Interrupted
from loralab.evaluation.prompt_pictures import PictureInputs, Prompts
from loralab.models.load import max_positions
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes

# Of prompts with less room, so many are named.
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: without the stop token.
        stopped: whether it ended by a stop token, not by the length limit.
        tokens: number of generated tokens, stop token included.
    """

    text: str
    stopped: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to generate.

    Attributes:
        max_new_tokens: longest answer, in tokens; None takes the run's own limit.
        temperature: 0 takes the most likely token (greedy).
        top_p: nucleus of the sampled tokens, 0 to 1.
        seed: of sampling.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def longest(self) -> int:
        """Longest answer, in tokens, where the model has positions for it."""
        return self.max_new_tokens or EvaluationConfig().max_new_tokens


def generate_answers(
    model: SupervisedPeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    images: Sequence[Sequence[PlacedImage]] | None = None,
    prompter: Prompter,
    settings: GenerationSettings,
    batch_size: int,
    reporter: Reporter,
    label: str = "generate",
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> list[Answer]:
    """Answer prompts; torch's random state is left as it was.

    Several processes take the batches in turn, and all of them know all answers in the end.

    Args:
        model: base with adapter (call within `model.disable_adapter()` for the base).
        prompts: prompt token ids, one list per prompt.
        images: pictures of each prompt, or None where none has any.
        prompter: knows stop tokens and decoding.
        settings: how to generate.
        batch_size: prompts at a time.
        reporter: told of progress.
        label: name of the stage.
        should_stop: asked before every batch, in every process; they must agree.
        processes: those that share the work.

    Returns:
        One answer per prompt, in order.

    Raises:
        DataError: a prompt has no tokens, or a picture cannot be decoded.
        ModelError: a prompt is longer than the model's positions, or the model reads no pictures.
        Interrupted: `should_stop` answered yes.
    """
    places = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    rooms = _fit_positions(model, prompts, settings, places)
    _tell_short(model, rooms, settings, places=places, reporter=reporter)
    work = _Work(model, prompter, settings, reporter, label, should_stop, processes)
    asked = Prompts(prompts) if images is None else Prompts(prompts, images.__getitem__)
    return [read_answer(ids, prompter) for ids in work.generate(asked, rooms, batch_size)]


def answer_questions(
    model: SupervisedPeftModel,
    questions: Sequence[Question],
    *,
    prompter: Prompter,
    settings: GenerationSettings,
    batch_size: int,
    reporter: Reporter,
    label: str = "generate",
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> list[Answered]:
    """Answer questions, for metrics; arguments, returned order and errors are those of `generate_answers`.

    Answers with less room than asked for are not told of: see `tell_short_rooms`.
    """
    prompts = Prompts(_PromptsOf(questions), lambda number: questions[number].images)
    rooms = _fit_positions(model, prompts.ids, settings, [f"row {question.row}" for question in questions])
    work = _Work(model, prompter, settings, reporter, label, should_stop, processes)
    written = work.generate(prompts, rooms, batch_size)
    answers = [read_answer(ids, prompter) for ids in written]
    return [
        Answered(question, answer.text, ids=tuple(ids[: answer.tokens - answer.stopped]), stopped=answer.stopped)
        for question, ids, answer in zip(questions, written, answers, strict=True)
    ]


class _PromptsOf(Sequence[Sequence[int]]):
    """The prompts of questions, each read when it is asked for: all of them together may be large."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions

    def __len__(self) -> int:
        return len(self._questions)

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, index: slice) -> "_PromptsOf": ...
    def __getitem__(self, index: int | slice) -> "Sequence[int] | _PromptsOf":
        if isinstance(index, slice):
            return _PromptsOf(self._questions[index])
        return self._questions[index].prompt_ids


@dataclass(frozen=True, slots=True)
class _Work:
    """All that generating a list of prompts needs but the prompts; fields as in `generate_answers`."""

    model: SupervisedPeftModel
    prompter: Prompter
    settings: GenerationSettings
    reporter: Reporter
    label: str
    should_stop: Callable[[], bool]
    processes: Processes

    def generate(self, prompts: Prompts, rooms: Sequence[int], batch_size: int) -> list[list[int]]:
        """Return the generated ids behind each prompt, at most `rooms` each, what follows a stop token included."""
        asked = _asked_once(prompts, self.settings)
        distinct = sorted(set(asked))
        batches = _batches({index: (rooms[index], len(prompts.ids[index])) for index in distinct}, batch_size)
        pictures = PictureInputs(self.model, self.prompter.pictures)
        was_training = self.model.training
        self.model.eval()
        made: dict[int, list[int]] = {}
        done = 0
        try:
            # Not in inference mode: what a model caches there, training could not use afterwards.
            with torch.no_grad(), _random_state_kept(self.model.embedding.weight.device):
                for first in range(0, len(batches), self.processes.count):
                    if self.should_stop():
                        raise Interrupted
                    number = first + self.processes.rank
                    if number < len(batches):
                        seed = self.settings.seed + number
                        made |= self._generate_batch(prompts, *batches[number], pictures=pictures, seed=seed)
                    elif self.processes.lockstep:  # the others' forwards need this process's part of the base
                        self._generate_batch(prompts, *batches[first], pictures=pictures, seed=self.settings.seed)
                    done += sum(len(batch) for _, batch in batches[first : first + self.processes.count])
                    self.reporter.progress(self.label, done, len(distinct))
        finally:
            self.model.train(was_training)
        self.reporter.finish(self.label)
        found = {index: ids for share in self.processes.gather(made) for index, ids in share.items()}
        return [found[index] for index in asked]

    def _generate_batch(
        self, prompts: Prompts, room: int, batch: Sequence[int], *, pictures: PictureInputs, seed: int
    ) -> dict[int, list[int]]:
        torch.manual_seed(seed)  # one per batch, so that no process draws what another one does
        device = self.model.embedding.weight.device
        ids, mask = pad_left([prompts.ids[index] for index in batch], pad=self.prompter.stop.ids[0])
        out = cast(Callable[..., Tensor], self.model.generate)(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            **pictures.read(ids, [prompts.images(index) for index in batch]),
            generation_config=build_generation_config(replace(self.settings, max_new_tokens=room), self.prompter),
            **({"synced_gpus": True} if self.processes.lockstep else {}),  # as many steps as the longest answer takes
        )
        return dict(zip(batch, out[:, ids.shape[1] :].tolist(), strict=True))


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's random states as they were: what is drawn after an evaluation is drawn without one."""
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    if apple is not None:
        torch.mps.set_rng_state(apple)


def _asked_once(prompts: Prompts, settings: GenerationSettings) -> list[int]:
    """Return for each prompt the index of the one whose answer is its own: greedy answers depend on nothing else."""
    if settings.temperature > 0:
        return list(range(len(prompts.ids)))
    first: dict[bytes, int] = {}
    return [first.setdefault(prompts.digest(index), index) for index in range(len(prompts.ids))]


def tell_short_rooms(
    model: SupervisedPeftModel, questions: Sequence[Question], *, settings: GenerationSettings, reporter: Reporter
) -> None:
    """Say in one line which answers may have fewer tokens than asked for: once, not for every side and evaluation.

    Args:
        model: whose positions end them.
        questions: what is asked.
        settings: how to generate.
        reporter: told of it.

    Raises:
        DataError: a prompt has no tokens.
        ModelError: a prompt is longer than the model's positions.
    """
    places = [f"row {question.row}" for question in questions]
    rooms = _fit_positions(model, _PromptsOf(questions), settings, places)
    _tell_short(model, rooms, settings, places=places, reporter=reporter)


def _fit_positions(
    model: SupervisedPeftModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    places: Sequence[str],
) -> list[int]:
    """Return for each prompt how many tokens its answer may have."""
    wanted = settings.longest
    return [answer_room(model, prompt, wanted, where=place) for prompt, place in zip(prompts, places, strict=True)]


def _tell_short(
    model: SupervisedPeftModel,
    rooms: Sequence[int],
    settings: GenerationSettings,
    *,
    places: Sequence[str],
    reporter: Reporter,
) -> None:
    wanted = settings.longest
    short = [number for number, room in enumerate(rooms) if room < wanted]
    if not short:
        return
    named = list(dict.fromkeys(places[number] for number in short))
    shown = ", ".join(named[:_NAMED]) + (", ..." if len(named) > _NAMED else "")
    reporter.say(
        f"max_new_tokens {wanted} -> {min(rooms)} at the least for {len(short)} of {len(rooms)} prompts ({shown}): "
        f"the model has {max_positions(model.language_model.config)} positions"
    )


def answer_room(model: SupervisedPeftModel, prompt: Sequence[int], wanted: int, *, where: str) -> int:
    """Return how many tokens the answer to a prompt may have: `wanted`, or the positions that are left.

    Raises:
        DataError: the prompt has no tokens.
        ModelError: it leaves no position for an answer.
    """
    if not len(prompt):
        raise DataError(
            "empty prompt: the template makes no token of it",
            where=where,
            fix="give it some text, or a system message",
        )
    limit = max_positions(model.language_model.config)
    room = wanted if limit is None else min(wanted, limit - len(prompt))
    if room < 1:
        raise ModelError(
            f"prompt of {len(prompt)} tokens, but the model has {limit} positions", where=where, fix="shorten it"
        )
    return room


def _batches(prompts: Mapping[int, tuple[int, int]], batch_size: int) -> list[tuple[int, list[int]]]:
    """Return room and prompt numbers of each batch.

    A prompt with less room never shortens another's answer; prompts of about one length meet, so that
    little is padded, the longest first: where memory does not suffice, that shows at once.

    Args:
        prompts: room and length of each prompt, by its number.
        batch_size: most prompts of a batch.
    """
    batches = []
    for room in sorted({room for room, _ in prompts.values()}, reverse=True):
        members = [number for number, (own, _) in prompts.items() if own == room]
        members.sort(key=lambda number: -prompts[number][1])
        batches += [(room, members[start : start + batch_size]) for start in range(0, len(members), batch_size)]
    return batches


def pad_left(prompts: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B, L) of prompts that end together: generation goes on at the right.

    Args:
        prompts: token ids of each.
        pad: id of what stands before the shorter ones, which the mask hides.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, longest - len(prompt) :] = torch.as_tensor(list(prompt), dtype=torch.int64)
        mask[index, longest - len(prompt) :] = 1
    return ids, mask


def build_generation_config(settings: GenerationSettings, prompter: Prompter) -> GenerationConfig:
    """Return the settings in the form that `generate` takes, with the prompt's own stop tokens."""
    sampling = (
        {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature > 0 else {}
    )
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        eos_token_id=list(prompter.stop.ids),
        pad_token_id=prompter.stop.ids[0],
        use_cache=True,
        **sampling,
    )


def read_answer(ids: Sequence[int], prompter: Prompter) -> Answer:
    """Return the answer that generated ids hold: up to the first stop token."""
    end = next((position for position, token in enumerate(ids) if token in prompter.stop.ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(prompter.decode(kept), end is not None, len(kept) + (end is not None))
