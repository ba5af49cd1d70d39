"""The proof of a GGUF file: read back by transformers' own loader, it answers as the merged model does.

Owns what is compared and what passes. Two models are held one after the other, never both.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from loralab.errors import ProofError, excerpt
from loralab.export.gguf_architectures import ROPE_FACTORS, rope_factors
from loralab.export.gguf_file import GgufContent
from loralab.export.gguf_library import load_gguf
from loralab.export.sentencepiece_rule import SentencePieceRule
from loralab.models.quiet_loading import quiet_loading, without_bars

# Largest difference of logits, in standard deviations of the logits: rounding of float32 sums, nothing more.
TOLERANCE = 1e-5
_TEXTS = (
    "What is the capital of France?",
    "It's 3 or 33 or 333, isn't it? WE'LL see...\n\n\tx = f(y) # 1.5e-3",
    "Gr\u00fc\u00dfe, \u4e16\u754c! \U0001f44b  two blanks\r\nnext",
)
# Of each text, this many tokens at most go through the models.
_LONGEST = 128


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the contract.

    Attributes:
        text: as the chat template writes it.
        ids: that the adapter was trained on.
    """

    text: str
    ids: tuple[int, ...]


def choose_blank(content: GgufContent, prompts: Sequence[Prompt]) -> bool:
    """Return whether llama.cpp is to put a blank before text, so that it cuts every prompt as the tokenizer does.

    Args:
        content: of the file; its `add_blank` is what is asked.
        prompts: of the contract.

    Raises:
        ProofError: it would cut one otherwise under either setting.
    """
    if content.vocabulary.scores is None:
        return False
    different: Prompt | None = None
    for add_blank in (True, False):
        rule = SentencePieceRule(content.vocabulary, add_blank=add_blank)
        different = next((each for each in prompts if _sent(rule, each, content) != list(each.ids)), None)
        if different is None:
            return add_blank
    raise ProofError(
        f"llama.cpp would cut the prompt {different.text[:60]!r} into other tokens" if different else "no prompt",
        where="the golden prompts of the prompt contract",
        fix="export --to vllm, which takes the tokenizer as it is",
    )


def _sent(rule: SentencePieceRule, prompt: Prompt, content: GgufContent) -> list[int]:
    """Return what a server sends that leaves a bos token to llama.cpp where the file says so."""
    if not content.add_bos:
        return rule(prompt.text)
    bos = content.vocabulary.special["bos"]
    return [bos, *rule(prompt.text.removeprefix(content.vocabulary.tokens[bos]))]


def prove_gguf(
    path: Path,
    merged: Path,
    content: GgufContent,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """Read a GGUF file back and compare it with the model that it was written from.

    Args:
        path: of the file.
        merged: folder of the model.
        content: that went into the file.
        tokenizer: of the model.
        prompts: of the contract.

    Returns:
        The figures.

    Raises:
        ProofError: logits or token ids differ.
    """
    half = _is_half(path)
    try:
        with quiet_loading(), without_bars():
            ids = _prove_tokens(path, tokenizer, prompts)
            rotary = _prove_rotary(path, content)
            own = _logits(merged, ids, rounded=half)
            read = _logits(path, ids, config=_read_config(path, content))
            whole = _logits(merged, ids) if half else own
    except ProofError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise _differs(f"transformers cannot read the file back: {excerpt(error)}", path) from error
    spread = float(torch.cat([each.flatten() for each in own]).std())
    apart = max(float((mine - theirs).abs().max()) for mine, theirs in zip(own, read, strict=True))
    if not apart <= TOLERANCE * spread:
        raise _differs(f"logits differ by {apart / spread:.3g} standard deviations, allowed is {TOLERANCE:.0e}", path)
    exact = [torch.log_softmax(each, -1) for each in whole]
    rough = [torch.log_softmax(each, -1) for each in read]
    kl = float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, rough, strict=True)]).mean())
    return {
        "logits": {
            "compared_with": "the merged model" + (", its matrices rounded to float16" if half else ""),
            "positions": sum(len(each) for each in ids),
            "max_difference_in_standard_deviations": apart / spread,
            "allowed": TOLERANCE,
        },
        "rounding_kl_nats": max(kl, 0.0),
        "tokenizer": {"texts": len(_TEXTS), "prompts": len(prompts), "equal": True},
        **rotary,
    }


def _is_half(path: Path) -> bool:
    field = load_gguf().GGUFReader(str(path)).get_field("general.file_type")
    return int(field.contents()) == 1


def _prove_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Check that the file's tokenizer cuts texts and prompts as the model's does; return the ids."""
    read = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    texts = [(text, list(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in _TEXTS]
    texts += [(prompt.text, list(prompt.ids)) for prompt in prompts]
    for text, ids in texts:
        found = list(read(text, add_special_tokens=False)["input_ids"])
        if found != ids:
            raise _differs(f"its tokenizer cuts {text[:60]!r} into {found[:12]}, the model's into {ids[:12]}", path)
    return [ids[:_LONGEST] for _, ids in texts if ids]


def _prove_rotary(path: Path, content: GgufContent) -> dict[str, Any]:
    factors = rope_factors(content.config)
    stored = [t for t in load_gguf().GGUFReader(str(path)).tensors if t.name == ROPE_FACTORS]
    if factors is None and not stored:
        return {}
    if factors is None or len(stored) != 1 or not np.array_equal(stored[0].data, factors):
        raise _differs("the factors of its rotary frequencies are not the model's", path)
    return {"rotary_factors": {"stored": len(factors), "equal": True, "read_by": "gguf, since transformers does not"}}


def _read_config(path: Path, content: GgufContent) -> Any:
    """Return the configuration as transformers reads it from the file; scaled frequencies, which it does not, added."""
    config: Any = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    if rope_factors(content.config) is not None:
        settings: Any = content.config
        if config.rope_parameters["rope_theta"] != settings.rope_parameters["rope_theta"]:
            raise _differs("its rotary base is not the model's", path)
        config.rope_parameters = dict(settings.rope_parameters)
    return config


def _logits(
    source: Path, ids: Sequence[Sequence[int]], *, config: Any = None, rounded: bool = False
) -> list[torch.Tensor]:
    """Return the float32 logits of a model for texts, then let the model go.

    Args:
        source: folder of the merged model, or a GGUF file.
        ids: of each text.
        config: of a GGUF file.
        rounded: whether to round matrices to float16, as such a file has them.
    """
    if config is None:
        model: Any = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, config=config, dtype=torch.float32
        )
    model.eval()
    with torch.inference_mode():
        for weight in model.parameters() if rounded else ():
            if weight.ndim > 1:
                weight.copy_(weight.to(torch.float16))
        found = [model(input_ids=torch.tensor([list(each)])).logits[0].float().clone() for each in ids]
    del model
    gc.collect()
    return found


def _differs(what: str, path: Path) -> ProofError:
    return ProofError(
        f"the GGUF file does not say what the merged model does: {what}",
        where=path.name,
        fix="nothing was kept; export --to vllm serves the same model, and please report this one",
    )
