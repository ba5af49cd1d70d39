"""The adapter folder of a run: what goes into it, in one step.

Owns which files make an adapter usable elsewhere: PEFT's, the tokenizer with its chat template,
the prompt contract, the stop tokens in the form that `generate` of transformers reads, and facts by
which an adapter that leaves its run still knows itself and its base.
"""

import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from loralab.config.schema import ModelConfig
from loralab.data.prompts.contract import CONTRACT_FILE, build_contract
from loralab.data.prompts.prompter import Prompter
from loralab.models.adapters import adapter_sha256
from loralab.models.supervised import SupervisedPeftModel
from loralab.run import render_json, replace_folder

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
FACTS_FILE = "adapter_facts.json"


def save_adapter(
    folder: Path, model: SupervisedPeftModel, prompter: Prompter, *, facts: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter folder; an older one there is replaced when the new one is whole.

    Args:
        folder: the adapter folder; its parent exists.
        model: base and adapter.
        prompter: tokenizer, template, system prompt and stop tokens of the training rows.
        facts: of its base, as `describe_base` has them, or None where they are not known.
    """
    staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder.parent))
    try:
        model.save_pretrained(str(staging), safe_serialization=True)
        save_prompting(staging, prompter)
        if facts is not None:
            own = {"adapter_sha256": adapter_sha256(staging), **facts}
            (staging / FACTS_FILE).write_text(render_json(own) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        for path in (path for path in staging.iterdir() if path.is_file()):
            path.chmod(0o644)  # temporary folders and safetensors make theirs private
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_prompting(folder: Path, prompter: Prompter) -> None:
    """Write what an adapter is prompted with: tokenizer or processor, prompt contract, stop tokens.

    Args:
        folder: the adapter folder, or one that becomes it.
        prompter: tokenizer, template, system prompt and stop tokens of the training rows.
    """
    if prompter.pictures is not None:
        prompter.pictures.save(folder)
    _save_tokenizer(folder, prompter)  # over the processor's own: template and stop token may differ
    contract = json.dumps(build_contract(prompter), indent=2, ensure_ascii=False)
    (folder / CONTRACT_FILE).write_text(contract + "\n", encoding="utf-8")
    _generation_config(prompter).save_pretrained(str(folder))


def _save_tokenizer(folder: Path, prompter: Prompter) -> None:
    try:
        prompter.tokenizer.save_pretrained(str(folder))
    except Exception as error:
        # Its Rust part has no kind of its own for a full disk, which callers know as an OSError.
        found = _OS_ERROR.search(str(error))
        if found is None or isinstance(error, OSError):
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(folder)) from error


def describe_base(model: ModelConfig, base: Mapping[str, Any], precision: Any) -> dict[str, Any]:
    """Return what an adapter folder says of the base that it was trained on; of a folder its last part alone.

    Args:
        model: the model section.
        base: what the record says of it.
        precision: type that its weights were held in.
    """
    local = base.get("sha256") is not None
    return {
        "base": {
            "name": Path(model.name).name if local else model.name,
            **{key: base.get(key) for key in ("revision", "architecture", "sha256")},
        },
        "quantization": model.quantization,
        "double_quantization": model.double_quantization,
        "precision": str(precision).removeprefix("torch."),
        "loralab_version": importlib.metadata.version("loralab"),
    }


def _generation_config(prompter: Prompter) -> GenerationConfig:
    tokenizer = prompter.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else prompter.stop.ids[0]
    return GenerationConfig(eos_token_id=list(prompter.stop.ids), pad_token_id=pad, bos_token_id=tokenizer.bos_token_id)
