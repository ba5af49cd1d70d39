"""The `generate` command: answers to prompts, under the adapter's prompt contract."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loralab.data.example import Message
from loralab.evaluation.generate import GenerationSettings, generate_answers
from loralab.progress import Reporter
from loralab.workflows.session import open_session


def generate(
    path: Path,
    prompts: Sequence[str],
    *,
    settings: GenerationSettings,
    system: str | None = None,
    with_base: bool = False,
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Answer prompts with an adapter, and with its base beside it when asked.

    Args:
        path: run folder or adapter folder.
        prompts: user turns.
        settings: how to generate.
        system: system message put before every prompt.
        with_base: whether the base answers too.
        overrides: `section.key=value` on top of the run's configuration.
        base_model: base to use instead of the recorded one.
        reporter: told of progress.

    Returns:
        For each prompt `prompt`, `prompt_text` (as the template renders it), `adapter` and,
        with `with_base`, `base`: `text`, `stopped` and `tokens`.
    """
    session = open_session(path, overrides=overrides, base_model=base_model, reporter=reporter)
    if settings.max_new_tokens is None:
        settings = replace(settings, max_new_tokens=session.config.evaluation.max_new_tokens)
    before = [Message("system", system)] if system else []
    conversations = [[*before, Message("user", prompt)] for prompt in prompts]
    ids = [session.prompter.encode_prompt(messages) for messages in conversations]

    def answer(label: str) -> list[dict[str, Any]]:
        answers = generate_answers(
            session.model,
            ids,
            prompter=session.prompter,
            settings=settings,
            batch_size=session.config.evaluation.batch_size,
            reporter=reporter,
            label=label,
        )
        return [asdict(each) for each in answers]

    results = [
        {"prompt": prompt, "prompt_text": session.prompter.render(messages, add_generation_prompt=True), "adapter": a}
        for prompt, messages, a in zip(prompts, conversations, answer("generate"), strict=True)
    ]
    if with_base:
        with session.model.disable_adapter():
            for result, b in zip(results, answer("generate without adapter"), strict=True):
                result["base"] = b
    return results
