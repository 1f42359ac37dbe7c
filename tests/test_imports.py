"""Who imports whom: no circle in either package, and no room that imports one above it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PACKAGES = {"moelora": ROOT / "moelora", "moelora_kernels": ROOT / "kernels" / "moelora_kernels"}
# Each line imports the lines above it alone, and the rooms of one line do not import each other.
ROOMS = (
    ("validation", "host_internals"),
    ("backtracking", "placement", "registry"),
    ("config_checks",),
    ("config",),
    ("routers",),
    ("core",),
    ("injection",),
    ("checkpoint",),
    ("training",),
    ("adapters",),
    ("expert_pool",),
    ("recipes",),
    ("rooms",),
    ("pool_modeling",),
    ("modeling",),
    ("serving", "vllm"),
    ("__main__",),
)
LEVELS = {room: level for level, line in enumerate(ROOMS) for room in line}
# The package itself hands out what is public, so it stands above every room but the command line.
LEVELS["moelora"] = LEVELS["serving"]


class Import(NamedTuple):
    """One module names another; inside a function or at the module's top."""

    importer: str
    imported: str
    line: int
    in_function: bool


def modules_of(package: str) -> dict[str, Path]:
    """Every module of the package by its dotted name; a folder's name is its __init__.py's."""
    folder = PACKAGES[package]
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = path
    return modules


def imports_of(name: str, modules: dict[str, Path]) -> list[Import]:
    """What a module imports of its own package, for types and inside functions included."""
    tree = ast.parse(modules[name].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    nodes_in_functions = {inner for function in functions for inner in ast.walk(function)}
    statements = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [
        Import(name, target, statement.lineno, statement in nodes_in_functions)
        for statement in statements
        for target in targets_of(statement, name, modules)
    ]


def targets_of(node: ast.Import | ast.ImportFrom, name: str, modules: dict[str, Path]) -> set[str]:
    """The modules of this package that one import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & modules.keys()
    source = node.module or ""
    if node.level:
        is_folder = modules[name].name == "__init__.py"
        package = name.split(".")[: None if is_folder else -1]
        package = package[: len(package) - (node.level - 1)]
        source = ".".join([*package, source] if source else package)
    # `from package import module` names the module; `from module import thing` the module too.
    inner = {f"{source}.{alias.name}" for alias in node.names}
    named = inner & modules.keys()
    return named if named == inner else named | ({source} & modules.keys())


def all_imports(package: str) -> list[Import]:
    """Every import of a module of the package by another one."""
    modules = modules_of(package)
    return [statement for name in modules for statement in imports_of(name, modules)]


def room_of(module: str) -> str:
    """The folder or file directly in moelora/; the package's own __init__.py is "moelora"."""
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    graph: dict[str, set[str]] = {}
    for statement in all_imports(package):
        graph.setdefault(statement.importer, set()).add(statement.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " imports ".join(reversed(error.args[1]))
        pytest.fail(f"a circle of imports: {circle}")


def test_every_room_has_a_place_in_the_order():
    assert {room_of(module) for module in modules_of("moelora")} <= LEVELS.keys()


def test_no_room_imports_one_above_it():
    upward = []
    for statement in all_imports("moelora"):
        importer = room_of(statement.importer)
        imported = room_of(statement.imported)
        if importer != imported and LEVELS[imported] >= LEVELS[importer]:
            upward.append(f"{statement.importer}:{statement.line} imports {statement.imported}")
    assert not upward, "\n".join(upward)
