"""Which rows are for training, validation and test.

Owns splits by fraction and number; splits by file or name are sources of their own.
"""

import numpy as np
import numpy.typing as npt

from loralab.config.schema import DataConfig
from loralab.errors import DataError

# A part may be larger than asked for by this factor, or by so many rows.
_MOST_OVER, _FEW_OVER = 1.5, 50

Indices = npt.NDArray[np.int64]


def split_units(total: int, data: DataConfig) -> dict[str, Indices]:
    """Divide `total` units by `data.validation` and `data.test` where these are amounts.

    The same total, amounts, method and seed give the same parts, whatever the tokenizer.

    Returns:
        "train" and each part asked for: unit numbers, ascending.

    Raises:
        DataError: a part would be empty, or none would be left for training.
    """
    amounts = {
        name: _count(amount, total, name)
        for name, amount in (("validation", data.validation), ("test", data.test))
        if isinstance(amount, (int, float))
    }
    taken = sum(amounts.values())
    if taken >= total:
        raise DataError(
            f"validation and test would take {taken} of {total} rows and leave none for training",
            where="keys data.validation, data.test",
            fix="give smaller amounts, or more rows",
        )
    order = np.arange(total, dtype=np.int64)
    if data.split_method == "random":
        order = np.random.default_rng(data.split_seed).permutation(total).astype(np.int64)
    parts: dict[str, Indices] = {}
    start = 0
    for name, count in amounts.items():
        parts[name] = np.sort(order[start : start + count])
        start += count
    return {"train": np.sort(order[start:]), **parts}


def split_groups(owners: Indices, data: DataConfig) -> dict[str, Indices]:
    """Divide units so that those of one owner stay together, as questions about one picture do.

    Owners are taken in a random order, or the units', until a part has as many units as asked for, or a few more.

    Args:
        owners: number of each unit's owner, from 0.
        data: the data section, as in `split_units`.

    Returns:
        "train" and each part asked for: unit numbers, ascending.

    Raises:
        DataError: a part would be empty, or none would be left for training.
    """
    total, sizes = len(owners), np.bincount(owners)
    order = np.arange(len(sizes))
    if data.split_method == "random":
        order = np.random.default_rng(data.split_seed).permutation(len(sizes))
    parts: dict[str, Indices] = {}
    start = 0
    for name, amount in (("validation", data.validation), ("test", data.test)):
        if not isinstance(amount, (int, float)):
            continue
        wanted, filled = _count(amount, total, name), np.cumsum(sizes[order[start:]])
        end = start + int(np.searchsorted(filled, wanted)) + 1
        if end >= len(order):
            raise DataError(
                f"{name} would take the rest of the {len(order)} pictures, whose rows stay together, and leave none "
                "for training",
                where=f"key data.{name}",
                fix=f"give a smaller amount, rows on more pictures, or a file of rows for data.{name}",
            )
        parts[name] = np.flatnonzero(np.isin(owners, order[start:end])).astype(np.int64)
        if len(parts[name]) > max(_MOST_OVER * wanted, wanted + _FEW_OVER):
            raise DataError(
                f"{name} would take {len(parts[name])} rows where {wanted} are asked for: so many rows are on one "
                "picture, and rows on one picture stay together",
                where=f"key data.{name}",
                fix=f"name a file of rows for data.{name}, or another data.split_seed",
            )
        start = end
    return {"train": np.flatnonzero(np.isin(owners, order[start:])).astype(np.int64), **parts}


def _count(amount: float, total: int, name: str) -> int:
    count = round(amount * total) if isinstance(amount, float) else int(amount)
    if count < 1:
        raise DataError(
            f"{name} {amount} of {total} rows is no row",
            where=f"key data.{name}",
            fix="give a larger fraction, or a number",
        )
    return count
