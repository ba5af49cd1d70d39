"""What goes along with merged weights: tokenizer, template, processor, stop tokens, contract, licences."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from loralab.data.prompts.contract import CONTRACT_FILE
from loralab.data.prompts.prompter import Prompter
from loralab.hub.cache import LICENCES
from loralab.hub.cards import data_fields
from loralab.run import Json, RunFolder, read_json
from loralab.workflows.adapter_folder import save_prompting
from loralab.workflows.pinning import hub_data_names
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


def data_facts(targets: Sequence[Target]) -> Json:
    """Return `datasets` and `language` of what adapters were trained on, as far as their runs or cards name them."""
    found = [_of_run(target.folder) if target.folder is not None else data_fields(target.adapter) for target in targets]
    sets = list(dict.fromkeys(name for each in found for name in each.get("datasets") or ()))
    spoken = list(dict.fromkeys(name for each in found for name in each.get("language") or ()))
    every = all(each.get("language") for each in found)  # of one adapter alone it would be half the truth
    return {**({"language": spoken} if every else {}), **({"datasets": sets} if sets else {})}


def _of_run(folder: RunFolder) -> Json:
    record = read_json(folder.record)
    names = list(hub_data_names(record.get("revisions", {})))
    return {"datasets": names, "language": (record.get("model") or {}).get("languages")}
