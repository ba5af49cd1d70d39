"""Folders that `loralab prepare` wrote, as data: their prompt contract holds again.

Owns how training takes such a folder up. Its rows were tokenized under a template and a
tokenizer; an adapter trained on them must be prompted in the same way.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loralab.config.schema import DataConfig
from loralab.data.pools import Pool
from loralab.data.prompts.contract import CONTRACT_FILE, load_contracted
from loralab.data.prompts.prompter import Prompter, apply_stop_setting
from loralab.errors import DataError, PromptContractError
from loralab.run import Json, read_json

_FIXED = ("template", "template_kwargs", "stop_tokens", "system")
_SEVERAL_SPLITS = "dataset_dict.json"  # how `datasets` marks a folder of several


def open_prepared(data: DataConfig, pools: Sequence[Pool], tokenizer: PreTrainedTokenizerBase) -> Prompter | None:
    """Return the prompter that prepared folders ask for, or None where no source is one.

    Args:
        data: the data section.
        pools: the sources of all splits.
        tokenizer: of the base model; it gets the folder's template and end token.

    Raises:
        DataError: two folders ask for different prompts, or a setting contradicts them.
        PromptContractError: the tokenizer gives other ids than when the rows were tokenized.
    """
    found = {path: read_json(path) for path in dict.fromkeys(_contract_files(pools))}
    if not found:
        return None
    (first, contract), *others = found.items()
    differing = next((path for path, other in others if _promise(other) != _promise(contract)), None)
    if differing is not None:
        raise DataError(
            "folders that were prepared under different prompt contracts",
            where=f"{first}, {differing}",
            fix="prepare them anew with one configuration",
        )
    chosen = [key for key in _FIXED if data.chosen(key)]
    if chosen:
        raise DataError(
            f"data.{chosen[0]} has no effect on rows that are tokenized already, got {getattr(data, chosen[0])!r}",
            where="section data",
            fix="remove it, or set it when you prepare the folder",
        )
    return _prompter(tokenizer, contract, where=str(first))


def check_prepared(pools: Sequence[Pool], template: str) -> None:
    """Check that prepared folders were tokenized under an adapter's template.

    Args:
        pools: the sources of all splits.
        template: the adapter's.

    Raises:
        PromptContractError: one was not; what is measured on its rows would say little of the adapter.
    """
    for path in _contract_files(pools):
        if read_json(path).get("template") != template:
            raise PromptContractError(
                "rows that were prepared under another template than the adapter's",
                where=str(path),
                fix="prepare them with the adapter's configuration, or name the rows that they were made of",
            )


def _contract_files(pools: Sequence[Pool]) -> list[Path]:
    members = [member for pool in pools for member in pool.members if member.format == "tokenized"]
    folders = [_prepared_folder(member.source.name) for member in members]
    return [folder / CONTRACT_FILE for folder in folders if (folder / CONTRACT_FILE).is_file()]


def _prepared_folder(name: str) -> Path:
    """Return the folder that `prepare` wrote: of `FOLDER#SPLIT`, or of the folder of one split."""
    whole = Path(name).expanduser()
    folder = whole if whole.is_dir() or "#" not in name else Path(name.rpartition("#")[0]).expanduser()
    return folder.parent if folder.is_dir() and (folder.parent / _SEVERAL_SPLITS).is_file() else folder


def _promise(contract: Json) -> Json:
    return {key: value for key, value in contract.items() if key != "versions"}


def _prompter(tokenizer: PreTrainedTokenizerBase, contract: Json, *, where: str) -> Prompter:
    special = contract.get("special_tokens")
    end = special.get("eos_token") if isinstance(special, dict) else None
    if isinstance(end, str) and end in tokenizer.get_vocab():  # data.stop_tokens had changed it
        apply_stop_setting(tokenizer, [end])
    template = contract.get("template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    try:
        return load_contracted(tokenizer, contract, where=where)
    except PromptContractError as error:
        raise PromptContractError(
            error.problems[0].what,
            where=where,
            fix="set model.name to the base that the rows were prepared for, or prepare them again for this one",
        ) from error
