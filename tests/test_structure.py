"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moelora

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "moelora").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py")) + sorted((ROOT / "examples").rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports; relative imports are its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", LIBRARY + KERNELS + SCRIPTS, ids=names(LIBRARY + KERNELS + SCRIPTS))
def test_files_and_functions_are_short_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (400 if path in KERNELS else 300)
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 50, node.name
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", LIBRARY + KERNELS, ids=names(LIBRARY + KERNELS))
def test_library_code_reads_no_environment(path):
    assert not re.search(r"os\.environ|os\.getenv", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_kernels_import_torch_triton_einops_and_the_standard_library(path):
    assert imported(path) <= {"torch", "triton", "einops"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_the_library_imports_neither_examples_nor_benchmarks(path):
    assert not imported(path) & {"examples", "benchmarks", "tests"}


def test_no_catch_all_and_no_package_that_shadows_another():
    assert not list(ROOT.glob("moelora/**/utils.py")) + list(ROOT.glob("kernels/**/utils.py"))
    # transformers imports the PyPI package `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_what_is_public_is_there():
    public = {"MoeLoraConfig", "MoeLoraForCausalLM", "MoeLoraForSequenceClassification", "register_router"}
    assert public <= set(moelora.__all__)
    for method in (
        "from_base",
        "from_pretrained",
        "save_pretrained",
        "route",
        "use_experts",
        "freeze_experts",
    ):
        assert callable(getattr(moelora.MoeLoraForCausalLM, method))


def test_committed_files_name_no_registry_and_no_path_of_a_machine():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    # In parts, since this file is among those that are searched.
    hosts = ["".join(parts) for parts in (("py", "pi."), ("python", "hosted"), ("npm", "js."))]
    folders = [f"/{folder}/" for folder in ("root", "home", "work", "tmp")]
    pattern = re.compile("|".join(map(re.escape, hosts + folders)))
    for name in tracked:
        path = ROOT / name
        if path.suffix != ".png" and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8")), name


def test_both_packages_import_away_from_the_checkout(tmp_path):
    words = [sys.executable, "-c", "import moelora, moelora_kernels; print(moelora.__version__)"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == moelora.__version__
