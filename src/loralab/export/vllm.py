"""What vLLM needs for an adapter: whether it takes it as LoRA, the folder, and the command.

Owns vLLM's limits and the rewriting of adapters whose layers differ in rank or scale. Nothing here runs vLLM. Source:
vllm-project/vllm: docs/features/lora.md, docs/models/supported_models.md, vllm/config/lora.py, vllm/lora/.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loralab.errors import ProofError
from loralab.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from loralab.run import read_json, write_json

# Values that --max-lora-rank takes; recent versions take 1 too, which 8 holds as well. Without it, it is 16.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Architectures of loralab's own reach that vLLM's table of models marks with LoRA.
WITH_LORA = frozenset(
    """
    CohereForCausalLM Cohere2ForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM GlmForCausalLM
    Glm4ForCausalLM GraniteForCausalLM LlamaForCausalLM MistralForCausalLM MixtralForCausalLM NemotronForCausalLM
    OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM PhiForCausalLM Phi3ForCausalLM Qwen2ForCausalLM
    Qwen3ForCausalLM SmolLM3ForCausalLM Starcoder2ForCausalLM
    """.split()  # noqa: SIM905 (a word each)
)
_HEADS = ("lm_head", "embed_tokens")
_PARTS = (".lora_A.weight", ".lora_B.weight")
# Largest difference of an update that was written in another form, in float32.
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Served:
    """How a model is served.

    Attributes:
        model: name or folder of what vLLM loads.
        revision: of a model of the Hub, or None.
        dtype: of its weights, as torch names it.
        quantization: of the run: none, nf4, fp4 or int8.
        rank: of the adapter, or None for a merged model.
    """

    model: str
    revision: str | None
    dtype: str
    quantization: str = "none"
    rank: int | None = None


def why_merged(config: Mapping[str, Any], names: Sequence[str], architecture: str) -> str | None:
    """Return why vLLM cannot take an adapter as LoRA, so that a merged model is served, or None where it can.

    Args:
        config: `adapter_config.json`.
        names: of the adapter's tensors.
        architecture: of the base, as its config.json names it.
    """
    kind = str(config.get("peft_type")).upper()
    others = [name for name in names if not name.endswith(_PARTS)]
    heads = [head for head in _HEADS if any(f".{head}." in name for name in names)]
    whole = config.get("modules_to_save") or []
    objections = (
        (kind != "LORA", f"vLLM takes LoRA adapters, and this one is {kind}"),
        (config.get("use_dora"), "vLLM does not take DoRA"),
        (whole, f"vLLM takes no layers that were trained whole ({', '.join(whole)})"),
        (config.get("bias", "none") != "none" or config.get("lora_bias"), "vLLM takes no trained biases"),
        (others, f"vLLM takes updates of linear layers alone, and the adapter has {', '.join(others[:1])}"),
        (heads, f"whether vLLM takes updates of {', '.join(heads)} depends on the model"),
        (architecture not in WITH_LORA, f"vLLM's table of models does not mark {architecture} with LoRA"),
        (kind == "LORA" and largest_rank(config) > RANKS[-1], f"vLLM takes ranks up to {RANKS[-1]}"),
    )
    return next((reason for objects, reason in objections if objects), None)


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank of an adapter's layers."""
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def allowed_rank(rank: int) -> int:
    """Return the smallest rank that vLLM can be told and that holds `rank`."""
    return next(each for each in RANKS if each >= rank)


def write_adapter(source: Path, folder: Path, *, scale_of: Callable[[str], float]) -> str:
    """Write an adapter folder that vLLM reads as PEFT does.

    vLLM knows one rank and one scale for all layers. An adapter whose layers differ is written with one rank, filled
    up with zeros, and its scales within B.

    Args:
        source: the adapter folder.
        folder: where to, not there yet.
        scale_of: the factor of B A of a layer, by its name.

    Returns:
        What was done.

    Raises:
        ProofError: an update is not the same in the new form.
    """
    shutil.copytree(source, folder)
    config = read_json(folder / CONFIG_FILE)
    if not config.get("rank_pattern") and not config.get("alpha_pattern"):
        return "the adapter as it is"
    rank = largest_rank(config)
    tensors = load_file(str(source / WEIGHTS_FILE))
    written: dict[str, torch.Tensor] = {}
    for name in sorted(name for name in tensors if name.endswith(_PARTS[0])):
        layer = name.removesuffix(_PARTS[0])
        a, b = tensors[name].float(), tensors[layer + _PARTS[1]].float()
        scale = scale_of(layer)
        wide_a, wide_b = torch.zeros(rank, a.shape[1]), torch.zeros(b.shape[0], rank)
        wide_a[: len(a)], wide_b[:, : b.shape[1]] = a, b * scale
        before, after = scale * (b @ a), wide_b @ wide_a
        if not float((before - after).norm()) <= _TOLERANCE * float(before.norm()) + 1e-30:
            raise ProofError(
                f"the update of {layer} changed", where=str(source), fix="merge the adapter and serve that"
            )
        written[name], written[layer + _PARTS[1]] = wide_a, wide_b
    save_file(written, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(folder / CONFIG_FILE, config)
    return f"one rank ({rank}) for all layers, their scales within B, since vLLM knows one of each"


def serve_command(served: Served, name: str, folder: Path) -> str:
    """Return the command that serves a model.

    Args:
        served: what is loaded.
        name: under which it is asked.
        folder: of the adapter, or of the merged model.
    """
    words = ["vllm", "serve", served.model]
    if served.rank is None:
        words += ["--served-model-name", name]
    else:
        words += ["--enable-lora", "--lora-modules", f"{name}={folder}", "--max-lora-rank", str(served.rank)]
        words += ["--tokenizer", str(folder)]
        if served.revision:
            words += ["--revision", served.revision]
    words += ["--chat-template", str(folder / "chat_template.jinja"), "--dtype", served.dtype]
    if served.rank is not None and served.quantization == "nf4":
        words += ["--quantization", "bitsandbytes"]
    return shlex.join(words)


def quantization_note(served: Served) -> str | None:
    """Return what a quantized base means for serving, or None where it means nothing."""
    if served.rank is None or served.quantization == "none":
        return None
    if served.quantization == "nf4":
        return (
            "the adapter was trained on a base in nf4: --quantization bitsandbytes loads it in 4 bits too; without it "
            "the adapter sits on weights that it did not see (`loralab merge` writes those that it saw)"
        )
    return (
        f"the adapter was trained on a base in {served.quantization}, which vLLM does not load in that form: "
        "`loralab merge`, then export the merged folder, to serve the weights that it saw"
    )


def request_body(name: str, stop_ids: Sequence[int], system: str | None, *, max_tokens: int) -> dict[str, Any]:
    """Return an example of a chat request."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return {
        "model": name,
        "messages": [*messages, {"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stop_token_ids": list(stop_ids),
    }


def curl_command(folder: Path) -> str:
    """Return the command that sends the example."""
    body = shlex.quote(f"@{folder / 'request.json'}")
    return f"curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d {body}"


def write_extras(folder: Path, template: str, body: Mapping[str, Any]) -> None:
    """Write the chat template and the example request beside the weights."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "request.json").write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
