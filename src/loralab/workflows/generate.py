"""The `generate` command: answers to prompts, under the adapter's prompt contract."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loralab.data.example import Message
from loralab.data.prompts.prompter import Prompter
from loralab.errors import ConfigError, DataError, Problem
from loralab.evaluation.generate import GenerationSettings, generate_answers
from loralab.progress import Reporter
from loralab.workflows.given_pictures import check_sight, look_at_given
from loralab.workflows.prompts import check_texts, user_turn
from loralab.workflows.session import PROMPT_SETTINGS, Session, open_session

_READ = (*PROMPT_SETTINGS, "evaluation.batch_size", "evaluation.max_new_tokens")
_IMAGE = "option --image"


def generate(
    path: Path,
    prompts: Sequence[str],
    *,
    settings: GenerationSettings,
    system: str | None = None,
    with_base: bool = False,
    images: Sequence[str] = (),
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Answer prompts with an adapter, and with its base beside it when asked.

    Args:
        path: run folder or adapter folder.
        prompts: user turns.
        settings: how to generate.
        system: system message put before every prompt; None takes the one of the prompt contract,
            if there is one, and an empty text none.
        with_base: whether the base answers too.
        images: files of pictures that every prompt begins with.
        overrides: `section.key=value` on top of the run's configuration.
        base_model: base to use instead of the recorded one.
        reporter: told of progress.

    Returns:
        For each prompt `prompt`, `images` where there are any, `prompt_text` (as the template renders it, one marker
        for each picture), `adapter` and, with `with_base`, `base`: `text`, `stopped` and `tokens`.

    Raises:
        UserError: a setting or prompt cannot be used, or the adapter does not load.
    """
    check_sampling(settings)
    check_texts(prompts, system)
    shown = look_at_given(images, where=_IMAGE)
    session = open_session(path, overrides=overrides, base_model=base_model, reporter=reporter, reads=_READ)
    if shown:
        check_sight(session.prompter, where=_IMAGE)
    if settings.max_new_tokens is None:
        settings = replace(settings, max_new_tokens=session.config.evaluation.max_new_tokens)
    chosen = resolve_system(session, system, reporter)
    before = [Message("system", chosen)] if chosen else []
    conversations = [[*before, user_turn(prompt, shown)] for prompt in prompts]
    requests = [session.prompter.encode_request(messages) for messages in conversations]

    def answer(label: str, who: str) -> list[dict[str, Any]]:
        answers = generate_answers(
            session.model,
            [ids for ids, _ in requests],
            images=[placed for _, placed in requests],
            prompter=session.prompter,
            settings=settings,
            batch_size=session.config.evaluation.batch_size,
            reporter=reporter,
            label=label,
        )
        cut = sum(not each.stopped for each in answers)
        if cut:
            limit = f"max_new_tokens ({settings.max_new_tokens})"
            reporter.say(f"{cut} of {len(answers)} answers{who} ended at {limit}, not by a stop token")
        return [asdict(each) for each in answers]

    results = [
        {
            "prompt": prompt,
            **({"images": list(images)} if images else {}),
            "prompt_text": session.prompter.render(messages, add_generation_prompt=True),
            "adapter": a,
        }
        for prompt, messages, a in zip(prompts, conversations, answer("generate", ""), strict=True)
    ]
    if with_base:
        with session.model.disable_adapter():
            for result, b in zip(results, answer("generate without adapter", " of the base"), strict=True):
                result["base"] = b
    return results


def resolve_system(session: Session, given: str | None, reporter: Reporter) -> str | None:
    """Return the system message to send: the given one, else the prompt contract's, or None.

    Raises:
        DataError: the template refuses the given one, or leaves it out.
    """
    if given is None:
        if session.system_prompt is not None:
            reporter.say(f"system message, as trained: {session.system_prompt} (--system sends another, '' none)")
        return session.system_prompt
    if not given:
        return None
    check_system(session.prompter, given)
    return given


def check_system(prompter: Prompter, system: str) -> None:
    """Check that a system message is part of what is sent.

    Raises:
        DataError: the template refuses it, or leaves it out.
    """
    user = Message("user", "a")
    if prompter.encode_prompt([Message("system", system), user]) == prompter.encode_prompt([user]):
        raise DataError(
            f"the template leaves the system message out: {system!r}",
            where="key data.template",
            fix="say it in the user turn: this adapter was trained without system messages",
        )


def check_sampling(settings: GenerationSettings) -> None:
    """Check the settings of a generation.

    Raises:
        ConfigError: one is out of range or has no effect.
    """
    problems = []
    default, greedy = GenerationSettings(), "at temperature 0, which takes the most likely token"
    if not 0.0 <= settings.temperature < math.inf:
        problems.append(Problem(f"temperature {settings.temperature}", "option --temperature", "give 0 or more"))
    if not 0.0 < settings.top_p <= 1.0:
        problems.append(Problem(f"top_p {settings.top_p}", "option --top-p", "give a number above 0 and at most 1"))
    elif settings.temperature == 0 and settings.top_p != default.top_p:
        what = f"top_p {settings.top_p} has no effect {greedy}"
        problems.append(Problem(what, "option --top-p", "remove it, or add --temperature 1"))
    if settings.temperature == 0 and settings.seed != default.seed:
        what = f"seed {settings.seed} has no effect {greedy}"
        problems.append(Problem(what, "option --seed", "remove it, or add --temperature 1"))
    if settings.max_new_tokens is not None and settings.max_new_tokens < 1:
        what = f"max_new_tokens {settings.max_new_tokens}"
        problems.append(Problem(what, "option --max-new-tokens", "give 1 or more"))
    if problems:
        raise ConfigError.from_problems(problems)
