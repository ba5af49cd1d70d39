"""What goes along with merged weights: tokenizer, template, processor, stop tokens, contract, licences."""

import shutil
from pathlib import Path

from loralab.data.prompts.contract import CONTRACT_FILE
from loralab.data.prompts.prompter import Prompter
from loralab.models.merge_source import LICENCES
from loralab.workflows.adapter_folder import save_prompting
from loralab.workflows.session import Target


def copy_companions(folder: Path, prompter: Prompter, target: Target, base: Path) -> None:
    """Write everything that a merged model needs besides its weights.

    Args:
        folder: of the merged model.
        prompter: the adapter's.
        target: the adapter.
        base: folder of the base.
    """
    save_prompting(folder, prompter)
    if not (target.adapter / CONTRACT_FILE).is_file():
        (folder / CONTRACT_FILE).unlink()  # nothing was promised of this adapter's prompts
    for pattern in LICENCES:
        for file in sorted(base.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    for file in (file for file in folder.iterdir() if file.is_file()):
        file.chmod(0o644)
