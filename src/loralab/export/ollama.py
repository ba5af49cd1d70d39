"""What Ollama needs for a model: which weights it imports itself, and the Modelfile.

Owns Ollama's limits and the Modelfile's text. Nothing here runs Ollama. Source: ollama/ollama, convert/convert.go,
convert/tokenizer.go, docs/modelfile.md.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loralab.errors import ModelError, RunFolderError, UserError
from loralab.export.gguf_vocabulary import build_vocabulary
from loralab.export.ollama_prompt import OllamaPrompt
from loralab.models.precision import Resolved
from loralab.run import read_json

# Architectures that Ollama imports from safetensors, of those that loralab trains.
IMPORTED = frozenset(
    """
    LlamaForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Phi3ForCausalLM Qwen2ForCausalLM
    MixtralForCausalLM Olmo3ForCausalLM
    """.split()  # noqa: SIM905 (a word each)
)
# Byte-level pre-tokenizers that its importer tells apart; it takes others for one of its own choice.
_KNOWN_PRE = ("llama-bpe", "qwen2")


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What goes into a Modelfile.

    Attributes:
        weights: what FROM names.
        prompt: the template.
        system: system message of the prompt contract, or None.
        stop: texts that end an answer.
        context: tokens that a conversation may have.
    """

    weights: str
    prompt: OllamaPrompt
    system: str | None
    stop: Sequence[str]
    context: int


def choose_weights(
    folder: Path, architecture: str, tokenizer: PreTrainedTokenizerBase, *, rows: int, gguf: UserError | None
) -> Resolved[str]:
    """Return in which form Ollama gets the weights: safetensors, which it imports, or gguf.

    Args:
        folder: of the merged model.
        architecture: as its config.json names it.
        tokenizer: of the model.
        rows: of its embedding.
        gguf: why no GGUF file can be written, or None where one can.

    Raises:
        ModelError: neither would do.
    """
    reason = _objection(folder, architecture, tokenizer, rows)
    if reason is None:
        return Resolved("safetensors", f"Ollama imports {architecture} and this tokenizer")
    if gguf is None:
        return Resolved("gguf", reason)
    raise _neither(reason, gguf)


def check_form(architecture: str, choose: Callable[[], object]) -> None:
    """Check that a model which Ollama does not import can be written as GGUF, before anything is merged.

    Args:
        architecture: as its config.json names it.
        choose: raises why it cannot.

    Raises:
        ModelError: it cannot.
    """
    try:
        choose()
    except UserError as error:
        raise _neither(f"Ollama's importer does not list {architecture}", error) from error


def _neither(reason: str, gguf: UserError) -> ModelError:
    return ModelError(
        f"Ollama cannot take this model: {reason}; and {gguf.problems[0].what}",
        where="option --to ollama",
        fix="export --to vllm, or merge it, convert it with llama.cpp and name the file in the Modelfile",
    )


def _objection(folder: Path, architecture: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    if architecture not in IMPORTED:
        return f"Ollama's importer does not list {architecture}"
    if (folder / "tokenizer.model").is_file():
        return None
    try:
        vocabulary = build_vocabulary(tokenizer, rows=rows)
    except ModelError as error:
        return f"without tokenizer.model Ollama reads tokenizer.json as byte-level BPE; {error.problems[0].what}"
    if vocabulary.scores is not None:
        return "without tokenizer.model Ollama would read this SentencePiece-like tokenizer as byte-level BPE"
    if vocabulary.pre not in _KNOWN_PRE:
        return f"Ollama's importer does not know the pre-tokenizer {vocabulary.pre} and would take another"
    return None


def adds_bos_itself(folder: Path) -> bool:
    """Return whether Ollama puts a bos token before prompts of a model that it imported, by its tokenizer's files."""
    try:
        settings = read_json(folder / "tokenizer_config.json")
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    except RunFolderError:
        return False
    bos = settings.get("bos_token")
    text = bos.get("content") if isinstance(bos, dict) else bos
    return bool(settings.get("add_bos_token")) and any(each.get("content") == text for each in added)


def render_modelfile(content: Modelfile) -> str:
    """Return the text of a Modelfile.

    Raises:
        ModelError: a text cannot be written into one.
    """
    lines = [f"FROM {content.weights}", f'TEMPLATE """{content.prompt.template}"""']
    if content.system is not None:
        if '"""' in content.system or content.system.endswith('"'):
            raise ModelError(
                "the system message has quotes that a Modelfile cannot hold",
                where="the prompt contract",
                fix="export --to vllm, or --to gguf and write the Modelfile by hand",
            )
        lines.append(f'SYSTEM """{content.system}"""')
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in content.stop]
    lines.append(f"PARAMETER num_ctx {content.context}")
    lines += [
        "# As loralab measured the answers: the most likely token. Remove the line to sample.",
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"
