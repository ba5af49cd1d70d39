"""What is looked at before torch is imported: that RUN is there, that a place is free, that words are known.

Owns those checks for the commands that take an adapter; a typo is told at once. No torch here.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from loralab.errors import ConfigError, ModelError
from loralab.hub.files import is_merged
from loralab.lookup import look_up
from loralab.run import RunFolder
from loralab.workflows.new_folder import check_free

DTYPE_NAMES = ("float32", "bfloat16", "float16")
ONTO = ("dequantized", "original")
PROGRAMS = ("ollama", "vllm", "gguf")
GGUF_DTYPES = ("f32", "f16")
LONGEST_NAME = 100
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")


def check_run(path: Path, *, merged: bool = False) -> None:
    """Check that RUN is there, and a folder that a command can take.

    Args:
        path: as the user gave it.
        merged: whether a merged model will do.

    Raises:
        ModelError: it is not.
    """
    if path.exists():
        if not merged:
            check_no_merged(path)
        return
    if len(path.parts) == 2 and not path.parent.exists():
        fix = f"check the path; an adapter on the Hub is fetched first: hf download {path} --local-dir {path.name}"
    elif merged:
        fix = "give a run folder, an adapter folder, or a folder that `loralab merge` wrote"
    else:
        fix = "give a run folder, or the adapter folder inside it"
    raise ModelError(f"no such folder: {str(path)!r}", where="argument RUN", fix=fix)


def check_no_merged(path: Path) -> None:
    """Check that a folder is no merged model, which has neither an adapter nor a run.

    Raises:
        ModelError: it is one.
    """
    if is_merged(path) and not RunFolder(path).exists():
        raise ModelError(
            f"a whole model that `loralab merge` wrote, with no adapter to ask or measure: {str(path)!r}",
            where="argument RUN",
            fix="ask it with transformers (its README.md has a program), push it, export it, or train on it with "
            "model.name; this command takes the run or adapter that it was merged from",
        )


def check_dtype(name: str | None) -> None:
    """Check the type that a merge is asked for.

    Raises:
        ConfigError: there is no such type.
    """
    if name is not None:
        look_up(dict.fromkeys(DTYPE_NAMES), name, kind="dtype", where="option --dtype")


def check_onto(name: str) -> None:
    """Check what a merge goes onto.

    Raises:
        ConfigError: there is no such word.
    """
    look_up(dict.fromkeys(ONTO), name, kind="choice", where="option --onto")


def check_merge(paths: Sequence[Path], output: Path, *, dtype: str | None, onto: str) -> None:
    """Check what a merge is asked for, as far as that can be told at once.

    Args:
        paths: of all adapters.
        output: folder to write.
        dtype: of the merged weights, or None.
        onto: what the merge goes onto.

    Raises:
        UserError: something is not there, in the way, or not known.
    """
    check_dtype(dtype)
    check_onto(onto)
    for path in paths:
        check_run(path)
    check_free(output)


def check_export(path: Path, output: Path | None, *, to: str, dtype: str | None, name: str | None) -> Path:
    """Check what an export is asked for, as far as that can be told at once; return the folder that it writes.

    Args:
        path: run folder, adapter folder or merged folder.
        output: folder to write; None puts it beside the run.
        to: the program.
        dtype: of a GGUF file, or None.
        name: of the model in the other program, or None.

    Raises:
        UserError: something is not there, in the way, or not known.
    """
    look_up(dict.fromkeys(PROGRAMS), to, kind="program", where="option --to")
    if dtype is not None and to != "gguf":
        raise ConfigError(
            f"--dtype {dtype} with --to {to}, which takes weights as they are",
            where="option --dtype",
            fix="remove it, or export --to gguf",
        )
    look_up(dict.fromkeys(GGUF_DTYPES), dtype or "f16", kind="type of GGUF weights", where="option --dtype")
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(
            f"not a name for a model: {name!r}",
            where="option --name",
            fix="use letters, digits, dots, dashes and underscores",
        )
    check_run(path, merged=True)
    place = output or path.absolute().with_name(f"{path.absolute().name}-{to}")
    check_free(place)
    return place
