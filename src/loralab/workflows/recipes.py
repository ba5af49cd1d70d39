"""The shipped recipes: listing them and writing one. No torch."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from loralab.errors import ConfigError, StorageError
from loralab.lookup import look_up

_CONFIG = ".yaml"


def _files() -> list[Traversable]:
    return sorted((resources.files("loralab") / "recipes").iterdir(), key=lambda entry: entry.name)


def _texts() -> dict[str, str]:
    return {
        entry.name.removesuffix(_CONFIG): entry.read_text(encoding="utf-8")
        for entry in _files()
        if entry.name.endswith(_CONFIG)
    }


def list_recipes() -> dict[str, str]:
    """Return the first comment line of every recipe, by name."""
    return {name: text.splitlines()[0].lstrip("# ").strip() for name, text in _texts().items()}


def write_recipe(name: str, output: Path | None) -> Path:
    """Write a recipe as a YAML file, and beside it the recipe's further files; none is ever replaced.

    Further files are those of the recipe's name with another ending, such as a prompt template. They
    are written under the name of the YAML file, with their own ending.

    Raises:
        ConfigError: no such recipe, or a file exists.
        StorageError: a file cannot be written.
    """
    text = look_up(_texts(), name, kind="recipe", where="argument RECIPE")
    path = output or Path(f"{name}{_CONFIG}")
    further = {
        path.parent / (path.stem + entry.name.removeprefix(name)): entry.read_text(encoding="utf-8")
        for entry in _files()
        if entry.name.startswith(f"{name}.") and entry.name != f"{name}{_CONFIG}"
    }
    for target in further:
        _refuse_existing(target)
    _write_new(path, text)
    for target, content in further.items():
        _write_new(target, content)
    return path


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"file exists: {str(path)!r}", where="option --output", fix="name another file with --output")


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(
            f"file exists: {str(path)!r}", where="option --output", fix="name another file with --output"
        ) from None
    except OSError as error:
        raise StorageError(
            f"cannot write {str(path)!r}: {error.strerror}", where="option --output", fix="name a writable place"
        ) from None
