"""The adapter folder of a run: what goes into it, in one step.

Owns which files make an adapter usable elsewhere: PEFT's, the tokenizer with its chat template,
the prompt contract, and the stop tokens in the form that `generate` of transformers reads.
"""

import json
import shutil
import tempfile
from pathlib import Path

from transformers import GenerationConfig

from loralab.data.prompts.contract import CONTRACT_FILE, build_contract
from loralab.data.prompts.prompter import Prompter
from loralab.models.supervised import SupervisedPeftModel
from loralab.run import replace_folder


def save_adapter(folder: Path, model: SupervisedPeftModel, prompter: Prompter) -> None:
    """Write an adapter folder; an older one there is replaced when the new one is whole.

    Args:
        folder: the adapter folder; its parent exists.
        model: base and adapter.
        prompter: tokenizer, template, system prompt and stop tokens of the training rows.
    """
    staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder.parent))
    try:
        model.save_pretrained(str(staging), safe_serialization=True)
        if prompter.pictures is not None:
            prompter.pictures.save(staging)
        prompter.tokenizer.save_pretrained(str(staging))  # over the processor's own: template and stop token may differ
        contract = json.dumps(build_contract(prompter), indent=2, ensure_ascii=False)
        (staging / CONTRACT_FILE).write_text(contract + "\n", encoding="utf-8")
        _generation_config(prompter).save_pretrained(str(staging))
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)  # temporary folders and safetensors make theirs private
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _generation_config(prompter: Prompter) -> GenerationConfig:
    tokenizer = prompter.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else prompter.stop.ids[0]
    return GenerationConfig(eos_token_id=list(prompter.stop.ids), pad_token_id=pad, bos_token_id=tokenizer.bos_token_id)
