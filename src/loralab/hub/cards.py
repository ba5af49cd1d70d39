"""What the card of a base model or data set says of its licence and languages; nothing is guessed.

Owns reading the head of a card: of a local folder, of a commit in the cache, or as the Hub tells it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from loralab.hub.access import NETWORK_ERRORS, is_offline, open_hub
from loralab.hub.cache import CARD, in_cache, is_whole

_UNKNOWN: tuple[type[Exception], ...] = (*NETWORK_ERRORS, ValueError)
_LICENCE_FIELDS = ("license", "license_name", "license_link")


def licence_fields(name: str, commit: str | None) -> dict[str, Any]:
    """Return what a base model's card says of its licence, in the Hub's own fields; empty where nothing is known.

    The Hub is asked only where the card lies neither in the folder nor in the cache; what fails there is no failure.

    Args:
        name: folder or Hub id.
        commit: of a Hub model.
    """
    folder = Path(name).expanduser()
    card = _read(folder / CARD if folder.is_dir() else in_cache(name, CARD, commit))
    if card is None and not is_offline() and not folder.exists() and not is_whole(name, commit):
        try:
            found = open_hub().model_info(name, revision=commit).card_data
        except _UNKNOWN:
            return {}
        card = {key: getattr(found, key, None) for key in _LICENCE_FIELDS}
    said = {key: value for key in _LICENCE_FIELDS if (value := _texts((card or {}).get(key)))}
    return said if "license" in said else {}


def languages(name: str, commit: str | None) -> list[str]:
    """Return the languages that a data set's card in the cache names; empty where it names none."""
    card = in_cache(name, CARD, commit, kind="dataset")
    return _listed((_read(card) or {}).get("language"))


def data_fields(folder: Path) -> dict[str, list[str]]:
    """Return `datasets` and `language` of the card of an adapter folder."""
    card = _read(folder / CARD) or {}
    return {key: _listed(card.get(key)) for key in ("datasets", "language")}


def _read(path: Path | None) -> Mapping[str, Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a head that is no YAML says nothing
        return {}


def _texts(value: object) -> str | list[str] | None:
    """Return a value that is one text or several, as YAML has it, else None."""
    if isinstance(value, list):
        return [str(each) for each in value] if value and all(isinstance(each, str) for each in value) else None
    return value if isinstance(value, str) and value.strip() else None


def _listed(value: object) -> list[str]:
    found = _texts(value)
    return [found] if isinstance(found, str) else found or []
