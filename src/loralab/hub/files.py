"""Which files may leave the machine, and in which form.

Owns the list of names: what is not on it is never pushed. An adapter's configuration goes out without
the path where its base lay here.
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path, PurePath

from loralab.errors import HubError
from loralab.run import write_text

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGE_RECORD = "merge.json"
CARD = "README.md"
# A tokenizer, a processor and the prompt's contract, in whatever form their family keeps them.
_PROMPTING = (
    r"prompt_contract\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.(jinja|json)|(pre|video_pre)?processor_config\.json"
)
_ALWAYS = rf"README\.md|LICEN[CS]E(\.txt|\.md)?|NOTICE(\.txt)?|{_PROMPTING}"
_ADAPTER = re.compile(rf"adapter_(config|facts)\.json|adapter_model\.safetensors|{_ALWAYS}")
_MERGED = re.compile(
    rf"config\.json|merge\.json|model(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.json|{_ALWAYS}"
)
# What a Hub token and other well-known keys look like.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b")
# All that people write into: weights and tables of tokens hold no keys, and are large.
_READ_FOR_SECRETS = re.compile(r"(?!tokenizer\.json|vocab\.).*\.(json|jinja|md)|LICEN[CS]E.*|NOTICE.*")


def is_merged(folder: Path) -> bool:
    """Return whether a folder holds a merged model."""
    return (folder / MERGE_RECORD).is_file() and (folder / "config.json").is_file()


def pushable_files(folder: Path) -> dict[str, Path]:
    """Return the files of an adapter folder or a merged one that may be pushed, by name.

    Raises:
        HubError: one of them holds what looks like a secret.
    """
    names = _MERGED if is_merged(folder) else _ADAPTER
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and names.fullmatch(path.name)}
    for name in filter(_READ_FOR_SECRETS.fullmatch, found):
        if _SECRET.search(found[name].read_text(encoding="utf-8", errors="replace")):
            raise HubError(
                f"{name} holds what looks like a secret key, and is not pushed",
                where=str(found[name]),
                fix="remove it there, and make a new key: this one may have been seen",
            )
    return found


def stage_adapter(
    source: Path, target: Path, *, base_name: str | None, base_commit: str | None, only: Collection[str] = ()
) -> None:
    """Lay out an adapter for the Hub in a folder of its own; weights are linked where the disk can.

    Args:
        source: adapter folder or checkpoint.
        target: made where it does not exist.
        base_name: Hub id of the base, or None where it is a local folder, whose path stays here.
        base_commit: commit of the base that was trained on, or None.
        only: names to take; empty takes all that may be pushed.

    Raises:
        HubError: a file holds what looks like a secret.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, path in pushable_files(source).items():
        if only and name not in only:
            continue
        if name == ADAPTER_CONFIG:
            write_text(target / name, _shareable_config(path, base_name=base_name, base_commit=base_commit))
        else:
            _link(path, target / name)


def _shareable_config(path: Path, *, base_name: str | None, base_commit: str | None) -> str:
    config = json.loads(path.read_text(encoding="utf-8"))
    named = str(config.get("base_model_name_or_path") or "")
    config["base_model_name_or_path"] = base_name or PurePath(named.replace("\\", "/")).name or None
    if base_name is not None and base_commit is not None:
        config["revision"] = base_commit
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
