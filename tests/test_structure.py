"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moelora

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "moelora_cli.py"
LIBRARY = [COMMAND, *sorted((ROOT / "moelora").rglob("*.py"))]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py")) + sorted((ROOT / "examples").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CODE = LIBRARY + KERNELS + SCRIPTS
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
# What `from moelora import …` promises: a new name is a decision, and so is one that goes.
PUBLIC = [
    "ROUTERS",
    "LoraFactors",
    "MoeLoraCallback",
    "MoeLoraConfig",
    "MoeLoraForCausalLM",
    "MoeLoraForSequenceClassification",
    "PadRouting",
    "PoolChange",
    "Router",
    "Routing",
    "RoutingReport",
    "Texts",
    "register_router",
    "resume_optimizer",
    "train_gate",
]
# What other libraries call by these names is documented there, and by the class.
DOCUMENTED_BY_THE_CLASS = {"forward", "backward"}


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def committed() -> list[Path]:
    """The repository's files, listed without git: a copy without its history is checked too."""
    folders = ("moelora", "kernels", "tests", "benchmarks", "examples", ".ci", ".github")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    text = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ""}
    # Of a worktree .git is a file; scratch is where benchmarks put what is not kept.
    ignored = {".git", "scratch"}
    return [
        path
        for path in sorted([*inside, *ROOT.iterdir()])
        if path.is_file()
        and path.suffix in text
        and not ignored & set(path.relative_to(ROOT).parts)
    ]


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports; relative imports are its own."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add((node.module or "").partition(".")[0])
    return packages


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_files_and_functions_are_short_and_documented(path):
    tree = tree_of_a_short_file(path)
    assert ast.get_docstring(tree)
    assert_functions_are_short(tree)
    public = [
        n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"
    ]
    methods = [n for c in public if isinstance(c, ast.ClassDef) for n in c.body]
    public += [n for n in methods if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    for node in public:
        assert ast.get_docstring(node) or node.name in DOCUMENTED_BY_THE_CLASS, node.name


@pytest.mark.parametrize("path", TESTS, ids=names(TESTS))
def test_tests_are_short_too(path):
    assert_functions_are_short(tree_of_a_short_file(path))


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_an_assignment_has_a_line_of_its_own(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    packed = [node.lineno for node in ast.walk(tree) if packs_assignments(node)]
    assert not packed, "split `a, b = x, y` into lines: lines " + ", ".join(map(str, packed))


def tree_of_a_short_file(path: Path) -> ast.Module:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    return ast.parse(text)


def assert_functions_are_short(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < LINES_OF_A_FUNCTION, node.name


def packs_assignments(node: ast.AST) -> bool:
    """Whether it is `a, b = x, y`; a swap, whose later values read an earlier target, is not."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or len(target.elts) != len(node.value.elts):
        return False
    targets = [ast.unparse(part) for part in target.elts]
    for place, value in enumerate(node.value.elts):
        read = {ast.unparse(part) for part in ast.walk(value) if isinstance(part, ast.expr)}
        if read & set(targets[:place]):
            return False
    return not any(isinstance(part, ast.Starred) for part in (*target.elts, *node.value.elts))


@pytest.mark.parametrize("path", LIBRARY + KERNELS, ids=names(LIBRARY + KERNELS))
def test_library_code_reads_no_environment(path):
    assert not re.search(r"\b(environb?|getenv|putenv)\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_kernels_import_torch_triton_einops_and_the_standard_library(path):
    assert imported(path) <= {"torch", "triton", "einops"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_the_library_imports_neither_examples_nor_benchmarks(path):
    assert not imported(path) & {"examples", "benchmarks", "tests"}


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_the_library_imports_only_what_pip_installs_with_it(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["plots"] + extras["search"] + extras["replay"]
    declared += extras["vllm"] if "vllm" in path.parent.name else []
    packages = {re.split(r"[^\w-]", requirement)[0] for requirement in declared}
    packages |= {"sklearn"} if "scikit-learn" in packages else set()
    own = {"moelora"} if path == COMMAND else {"moelora_kernels"}
    own |= {"moelora_cli"} if path.name == "__main__.py" else set()
    assert imported(path) <= packages | own | sys.stdlib_module_names


def test_the_command_is_in_no_package_and_so_imports_by_full_names():
    tree = ast.parse(COMMAND.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imports and not [node.module for node in imports if node.level]


def test_no_catch_all_and_no_package_that_shadows_another():
    assert not [path for path in CODE + TESTS if path.name == "utils.py"]
    # transformers imports the PyPI package `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_type_checkers_read_the_annotations_of_both_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    data = project["tool"]["setuptools"]["package-data"]
    for package, folder in (("moelora", ROOT), ("moelora_kernels", ROOT / "kernels")):
        assert (folder / package / "py.typed").exists()
        assert "py.typed" in data[package]


def test_what_is_public_is_there():
    models = {"MoeLoraForCausalLM", "MoeLoraForSequenceClassification"}
    assert moelora.__all__ == PUBLIC
    assert all(hasattr(moelora, name) for name in moelora.__all__)
    methods = [
        "from_base",
        "from_pretrained",
        "save_pretrained",
        "route",
        "use_experts",
        "freeze_experts",
        "unload",
    ]
    for model in models:
        assert all(callable(getattr(getattr(moelora, model), method)) for method in methods)


def test_the_configuration_has_the_words_of_the_field():
    words = """
        num_experts num_experts_per_tok r lora_alpha lora_dropout use_rslora target_modules
        layers_to_transform expert_names router routing_level router_scope router_layer
        router_prefix_tokens norm_topk_prob router_jitter_noise router_aux_loss_coef
        router_z_loss_coef router_bias_update_rate
    """
    assert set(words.split()) <= set(inspect.signature(moelora.MoeLoraConfig.__init__).parameters)


def test_committed_files_name_no_registry_and_no_path_of_a_machine():
    # In parts, since this file is among those that are searched.
    hosts = ["".join(parts) for parts in (("py", "pi."), ("python", "hosted"), ("npm", "js."))]
    folders = [f"/{folder}/" for folder in ("root", "home", "work", "tmp")]
    pattern = re.compile("|".join(map(re.escape, hosts + folders)))
    assert {"README.md", "Makefile", "run", "test_structure.py"} <= {
        path.name for path in committed()
    }
    for path in committed():
        assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_both_packages_import_away_from_the_checkout(tmp_path):
    words = [sys.executable, "-c", "import moelora, moelora_kernels; print(moelora.__version__)"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == moelora.__version__
