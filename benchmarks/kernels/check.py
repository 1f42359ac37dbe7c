"""Every candidate against the specification in float64 before its time is taken."""

from __future__ import annotations

import torch
from einops import rearrange
from moelora_kernels import reference
from torch import Tensor

from benchmarks.kernels.candidates import SCALING, Candidate, Inputs

# ‖got − wanted‖ / ‖wanted‖ of each tensor: some roundings of the dtype, much less than one wrong
# expert.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("y", "dx", "dA", "dB", "dweights")
# A weight's gradient is one scalar product over d_out, whose terms nearly cancel where tokens are
# few.
CANCELLING = {"dweights": 10.0}
# A loop over experts rounds y once an expert, which is no fault of a peer.
PEERS = 5.0
TOKENS = 128
# The gradient of a slice is as large as what it is cut from: give the reference few experts at a
# time.
EXPERTS_AT_ONCE = 16


class WrongResult(AssertionError):
    """A candidate that does not compute the mixture."""


class Specification:
    """The mixture and its gradients in float64 on some tokens of a case, evenly picked; dy is 0
    elsewhere.
    """

    def __init__(self, inputs: Inputs) -> None:
        count = inputs.case.tokens
        step = max(1, count // TOKENS)
        self.inputs = inputs
        self.picked = torch.arange(0, count, step, device=inputs.x.device)
        self.dy = torch.zeros_like(inputs.dy)
        self.dy[self.picked] = inputs.dy[self.picked]
        self.wanted = dict(zip(NAMES, self._compute(), strict=True))

    def check(self, candidate: Candidate) -> None:
        """Raise WrongResult unless output and gradients are those of the specification."""
        inputs = self.inputs
        leaves = candidate.trained(inputs)
        allowed = TOLERANCES[inputs.x.dtype] * (1.0 if candidate.backend else PEERS)
        y = candidate.run(inputs)
        grads = torch.autograd.grad(y, leaves, self.dy)
        got = (y.detach()[self.picked], grads[0][self.picked], *grads[1:])
        for (name, wanted), value in zip(self.wanted.items(), got, strict=True):
            error = float((value.double() - wanted).norm() / wanted.norm())
            if not error <= allowed * CANCELLING.get(name, 1.0):
                raise WrongResult(f"{name} is off by {error:.1e}")

    def _compute(self) -> tuple[Tensor, ...]:
        inputs = self.inputs
        case = self.inputs.case
        x = _leaf(inputs.x[self.picked])
        weights = _leaf(inputs.weights)
        rows = self.picked // case.tokens_per_row
        ids = inputs.ids[rows]
        token_weights = weights[rows]
        used = ids.unique()
        chunks = used.split(EXPERTS_AT_ONCE)
        factors = [
            [_leaf(rearrange(inputs.by_expert(f)[c], "E r d -> (E r) d")) for c in chunks]
            for f in (inputs.A, inputs.B)
        ]
        y = x @ inputs.base.double().T
        for chunk, A, B in zip(chunks, *factors, strict=True):
            local = torch.where(torch.isin(ids, chunk), torch.searchsorted(chunk, ids), -1)
            offsets = tuple(range(0, len(A) + 1, case.rank))
            y = reference.lora_mixture(
                x, A, B, local, token_weights, offsets, (SCALING,) * len(chunk), y
            )
        leaves = (x, weights, *factors[0], *factors[1])
        dx, dweights, *parts = torch.autograd.grad(y, leaves, inputs.dy[self.picked].double())
        dA, dB = (
            self._of_all_experts(used, part)
            for part in (parts[: len(chunks)], parts[len(chunks) :])
        )
        return y.detach(), dx, dA, dB, dweights

    def _of_all_experts(self, used: Tensor, parts: list[Tensor]) -> Tensor:
        """The gradient [R, d], 0 for experts that no picked token chose."""
        case = self.inputs.case
        computed = torch.cat(parts)
        grad = computed.new_zeros(case.experts, case.rank, computed.shape[1])
        grad[used] = rearrange(computed, "(E r) d -> E r d", r=case.rank)
        return rearrange(grad, "E r d -> (E r) d")


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()
