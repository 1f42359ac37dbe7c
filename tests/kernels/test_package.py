"""The package stands alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import moelora_kernels
import pytest

FOLDER = Path(moelora_kernels.__file__).parent
ALLOWED = {"torch", "triton", "einops"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FOLDER.rglob("*.py"), ids=lambda path: path.name)
def test_imports_only_torch_triton_einops_and_itself(path: Path) -> None:
    """Itself by relative imports, so that the folder can be taken elsewhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert {name.split(".")[0] for name in names} <= ALLOWED


def test_the_reference_shares_no_helper_with_a_backend() -> None:
    tree = ast.parse((FOLDER / "reference.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "einops", "torch", "layout", "plan"}


def test_there_is_no_package_named_kernels() -> None:
    """transformers imports a package of that name from PyPI."""
    assert not (FOLDER.parent / "__init__.py").exists()
