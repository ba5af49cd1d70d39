"""The shipped recipes: listing them and writing one. No torch."""

from importlib import resources
from pathlib import Path

from loralab.errors import ConfigError, StorageError
from loralab.lookup import look_up


def _texts() -> dict[str, str]:
    folder = resources.files("loralab") / "recipes"
    found = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def list_recipes() -> dict[str, str]:
    """Return the first comment line of every recipe, by name."""
    return {name: text.splitlines()[0].lstrip("# ").strip() for name, text in _texts().items()}


def write_recipe(name: str, output: Path | None) -> Path:
    """Write a recipe as a YAML file; an existing file is never replaced.

    Raises:
        ConfigError: no such recipe, or the file exists.
        StorageError: the file cannot be written.
    """
    text = look_up(_texts(), name, kind="recipe", where="argument RECIPE")
    path = output or Path(f"{name}.yaml")
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
    return path
