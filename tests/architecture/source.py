"""The source as the architecture tests see it: parsed files, their imports and definitions. No loralab import."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "loralab"
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Module:
    """One Python file of the package; `name` is dotted, as it is imported."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether the file is an `__init__.py`."""
        return self.path.name == "__init__.py"

    @property
    def group(self) -> str:
        """The part of the package that the file belongs to: `data` for loralab.data.formats.table, "" for loralab."""
        return group_of(self.name)

    def at(self, line: int) -> str:
        """Return `file:line`, from the root of the repository."""
        return f"{self.path.relative_to(ROOT)}:{line}"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module; `target` is absolute, `attribute` what `from target import attribute` takes from it."""

    importer: Module
    target: str
    attribute: str | None
    line: int
    deferred: bool

    @property
    def where(self) -> str:
        """File and line of the import."""
        return self.importer.at(self.line)

    @property
    def is_internal(self) -> bool:
        """Whether loralab imports itself here."""
        return self.target.partition(".")[0] == "loralab"


@dataclass(frozen=True, slots=True)
class Definition:
    """A function, method or class that is reachable by public names only; `name` is `Class.method` for a method."""

    module: Module
    name: str
    node: FunctionNode | ast.ClassDef
    is_method: bool

    @property
    def where(self) -> str:
        """File, line and name."""
        return f"{self.module.at(self.node.lineno)} {self.name}"


def fail_if_any(offenders: Iterable[str], rule: str) -> None:
    """Fail with the rule and every offender below it, if there is one."""
    found = list(offenders)
    if found:
        pytest.fail(f"{rule}\n" + "\n".join(f"  {line}" for line in found), pytrace=False)


def group_of(name: str) -> str:
    """Return the second part of a dotted name: `data` for loralab.data.formats.table, "" for loralab."""
    return name.split(".")[1] if "." in name else ""


@cache
def modules() -> dict[str, Module]:
    """Return every Python file of the package by dotted name."""
    found = [_parse(path) for path in sorted(PACKAGE.rglob("*.py"))]
    return {module.name: module for module in found}


def _parse(path: Path) -> Module:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    text = path.read_text(encoding="utf-8")
    return Module(".".join(parts), path, text, ast.parse(text, filename=str(path)))


def nodes() -> Iterator[tuple[Module, ast.AST]]:
    """Yield every syntax node of the package with its module."""
    for module in modules().values():
        for node in ast.walk(module.tree):
            yield module, node


@cache
def imports() -> tuple[Import, ...]:
    """Return every import of the package, those in functions and through `import_module("...")` included."""
    return tuple(found for module in modules().values() for found in _imports_below(module, module.tree, False))


def _imports_below(module: Module, node: ast.AST, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for target, attribute in _targets(module, child):
            yield Import(module, target, attribute, child.lineno, deferred)  # type: ignore[attr-defined]
        in_function = deferred or isinstance(child, FunctionNode | ast.Lambda)
        yield from _imports_below(module, child, in_function)


def _targets(module: Module, node: ast.AST) -> Iterator[tuple[str, str | None]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(module, node)
        for alias in node.names:
            is_module = f"{base}.{alias.name}" in modules()
            yield (f"{base}.{alias.name}", None) if is_module else (base, alias.name)
    elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"}:
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value, None


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".") + (["__init__"] if module.is_package else [])
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def called_name(call: ast.Call) -> str:
    """Return the last part of what a call names: `run` for `a.b.run()`, "" where it has no name."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


@cache
def public_definitions() -> tuple[Definition, ...]:
    """Return public functions, public classes and the public methods and `__init__` of those classes."""
    return tuple(found for module in modules().values() for found in _definitions(module, module.tree.body))


def _definitions(module: Module, body: list[ast.stmt], owner: str = "") -> Iterator[Definition]:
    for node in body:
        if not isinstance(node, FunctionNode | ast.ClassDef) or not _is_public(node.name, in_class=bool(owner)):
            continue
        name = f"{owner}.{node.name}" if owner else node.name
        yield Definition(module, name, node, bool(owner) and not isinstance(node, ast.ClassDef))
        if isinstance(node, ast.ClassDef):
            yield from _definitions(module, node.body, name)


def _is_public(name: str, *, in_class: bool) -> bool:
    return not name.startswith("_") or (in_class and name == "__init__")


def docstring_lines(node: FunctionNode) -> int:
    """Return how many lines the docstring of a function takes."""
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is None or first.end_lineno is None:
        return 0
    return first.end_lineno - first.lineno + 1
