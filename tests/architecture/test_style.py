"""Sizes, names, docstrings and forbidden statements of the source."""

import ast
import re
from collections.abc import Iterator

from architecture.source import (
    PACKAGE,
    ROOT,
    Definition,
    FunctionNode,
    called_name,
    docstring_lines,
    fail_if_any,
    imports,
    modules,
    nodes,
    public_definitions,
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring
MAX_POSITIONAL = 4  # without self; two are the aim, the rest keyword-only
# "module:function": why somebody else fixes its positional arguments.
LONG_SIGNATURES: dict[str, str] = {}

EMPTY_NAMES = re.compile(r"(?:^|_)(?:utils?|commons?|helpers?|misc)$")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
TEXT_SUFFIXES = {".py", ".yaml", ".yml", ".md", ".jinja", ".html", ".css", ".js"}
UNSAFE_PACKAGES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
PRINTING = {"cli"}


def test_files_are_short() -> None:
    lengths = ((module, len(module.text.splitlines())) for module in modules().values())
    fail_if_any(
        (f"{module.at(1)} {length} lines" for module, length in lengths if length > MAX_FILE_LINES),
        f"files of more than {MAX_FILE_LINES} lines (split by idea):",
    )


def test_functions_are_short() -> None:
    offenders = [
        f"{module.at(node.lineno)} {node.name} {length} lines"
        for module, node in nodes()
        if isinstance(node, FunctionNode) and (length := _length(node)) > MAX_FUNCTION_LINES
    ]
    fail_if_any(offenders, f"functions of more than {MAX_FUNCTION_LINES} lines without the docstring:")


def _length(node: FunctionNode) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)


def test_arguments_are_named() -> None:
    offenders = [
        f"{found.where} ({', '.join(names)})"
        for found in public_definitions()
        if len(names := _positional(found)) > MAX_POSITIONAL
        and f"{found.module.name}:{found.name}" not in LONG_SIGNATURES
    ]
    fail_if_any(
        offenders,
        f"more than {MAX_POSITIONAL} positional arguments (put a `*` after the first two; LONG_SIGNATURES for those "
        "that a library calls by position):",
    )


def _positional(found: Definition) -> list[str]:
    if isinstance(found.node, ast.ClassDef):
        return []
    names = [argument.arg for argument in (*found.node.args.posonlyargs, *found.node.args.args)]
    if names[:1] == ["ctx"]:  # torch.autograd.Function: PyTorch passes everything by position
        return []
    decorators = {ast.unparse(decorator) for decorator in found.node.decorator_list}
    return names[1:] if found.is_method and "staticmethod" not in decorators else names


def test_names_say_something() -> None:
    paths = sorted(path for path in PACKAGE.rglob("*") if path.is_dir() or path.suffix == ".py")
    fail_if_any(
        (str(path.relative_to(ROOT)) for path in paths if EMPTY_NAMES.search(path.stem)),
        "files or folders named for nothing (utils, common, helpers, misc):",
    )


def test_nothing_is_left_for_later() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in TEXT_SUFFIXES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    fail_if_any(offenders, "marks of unfinished work:")


# Modules that hide one warning of another library, by its message, and why.
HIDDEN_WARNINGS = {
    "loralab.models.adapters": "PEFT reads a property that transformers has renamed",
    "loralab.training.deepspeed_library": "DeepSpeed warns while it is imported, of kernels that nothing uses",
}


def test_forbidden_statements() -> None:
    offenders = [
        f"{module.at(node.lineno)} {what}"  # type: ignore[attr-defined]
        for module, node in nodes()
        for what in _forbidden(node, may_print=module.group in PRINTING)
        if not (what == "hides warnings" and module.name in HIDDEN_WARNINGS)
    ]
    fail_if_any(offenders, "statements that do not belong in src:")


def _forbidden(node: ast.AST, *, may_print: bool) -> Iterator[str]:
    match node:
        case ast.Assert():
            yield "assert (raise an error of loralab.errors)"
        case ast.ExceptHandler(type=None):
            yield "bare except (name the error)"
        case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
            yield f"{name}()"
        case ast.Call(func=ast.Name(id="print")) if not may_print:
            yield "print() (log; only the CLI prints)"
        case ast.Call() if called_name(node) == "filterwarnings" or called_name(node) == "simplefilter":
            yield "hides warnings"


def test_no_unsafe_serialisation() -> None:
    fail_if_any(
        (f"{found.where} {found.target}" for found in imports() if found.target.split(".")[0] in UNSAFE_PACKAGES),
        "imports of packages that run code when they read a file:",
    )


def test_everything_public_has_a_docstring() -> None:
    documented = [found for found in public_definitions() if not _needs_no_docstring(found)]
    missing = [found.where for found in documented if ast.get_docstring(found.node) is None]
    # An empty __init__.py has nothing to say.
    bare = [m.at(1) for m in modules().values() if m.tree.body and ast.get_docstring(m.tree) is None]
    fail_if_any(bare + missing, "without a docstring:")


def _needs_no_docstring(found: Definition) -> bool:
    if found.node.name == "__init__":  # the class has its Args
        return True
    decorators = {ast.unparse(decorator) for decorator in found.node.decorator_list}
    return any(name in {"overload", "typing.overload"} or name.endswith(".setter") for name in decorators)
