"""What starting costs: the Auto classes know moelora, and what is slow waits for its use."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = (
    *("peft", "accelerate", "transformers.modeling_utils", "transformers.trainer", "sympy"),
    *("triton", "moelora_kernels.triton", "typer", "rich", "scipy"),
)
CODE = f"""
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import PreTrainedConfig

needed = set(sys.modules)
import moelora
known = AutoModelForCausalLM._model_mapping[moelora.MoeLoraConfig]
assert known is moelora.MoeLoraForCausalLM
moelora.MoeLoraConfig(num_experts=2, target_modules=".*q_proj")
loaded = [name for name in {SLOW!r} if name in sys.modules]
assert not loaded, loaded
others = {{name.partition(".")[0] for name in set(sys.modules) - needed}}
others -= {{"moelora", "moelora_kernels"}} | sys.stdlib_module_names
# Small: reshapes in the specification, the format of checkpoints, a module of transformers.
assert others <= {{"einops", "safetensors", "transformers"}}, others
assert set(moelora.__all__) <= set(dir(moelora))
assert all(getattr(moelora, name) is not None for name in moelora.__all__)
assert moelora.training.train_gate is moelora.train_gate
try:
    moelora.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""
HELP = """
import atexit
import sys
from {module} import {function}

def report():
    print([name for name in ("torch", "transformers", "moelora") if name in sys.modules])

atexit.register(report)
{function}()
"""


def _python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_importing_moelora_imports_nothing_slow_and_every_name_is_there():
    made = _python("-c", CODE)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["compose", "--help"], []])
def test_the_command_speaks_without_torch(words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["moelora"].partition(":")
    made = _python("-c", HELP.format(module=module, function=function), *words)
    assert made.stdout.splitlines()[-1] == "[]", made.stdout + made.stderr
    if words == ["--version"]:
        assert made.stdout.startswith(f"moelora {importlib.metadata.version('moelora')}\n")
    else:
        assert "Usage:" in made.stdout + made.stderr


def test_python_m_moelora_is_the_command():
    made = _python("-m", "moelora", "--version")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("moelora ")


def test_a_backend_that_takes_long_to_import_is_there_by_its_name():
    found = _python(
        "-c",
        "import sys, moelora_kernels\n"
        "assert 'triton' in moelora_kernels.BACKENDS and 'triton' not in sys.modules\n"
        "backend = moelora_kernels.BACKENDS['triton']()\n"
        "assert backend is sys.modules['moelora_kernels.triton'] and backend.shrink",
    )
    assert found.returncode == 0, found.stderr
