"""A process that never imported moelora loads checkpoints by what they say of themselves."""

import json
import os
import subprocess
import sys

import torch
from bases import causal_base
from checkpoint.stored import mixture_on
from core.mixtures import classifier, tokens

STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

causal, classifier, ids = sys.argv[1:]
assert "moelora" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(causal)
except ValueError as error:
    assert "trust_remote_code=True" in str(error) and causal in str(error), error
else:
    raise AssertionError("code of a folder ran unasked")
ids, *expected = torch.load(ids)
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(causal, trust_remote_code=True)
    assert torch.equal(model(ids).logits, expected[0])
    assert model.config.name_or_path == causal
    auto = AutoModelForSequenceClassification
    model = auto.from_pretrained(classifier, trust_remote_code=True)
    assert torch.equal(model(ids).logits, expected[1])
model.save_pretrained(causal + "-again")
"""


@torch.no_grad()
def test_a_checkpoint_loads_where_nobody_imported_moelora(tmp_path):
    models = {"causal": mixture_on(causal_base()), "classifier": classifier("llama")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, save_base=True)
    ids = tokens()
    torch.save([ids, *(model(ids).logits for model in models.values())], tmp_path / "ids")
    words = [sys.executable, "-c", STRANGER, *(str(tmp_path / n) for n in (*models, "ids"))]
    # Offline, and without code that somebody cached before.
    around = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    made = subprocess.run(
        words, env=around, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    # What one process wrote names the same classes.
    for folder in ("causal", "causal-again"):
        module = (tmp_path / folder / "modeling_moelora.py").read_text()
        assert module.startswith("from moelora import MoeLora") and len(module.splitlines()) == 1
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert set(config["auto_map"]) >= {"AutoConfig"}
        assert hasattr(__import__("transformers"), config["architectures"][0])
