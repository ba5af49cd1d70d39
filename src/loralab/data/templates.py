"""Prompt templates: Jinja texts by name, and the choice among them.

Owns the text of templates. A template's whole text goes into the adapter's tokenizer, so that
every other tool prompts the adapter as it was trained.
"""

from dataclasses import dataclass
from pathlib import Path

from loralab.config.checks import Finding
from loralab.config.paths import local_path
from loralab.config.schema import Config
from loralab.errors import DataError
from loralab.lookup import suggest

# Wording: Taori et al. 2023, Stanford Alpaca; the line break behind "### Response:" is the
# widespread form. The user turn holds "\n\n### Input:\n" exactly when there is an input.
ALPACA = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and loop.first -%}"
    "{{- message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- if loop.first -%}"
    "{%- if '\\n\\n### Input:\\n' in message['content'] -%}"
    "{{- 'Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\\n\\n' -}}"
    "{%- else -%}"
    "{{- 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '### Response:\\n' + message['content'] + eos_token -}}"
    "{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{%- else -%}"
    "{{- raise_exception('the alpaca template has no place for role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
)

NONE = (
    "{%- for message in messages -%}"
    "{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)

# One of these goes before a named template where the tokenizer starts every text with its bos
# token, so that the chat template alone gives the ids that the base model was trained to see
# first. SentencePiece-like tokenizers need the blank that they put before plain text themselves.
BOS_PREFIXES = {"": "{{- bos_token -}}", " ": "{{- bos_token + ' ' -}}"}

TOKENIZERS_OWN = "tokenizer"


@dataclass(frozen=True, slots=True)
class Template:
    """A chosen template.

    Attributes:
        name: its name in `TEMPLATES`, "tokenizer", or the path of a file.
        text: the whole Jinja text.
        reason: why it was chosen.
    """

    name: str
    text: str
    reason: str


def resolve_template(
    setting: str, *, own: str | None, fallback: str | None, own_first: bool, bos_prefix: str
) -> Template:
    """Choose the template.

    Args:
        setting: `data.template`.
        own: the tokenizer's own chat template, if it has one.
        fallback: the format's template for `auto`; None for rows that are not prompted.
        own_first: whether `auto` prefers `own` to `fallback`.
        bos_prefix: Jinja text that writes the bos token, or "" where there is none to write.

    Raises:
        DataError: `tokenizer` without a template, or a file that cannot be read.
    """
    if setting == "auto":
        if own and own_first and fallback is not None:
            return Template(TOKENIZERS_OWN, own, "the tokenizer has a chat template of its own")
        name = fallback or "none"
        why = "rows of this format are used as they stand" if name == "none" else "the tokenizer has no chat template"
        return Template(name, bos_prefix + TEMPLATES[name], why)
    if setting == TOKENIZERS_OWN:
        if own:
            return Template(setting, own, "set in data.template")
        raise DataError(
            "the tokenizer has no chat template of its own",
            where="key data.template",
            fix=f"choose one: {', '.join(TEMPLATES)}, or the path of a Jinja file",
        )
    if setting in TEMPLATES:
        return Template(setting, bos_prefix + TEMPLATES[setting], "set in data.template")
    return Template(setting, _read_template(Path(setting).expanduser()), "file set in data.template")


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the template file {str(path)!r}: {error}", where="key data.template", fix="give a UTF-8 file"
        ) from None
    if not text.strip():
        raise DataError(f"empty template file {str(path)!r}", where="key data.template", fix="give a Jinja template")
    return text


def check_template_name(config: Config) -> list[Finding]:
    """Return a finding for a `data.template` that is no name and no file."""
    name = config.data.template
    if name in ("auto", TOKENIZERS_OWN) or name in TEMPLATES:
        return []
    path = local_path(name)
    if path is None or path.is_file():  # what is no path at all is a finding of its own
        return []
    if "/" in name or name.endswith((".jinja", ".j2")):
        return [Finding("data.template", f"no such template file: {name!r}", "give the path of a Jinja file")]
    known = ["auto", TOKENIZERS_OWN, *TEMPLATES]
    return [Finding("data.template", f"no such template: {name!r}", suggest(name, known))]


TEMPLATES: dict[str, str] = {
    "alpaca": ALPACA,
    "none": NONE,
}
