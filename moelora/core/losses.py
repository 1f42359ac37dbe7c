"""Router losses: what each costs a row, and the one mechanism that brings their gradient to the
router.

The losses are not added to `outputs.loss`: that loses them under reentrant checkpointing,
`compute_loss_func` and label smoothing, and mixes them into the evaluation loss. Instead
`attach_loss` ties the loss to the routing weights with an autograd node, as Megatron-LM does for
its MoE layers; whatever the training loop computes from the model, a backward pass through the
weights adds the router loss's gradient. Its scale is the one that the loop gave to `outputs.loss`
(gradient accumulation, fp16 scaler, data parallelism), which `LossProbe` reads at the loss, since
the backward pass visits it before any layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .forward_pass import ForwardState

IGNORE = -100


def load_balancing_loss(logits: Tensor, fractions: Tensor) -> Tensor:
    """E · Σ_e f_e p_e of each row (arXiv:2101.03961, eq. 4, before the mean over tokens); 1 when
    balanced.

    logits `[N, E]`; fractions `[E]`: the share of the slots that each expert got, a constant. With
    `null_expert` that choice counts as an expert.
    Returns `[N]`: additive over rows because the fractions are given.
    """
    return logits.shape[-1] * (logits.softmax(-1) @ fractions.to(logits.dtype))


def z_loss(logits: Tensor) -> Tensor:
    """(log Σ_e exp(logit_e))² of each row `[N]` (arXiv:2202.08906, eq. 5, before the mean over
    tokens).
    """
    return logits.logsumexp(-1).square()


def expert_target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row's logits `[N, E]` with its expert `[N]`; 0 where the target is
    −100.
    """
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def check_expert_targets(
    targets: Tensor, batch: int, length: int, num_choices: int, level: str
) -> None:
    """Raise ValueError where `targets` are no choices' numbers `[batch]`, or `[batch, length]` at
    token level.
    """
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"expert_targets has dtype {targets.dtype}; expected integers (expert numbers or −100)."
        )
    allowed = [(batch,)] if level == "sequence" else [(batch,), (batch, length)]
    if tuple(targets.shape) not in allowed:
        raise ValueError(
            f"expert_targets has shape {tuple(targets.shape)}; expected one of {allowed} for this batch at "
            f"routing_level={level!r}."
        )
    bad = targets[(targets != IGNORE) & ((targets < 0) | (targets >= num_choices))]
    if bad.numel():
        raise ValueError(
            f"expert_targets contains {sorted(set(bad.tolist()))[:5]}; expected 0 … {num_choices - 1}, "
            "or −100 to leave a row out."
        )


def attach_loss(weights: Tensor, loss: Tensor, state: ForwardState) -> Tensor:
    """Return `weights` unchanged; in the backward pass `loss` (0-dim) gets the gradient
    `state.loss_gradient`.
    """
    return _AttachLoss.apply(weights, loss, state)


def probe_loss(loss: Tensor, state: ForwardState) -> Tensor:
    """Return `loss` unchanged; in the backward pass write its gradient into `state.loss_gradient`."""
    return _LossProbe.apply(loss, state)


def sole_loss(value: Tensor, logits: Tensor, state: ForwardState) -> Tensor:
    """`value` (0-dim) as a loss of its own: backward through it reaches what is attached to the
    weights, alone.

    It does so by a gradient of 0 for `logits`, through whatever lies between (checkpointed layers
    too).
    """
    return _SoleLoss.apply(logits, value, state)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, loss, state):
        ctx.state = state
        ctx.like = loss.new_empty(())
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, *grads):
        gradient = ctx.state.loss_gradient
        if not isinstance(gradient, Tensor):
            return grads[0], torch.full_like(ctx.like, gradient), None
        return grads[0], gradient.to(ctx.like), None


class _SoleLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, value, state):
        ctx.state = state
        ctx.save_for_backward(logits)
        return value.clone()

    @staticmethod
    def backward(ctx, *grads):
        ctx.state.loss_gradient = grads[0].detach()
        (logits,) = ctx.saved_tensors
        return torch.zeros_like(logits), None, None


class _LossProbe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, state):
        ctx.state = state
        # A copy, not a view: Trainer scales the loss in place, which autograd forbids on a
        # Function's view.
        return loss.clone()

    @staticmethod
    def backward(ctx, *grads):
        ctx.state.loss_gradient = grads[0].detach()
        return grads[0], None
