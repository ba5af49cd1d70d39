"""How to use the adapter, as text to copy: the command and a plain PEFT program.

Owns those two texts for the HTML report and the model card.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from loralab.reports.facts import Facts, dig, dig_list

DEFAULT_NEW_TOKENS = 128
# What a card of an adapter, and of a merged model, calls the folder that it lies in.
ADAPTER_PLACE = "path/to/this/adapter"
MODEL_PLACE = "path/to/this/model"
_TEXT, _VISION = "peft_program.jinja", "peft_vision_program.jinja"


@dataclass(frozen=True, slots=True)
class Usage:
    """Texts to copy.

    Attributes:
        command: a shell command.
        program: a Python program.
    """

    command: str
    program: str


def describe_usage(
    facts: Facts, *, base: str, revision: str | None, run: str, adapter: str, names_base: bool = False
) -> Usage:
    """Return how to prompt the adapter.

    Args:
        facts: the run.
        base: where the base model is, a Hub id or a folder.
        revision: commit of a base model on the Hub, if known.
        run: what `loralab generate` is given.
        adapter: what PEFT is given.
        names_base: whether the command says where the base is, since the adapter does not.
    """
    # Not HTML: the program is escaped as a whole where it is shown; its values are Python literals.
    environment = Environment(
        loader=PackageLoader("loralab", "reports"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701
        trim_blocks=True,
        lstrip_blocks=True,
    )
    program = environment.get_template(_VISION if reads_pictures(facts) else _TEXT).render(
        base=_literal(base),
        adapter=_literal(adapter),
        revision=_literal(revision),
        dtype=_literal(dig(facts.record, "resolved", "precision", "value")),
        stop_ids=_stop_ids(dig_list(facts.data, "stop_tokens", "ids")),
        max_new_tokens=_new_tokens(facts),
        new_tokens=dig(facts.record, "resolved", "new_tokens", "value"),
    )
    picture = " --image picture.png" if reads_pictures(facts) else ""
    given = f" --model {shlex.quote(base)}" if names_base else ""
    command = f"loralab generate {shlex.quote(run)}{given}{picture} --prompt 'Your question'"
    return Usage(command=command, program=program)


def name_repository(card: str, repository: str) -> str:
    """Return the text of a card, whose commands name the repository where it is.

    Args:
        card: as it lies beside the adapter or the merged model.
        repository: OWNER/NAME on the Hub.
    """
    name = repository.rpartition("/")[2]
    fetched = f"hf download {repository} --local-dir {name}\nloralab generate {name} "
    named = card.replace(f"loralab generate {ADAPTER_PLACE} ", fetched)
    named = named.replace(f'adapter = "{ADAPTER_PLACE}"', f'adapter = "{repository}"')
    return named.replace(f'folder = "{MODEL_PLACE}"', f'folder = "{repository}"')


def reads_pictures(facts: Facts) -> bool:
    """Return whether the run's model reads pictures."""
    return dig(facts.record, "resolved", "pictures", "value") is not None


def _literal(value: object) -> str | None:
    """Return a Python string literal, in double quotes where JSON's way of writing it is Python's too."""
    text = str(value)
    quoted = json.dumps(text) if text.isascii() else ascii(text)
    return quoted if value else None


def _stop_ids(ids: Sequence[object]) -> list[int]:
    return [value for value in ids if isinstance(value, int)]


def _new_tokens(facts: Facts) -> int:
    value = dig(facts.config, "evaluation", "max_new_tokens")
    return value if isinstance(value, int) else DEFAULT_NEW_TOKENS
