"""Imports run one way, happen at the top, and are light where a command must answer at once."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from architecture.source import PACKAGE, ROOT, Import, fail_if_any, group_of, imports, modules

# Lowest first. A part imports from itself and from lower lines, never from its own line or a higher one.
LAYERS = (
    ("errors",),
    ("run", "lookup", "progress"),
    ("config",),
    ("data", "models", "layout", "hub"),
    ("training", "evaluation", "reports", "judging", "export", "doctor"),
    ("workflows",),
    ("api", "console", "options"),
    ("cli",),
    ("__main__",),
)
# (importer, imported) on one line, each with its reason.
SIDEWAYS = {
    ("layout", "data"): "the planner lays out tokenized examples",
    ("judging", "reports"): "one reports/html.py renders every page, and pictures are found one way",
    ("data", "hub"): "which revision of a data set is a commit, that never moves",
    ("models", "hub"): "what of a base lies in the cache, so that its loading asks the Hub nothing",
    ("evaluation", "training"): "one loop in training/loss.py runs every forward that has a loss",
}
# Parts that import less than their line allows.
ONLY_FROM = {
    "": {"errors", "api"},  # the package itself: its public names, the heavy ones on first use
    "reports": {"config", "run", "lookup", "errors"},  # `loralab report` works without torch
    "hub": {"config", "run", "errors"},  # what goes up and down knows files, not models
}
# Folders without code.
DATA_ONLY = {"recipes", "demo"}
# Parts that import inside functions: one command's imports each; the public names on first use.
LAZY = {"cli", ""}
# (module, imported package): why this import must wait. Only other people's packages.
DEFERRED: dict[tuple[str, str], str] = {
    ("loralab.export.gguf_library", "gguf"): "an extra; where it is missing the error says what to install",
    ("loralab.training.deepspeed_library", "deepspeed"): "an extra, and one that takes seconds to import",
}

TORCH_STACK = {"torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes"}
SLOW_TO_IMPORT = TORCH_STACK | {"matplotlib", "scipy", "sklearn", "pandas", "pyarrow"}
# Part: what importing it must not load. `--help` and configuration errors answer in half a second.
LIGHT = {
    **dict.fromkeys(("", "errors", "lookup", "run", "config", "cli"), SLOW_TO_IMPORT),
    "reports": TORCH_STACK,
    "judging": SLOW_TO_IMPORT - {"matplotlib"},  # a page opens at once
}
# Import name: distribution name, where they differ; pydantic_core is a part of pydantic with its own import name.
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "pydantic_core": "pydantic"}


def test_every_part_has_a_layer() -> None:
    known = {part for line in LAYERS for part in line} | DATA_ONLY | {""}
    fail_if_any(
        (f"{module.at(1)}" for module in modules().values() if module.group not in known),
        "parts of the package without a line in LAYERS:",
    )


def test_imports_run_one_way() -> None:
    fail_if_any(
        (f"{found.where} imports {found.target}: {reason}" for found in imports() for reason in _objections(found)),
        "imports against the layers:",
    )


def _objections(found: Import) -> Iterator[str]:
    importer, imported = found.importer.group, group_of(found.target)
    if not found.is_internal or found.target == found.importer.name:
        return
    if found.target == "loralab":
        if found.attribute != "__version__":
            yield "inside the package only __version__ is taken from loralab itself"
    elif importer == imported or (importer, imported) in SIDEWAYS:
        return
    elif importer in ONLY_FROM:
        if imported not in ONLY_FROM[importer]:
            yield f"{importer or 'loralab'} imports only from {', '.join(sorted(ONLY_FROM[importer]))}"
    elif _height(imported) >= _height(importer):
        yield f"{imported} is not below {importer}"


def _height(part: str) -> int:
    return next((height for height, line in enumerate(LAYERS) if part in line), -1)


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if not found.deferred and found.target in graph and found.target != found.importer.name:
            graph[found.importer.name].add(found.target)
    reach = {name: _reachable(graph, name) for name in graph}
    cycles = {
        " <-> ".join(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    fail_if_any(sorted(cycles), "modules that import one another in a ring:")


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(graph[name])
    return seen


def test_no_deferred_imports() -> None:
    deferred = [found for found in imports() if found.deferred and found.importer.group not in LAZY]
    used = {(found.importer.name, found.target.partition(".")[0]) for found in deferred}
    offenders = [
        f"{found.where} imports {found.target} inside a function"
        for found in deferred
        if found.is_internal or (found.importer.name, found.target.partition(".")[0]) not in DEFERRED
    ]
    stale = [f"DEFERRED names {entry}, which is not there any more" for entry in DEFERRED.keys() - used]
    fail_if_any(offenders + stale, "imports belong at the top of the file (exceptions with a reason: DEFERRED):")


def test_data_folders_hold_no_code() -> None:
    offenders = [
        module.at(1)
        for module in modules().values()
        if module.group in DATA_ONLY and not (module.is_package and len(module.tree.body) <= 1)
    ]
    fail_if_any(offenders, f"code in a folder for data ({', '.join(sorted(DATA_ONLY))}):")


@pytest.mark.parametrize("name", [name for name, module in modules().items() if module.group in LIGHT])
def test_import_is_light(name: str) -> None:
    program = f"import sys, {name}; print(*sorted({{module.partition('.')[0] for module in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    fail_if_any(sorted(LIGHT[group_of(name)] & set(done.stdout.split())), f"importing {name} also loads:")


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    declared, extra = (
        {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in lines}
        for lines in (project["dependencies"], optional)
    )
    offenders = [
        f"{found.where} imports {package}"
        for found in imports()
        if (package := found.target.partition(".")[0]) not in sys.stdlib_module_names | {"loralab"}
        and (name := DISTRIBUTIONS.get(package, package).replace("_", "-")) not in declared
        # An extra may be missing: only what waits, with a reason in DEFERRED, may import one.
        and not (name in extra and (found.importer.name, package) in DEFERRED)
    ]
    fail_if_any(offenders, "packages that pyproject.toml does not list as dependencies:")
