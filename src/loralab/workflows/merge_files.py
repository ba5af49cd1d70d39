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


def run_facts(targets: Sequence[Target], weights: Sequence[float]) -> Json:
    """Return what a run knows of the adapter that was merged alone and as trained; empty of any other.

    Args:
        targets: the adapters.
        weights: factors of their updates.

    Returns:
        `template`, its name, and `measured`, the figures of the run's final evaluation.
    """
    folder = targets[0].folder
    if folder is None:
        return {}
    template = ((read_json(folder.data) if folder.data.is_file() else {}).get("template") or {}).get("name")
    found: Json = {"template": template} if template else {}
    if len(targets) > 1 or weights[0] != 1 or not folder.evaluation.is_file():
        return found
    own = read_json(folder.evaluation)
    base = own.get("base") or {}
    sides = {"loss": (base.get("eval_loss"), own.get("eval_loss"))}
    for name, figure in (own.get("metrics") or {}).items():
        if isinstance(figure, dict):
            sides[name] = (((base.get("metrics") or {}).get(name) or {}).get("value"), figure.get("value"))
    figures = {name: {"base": b, "adapter": a} for name, (b, a) in sides.items() if a is not None}
    return {**found, "measured": {"split": own.get("split"), "rows": own.get("num_examples"), "figures": figures}}


def _of_run(folder: RunFolder) -> Json:
    record = read_json(folder.record)
    names = list(hub_data_names(record.get("revisions", {})))
    return {"datasets": names, "language": (record.get("model") or {}).get("languages")}
