"""Makes the Python environments of the peers that cannot share one: each from its file of pinned versions.

    python benchmarks/peers/environments.py NAME ... --into FOLDER

NAME is a file of `requirements/` without its ending; the environment is FOLDER/NAME. One that is there already is
left as it is. pip takes packages from wherever it is configured to.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"

# Taken away again: they come with LLaMA-Factory, their compiled parts want the one torch they were built for, and
# text needs neither (peers/README.md).
UNUSED = {"llamafactory": ("torchvision", "torchaudio")}


def make(name: str, into: Path) -> None:
    """Make one environment.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    folder = into / name
    done = folder / "installed"
    if done.exists():
        print(f"{name}: already in {folder}")
        return
    print(f"{name}: installing into {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "-r", str(REQUIREMENTS / f"{name}.txt")], check=True)
    if name in UNUSED:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED[name]], check=True)
    done.touch()


def main() -> None:
    """Make the environments of the command line."""
    names = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--into", type=Path, required=True)
    arguments = parser.parse_args()
    for name in arguments.names:
        try:
            make(name, arguments.into.absolute())
        except subprocess.CalledProcessError as error:
            print(f"{name}: pip ended with {error.returncode}", file=sys.stderr)


if __name__ == "__main__":
    main()
