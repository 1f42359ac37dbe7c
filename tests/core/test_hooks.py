"""Our hooks beside those of others: after unpickling in a new process, and on kept outputs."""

from __future__ import annotations

import subprocess
import sys

import torch
from core.mixtures import causal, tokens
from torch import nn
from training.runs import LOSSES, assert_same, gradients

LATER = """
import sys
import torch
model, expected = torch.load(sys.argv[1], weights_only=False)
ids = torch.load(sys.argv[2])
linears = [m for m in model.modules() if len(m._forward_hooks)]
assert linears
# As many hooks as the experts have, so that each number is given once more.
handles = [m.register_forward_hook(lambda *_: None) for _ in range(40) for m in linears]
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected), "a hook of mine took the experts' place"
for handle in handles:
    handle.remove()
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected), "removing mine removed the experts'"
"""


def test_a_hook_in_the_process_that_unpickled_the_model_takes_no_experts_place(tmp_path):
    model = causal()
    with torch.no_grad():
        torch.save((model, model(tokens()).logits), tmp_path / "model")
    torch.save(tokens(), tmp_path / "ids")
    words = [sys.executable, "-c", LATER, str(tmp_path / "model"), str(tmp_path / "ids")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@torch.no_grad()
def test_an_output_that_an_earlier_hook_kept_is_not_written_into():
    from bases import causal_base
    from core.mixtures import into

    base = causal_base()
    kept = []
    linear: nn.Module = base.model.layers[0].self_attn.q_proj
    linear.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
    model = into(base)
    logits = model(tokens()).logits
    assert torch.equal(*kept[0])
    assert torch.equal(causal()(tokens()).logits, logits)


@torch.no_grad()
def test_an_output_that_a_hook_on_all_modules_kept_is_not_written_into():
    model = causal()
    expected = model(tokens()).logits
    kept = []

    def keep(module, args, out):
        if isinstance(module, nn.Linear):
            kept.append((out, out.clone()))

    handle = nn.modules.module.register_module_forward_hook(keep)
    try:
        assert torch.equal(model(tokens()).logits, expected)
    finally:
        handle.remove()
    assert kept and all(torch.equal(*pair) for pair in kept)


def test_an_alias_of_the_input_is_the_same_input():
    """DeepSpeed's hooks give each linear a tensor of its own: a site was routed once a linear, and
    its router losses counted as often.
    """
    model = causal(**LOSSES).train()
    ids = tokens()
    expected = gradients(model, input_ids=ids, labels=ids)
    calls = []
    for router in model.moelora.router_list:
        router.register_forward_hook(lambda *_: calls.append(1))
    for name in model.moelora.linears():
        linear = model.get_submodule(name)
        linear.register_forward_pre_hook(lambda module, args: (args[0].view_as(args[0]),))
    assert_same(gradients(model, input_ids=ids, labels=ids), expected, 1e-6)
    assert len(calls) == len(model.moelora.router_list)
