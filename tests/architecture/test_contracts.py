"""Promises that hold across files: no setting is ignored, one place prompts, the public names, Trainer's methods."""

import ast
import importlib.util
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import loralab
from architecture.source import PACKAGE, ROOT, FunctionNode, Module, fail_if_any, modules, nodes

PUBLIC_NAMES = ["LoralabError", "Run", "__version__", "train"]
# What the subclass of transformers.Trainer overrides: public methods, each for a reason given in its docstring.
TRAINER_OVERRIDES = {
    "create_accelerator_and_postprocess",
    "create_optimizer",
    "evaluate",
    "floating_point_ops",
    "get_batch_samples",
    "get_train_dataloader",
    "log",
    "save_model",
    "training_step",
}
PROMPTER = "loralab.data.prompts.prompter"
SCHEMA = ("loralab.config.schema", "loralab.config.training_schema", "loralab.config.output_schema")


def test_public_names_are_exact() -> None:
    assert sorted(loralab.__all__) == PUBLIC_NAMES


def test_version_is_the_project_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert loralab.__version__ == project["version"]


def test_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_every_schema_field_is_read() -> None:
    unread = [
        f"{class_name}: {section}.{field}"
        for section, class_name, field in _fields("Config", "config")
        if (section, field) not in _attributes_read()
    ]
    fail_if_any(
        unread,
        "settings that no code reads (write `<section>.<field>`, as in `training.seed` or `config.training.seed`):",
    )


def _fields(class_name: str, section: str) -> Iterator[tuple[str, str, str]]:
    """Yield (section, class, field) for a class of the schema and the sections in it."""
    bodies = [node for name in SCHEMA for node in modules()[name].tree.body]
    classes = {node.name: node for node in bodies if isinstance(node, ast.ClassDef)}
    for statement in classes[class_name].body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        field = statement.target.id
        yield section, class_name, field
        for node in ast.walk(statement.annotation):
            if isinstance(node, ast.Name) and node.id in classes:
                yield from _fields(node.id, field)


@cache
def _attributes_read() -> frozenset[tuple[str, str]]:
    """Return every (owner, attribute) that is read outside the schema: `a.b.c` gives (a, b) and (b, c)."""
    return frozenset(
        (owner, node.attr)
        for module, node in nodes()
        if module.name not in SCHEMA and isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        for owner in _last_name(node.value)
    )


def _last_name(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield name


def test_only_the_prompter_renders_prompts() -> None:
    offenders = [
        module.at(node.lineno)  # type: ignore[attr-defined]
        for module, node in nodes()
        if module.name != PROMPTER and _names_chat_template_call(node)
    ]
    fail_if_any(offenders, f"apply_chat_template belongs in {PROMPTER} alone:")


def _names_chat_template_call(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr="apply_chat_template") | ast.Constant(value="apply_chat_template"):
            return True
    return False


def test_trainer_is_subclassed_through_public_methods() -> None:
    own = _trainer_methods()
    private, overridden = [], set()
    for module, node in _trainer_subclasses():
        for name, line in _assigned_names(node):
            if name in own and name.startswith("_") and name != "__init__":
                private.append(f"{module.at(line)} {node.name}.{name}")
            elif name in own and name != "__init__":
                overridden.add(name)
    fail_if_any(private, "private methods of transformers.Trainer that are overridden:")
    fail_if_any(
        [f"{name}: overridden, not listed" for name in sorted(overridden - TRAINER_OVERRIDES)]
        + [f"{name}: listed, not overridden" for name in sorted(TRAINER_OVERRIDES - overridden)],
        "overridden methods of transformers.Trainer that differ from TRAINER_OVERRIDES:",
    )


def test_listed_overrides_are_methods_of_trainer() -> None:
    fail_if_any(sorted(TRAINER_OVERRIDES - _trainer_methods()), "not methods of the installed transformers.Trainer:")


def _trainer_methods() -> set[str]:
    """Return the methods of the installed `Trainer`, read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.submodule_search_locations
    source = (Path(found.submodule_search_locations[0]) / "trainer.py").read_text(encoding="utf-8")
    trainer = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Trainer")
    return {name for name, _ in _assigned_names(trainer)}


def _trainer_subclasses() -> list[tuple[Module, ast.ClassDef]]:
    classes = [(module, node) for module, node in nodes() if isinstance(node, ast.ClassDef)]
    family, size = {"Trainer"}, 0
    while size < len(family):  # subclasses of subclasses
        size = len(family)
        family |= {node.name for _, node in classes if family & _bases(node)}
    return [(module, node) for module, node in classes if family & _bases(node)]


def _bases(node: ast.ClassDef) -> set[str]:
    return {name for base in node.bases for name in _last_name(base)}


def _assigned_names(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    for statement in node.body:
        if isinstance(statement, FunctionNode):
            yield statement.name, statement.lineno
        elif isinstance(statement, ast.Assign):
            yield from ((target.id, statement.lineno) for target in statement.targets if isinstance(target, ast.Name))
