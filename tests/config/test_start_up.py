"""What importing moelora costs: the Auto classes know it, and what is slow waits for its use."""

import subprocess
import sys

SLOW = ("peft", "accelerate", "transformers.modeling_utils", "transformers.trainer", "sympy")
CODE = f"""
import sys
import moelora
from transformers import AutoModelForCausalLM

known = AutoModelForCausalLM._model_mapping[moelora.MoeLoraConfig]
assert known is moelora.MoeLoraForCausalLM
moelora.MoeLoraConfig(num_experts=2, target_modules=".*q_proj")
loaded = [name for name in {SLOW!r} if name in sys.modules]
assert not loaded, loaded
assert set(moelora.__all__) <= set(dir(moelora))
assert all(getattr(moelora, name) is not None for name in moelora.__all__)
assert moelora.training.train_gate is moelora.train_gate
try:
    moelora.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""


def test_importing_moelora_imports_nothing_slow_and_every_name_is_there():
    made = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
