"""The router losses: all of them, from the formula to the gradient that reaches the routers.

They are not added to `outputs.loss`: that loses them under reentrant checkpointing,
`compute_loss_func` and label smoothing, and mixes them into the evaluation loss. Instead an
autograd node ties them to the routing weights, as Megatron-LM does for its MoE layers; whatever the
training loop computes from the model, a backward pass through the weights adds their gradient. Its
scale is the one that the loop gave to `outputs.loss` (gradient accumulation, fp16 scaler, data
parallelism). A second node reads it there; the backward pass visits the loss before any layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..host_internals import backward_number
from ..routers import Routing
from .context import MixtureContext
from .load_window import as_fractions

IGNORE = -100


def load_balancing_loss(logits: Tensor, fractions: Tensor, size: int) -> Tensor:
    """E · Σ_e f_e p_e of each row (arXiv:2101.03961, eq. 4, without the mean); 1 when balanced.

    Args:
        logits: `[N, C]`; with `null_expert` that choice counts as an expert.
        fractions: `[C]`, the share of the slots that each expert got, a constant.
        size: E, how many of the C choices this router has; the others' logits are −inf.

    Returns:
        `[N]`: additive over rows because the fractions are given.
    """
    return size * (logits.softmax(-1) @ fractions.to(logits.dtype))


def z_loss(logits: Tensor) -> Tensor:
    """(log Σ_e exp(logit_e))² of each row `[N]` (arXiv:2202.08906, eq. 5, without the mean)."""
    return logits.logsumexp(-1).square()


def expert_target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row's logits `[N, E]` with its expert `[N]`; 0 for the target −100."""
    return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


@dataclass
class LossScale:
    """d(what backward was called on)/d(the model's loss), as a tensor.

    Args:
        value: 0-dim fp32; the factor that is assumed until a backward pass shows it at the loss.
        unknown: why nothing may be assumed, or "".
        assumed: nobody said by how much a loss that is a mean over its own batch is multiplied.
        seen: whether a backward pass has shown it.
    """

    value: Tensor
    unknown: str = ""
    assumed: bool = False
    seen: bool = False


UNKNOWN_SCALE = (
    "The loss is computed outside of the model (label smoothing or compute_loss_func) under fp16 "
    "or several processes, so the model cannot see how it is scaled and the router losses would be "
    "off. Add moelora.training.MoeLoraCallback() to the Trainer's callbacks, or set "
    "model.moelora.loss_scale."
)

ACCUMULATED = (
    "The loss is computed outside of the model, and several micro-batches make one optimizer step, "
    "so the model cannot see by how much each is scaled and the router losses would be off. Add "
    "moelora.training.MoeLoraCallback() to the Trainer's callbacks, or set "
    "model.moelora.loss_scale to what your loop multiplies each micro-batch's loss with."
)


@dataclass
class RouterLosses:
    """The router losses of one forward pass over `batch` sequences of `length` tokens.

    Args:
        context: the mixture, with the coefficients, the routers (the losses are the mean over them)
            and the load, whose fractions the balancing loss takes and which counts.
        batch, length: of the pass.
        scale: what the gradients are multiplied with.
        token_mask: `[batch, length]` bool, the tokens that are not padding; None where all are.
        targets: `[batch]` or `[batch, length]` expert numbers, −100 to leave out; or None.
        num_items: the loss's denominator over all micro-batches of the optimizer step, if the loop
            gave one.
        labels: `[batch, length]`, those that a client takes its loss on, outside of the model.
        sequences_are_items: `num_items` counts sequences (classification), not tokens.
        has_loss: the model's output will have a loss that is meant to be learned from.
        riding: under torch.compile, the router losses that get their gradient at that loss.
        values: what each router's losses came to, 0-dim, detached.
        counts: how many rows chose each expert, by router.
    """

    context: MixtureContext
    batch: int
    length: int
    scale: LossScale
    token_mask: Tensor | None = None
    targets: Tensor | None = None
    num_items: Tensor | int | None = None
    labels: Tensor | None = None
    sequences_are_items: bool = False
    has_loss: bool = False
    riding: list[Tensor] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)

    def attach(self, index: int, routing: Routing, record: bool) -> Routing:
        """Tie router `index`'s losses to the weights of its routing, and count its tokens.

        Args:
            index: the router's number.
            routing: what it decided for N rows.
            record: keep value and counts; False where a checkpointed layer is computed again.
        """
        config = self.context.config
        load = self.context.load
        logits = routing.logits
        weights = self.row_weights(len(logits), logits.device)
        counts = load.count(routing.expert_ids, weights)
        own = config.router_aux_loss_window == "micro_batch"
        size = load.sizes[index]
        fractions = as_fractions(counts, size) if own else load.fractions(index).to(logits.device)
        loss = config.router_aux_loss_coef * load_balancing_loss(logits, fractions, size)
        loss = loss + config.router_z_loss_coef * z_loss(logits)
        targets = self.targets_of(len(logits))
        if targets is not None:
            possible = self._possible(index, targets.to(logits.device))
            of_target = expert_target_loss(logits, possible)
            loss = loss + config.expert_target_loss_coef * of_target
        num_routers = len(self.context.router_list)
        loss = (loss * weights).sum() / (self.denominator(weights) * num_routers)
        if record:
            self.values[index] = loss.detach()
            self.counts[index] = counts
        if not loss.requires_grad:
            return routing
        if self.has_loss and torch.compiler.is_compiling():
            self.riding.append(loss)
            return routing
        tied = _AttachLoss.apply(routing.expert_weights, loss, self.scale, load)
        return routing._replace(expert_weights=tied)

    def probe(self, loss: Tensor) -> Tensor:
        """`loss` unchanged; a backward pass through it shows by how much the loop scales it."""
        return _ProbeLoss.apply(loss, self.scale, *(own.to(loss) for own in self.riding))  # type: ignore[return-value]

    def probe_tokens(self, log_probs: Tensor) -> Tensor:
        """`log_probs` `[batch, tokens]` unchanged; where the loss is their mean over the labels, a
        backward pass through them shows how it is scaled, as at the model's own loss.
        """
        if self.labels is None or self.num_items is not None:
            return log_probs
        tokens = self.batch * self.length if self.token_mask is None else self.token_mask.sum()
        labels = (self.labels[:, 1:] != IGNORE).sum()
        own = (labels.to(log_probs), torch.as_tensor(tokens).to(log_probs))
        certain = self.context.loss_is_token_mean
        return _ProbeTokens.apply(log_probs, self.scale, *own, certain)  # type: ignore[return-value]

    def alone(self, logits: Tensor) -> Tensor:
        """The router losses as a loss of their own, 0-dim: backward reaches what is tied alone.

        It does so by a gradient of 0 for `logits`, through whatever lies between (checkpointed
        layers too).
        """
        everything = torch.ones((), dtype=torch.bool, device=logits.device)
        zero = logits.masked_fill(everything, 0).sum()
        total = self.total()
        return self.probe(total + zero.to(total))

    def total(self) -> Tensor:
        """What all of them came to, 0-dim fp32."""
        values = [value.float() for value in self.values.values()]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def row_weights(self, rows: int, device: torch.device) -> Tensor:
        """What each of `rows` routed rows counts for in a loss, `[rows]` fp32.

        In tokens where the loss counts tokens (a sequence: all its tokens), in sequences where it
        counts those (a token: its share of its sequence). The sum over any cut into micro-batches
        is the same.
        """
        if rows not in (self.batch, self.batch * self.length):
            return torch.ones(rows, device=device)
        mask = torch.ones(self.batch, self.length, device=device)
        if self.token_mask is not None:
            mask = self.token_mask.to(mask)
        if self.sequences_are_items:
            mask = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return mask.reshape(-1) if rows == mask.numel() else mask.sum(1)

    def targets_of(self, rows: int) -> Tensor | None:
        """The targets of `rows` routed rows `[rows]`; a sequence's is that of all its tokens."""
        targets = self.targets
        if targets is None:
            return None
        if targets.dim() == 1 and rows == self.batch * self.length:
            targets = targets.repeat_interleave(self.length)
        if targets.numel() != rows:
            return None
        targets = targets.reshape(-1)
        if self.token_mask is not None and rows == self.token_mask.numel():
            targets = targets.masked_fill(~self.token_mask.reshape(-1).to(targets.device), IGNORE)
        return targets

    def _possible(self, index: int, targets: Tensor) -> Tensor:
        """targets `[rows]` with −100 for experts that router `index`'s layer does not have."""
        absent = self.context.choices.absent(index, targets.device)
        if absent is None:
            return targets
        # A target beyond the experts is the null expert, which every layer has.
        absent = nn.functional.pad(absent, (0, 1))
        return targets.masked_fill(absent[targets.clamp(min=0)], IGNORE)

    def denominator(self, weights: Tensor) -> Tensor:
        """What the sum is divided by: the loop's `num_items`, else this batch's own weight."""
        if self.num_items is None:
            return weights.sum().clamp(min=1e-9)
        if isinstance(self.num_items, Tensor):
            return self.num_items.to(weights).reshape(-1)[0]
        return weights.new_tensor(float(self.num_items))


class _AttachLoss(torch.autograd.Function):
    """`weights` unchanged; in the backward pass `loss` gets the scale as its gradient.

    A RuntimeError there: the loss did not come from the model, and its scale cannot be known.
    """

    @staticmethod
    def forward(ctx, weights, loss, scale, load):
        # Not the pass itself: it holds the routings, so the graph would hold itself.
        ctx.scale = scale
        ctx.load = load
        ctx.like = loss.new_empty(())
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, *grads):
        scale = ctx.scale
        if not torch.compiler.is_compiling():
            ctx.load.learned = True
            if scale.unknown and not scale.seen:
                raise RuntimeError(scale.unknown)
            if scale.assumed and not (scale.seen or ctx.load.is_one_backward(backward_number())):
                raise RuntimeError(ACCUMULATED)
        # A copy: the next backward pass through the same graph may write another scale.
        return grads[0], scale.value.to(ctx.like, copy=True), None, None


class _ProbeLoss(torch.autograd.Function):
    """`loss` unchanged; in the backward pass its gradient is the scale.

    Under torch.compile, where a graph cannot pass the scale on to one before it, the router losses
    ride along and get the same gradient. That needs the model's own loss to be used, and no
    reentrant checkpointing, which is never compiled.
    """

    @staticmethod
    def forward(ctx, loss, scale, *riding):
        ctx.scale = scale
        ctx.riding = len(riding)
        # A copy, not a view: Trainer scales the loss in place, which autograd forbids on a view.
        return loss.clone()

    @staticmethod
    def backward(ctx, *grads):
        ctx.scale.value.copy_(grads[0].detach())
        if not torch.compiler.is_compiling():
            ctx.scale.seen = True
        return grads[0], None, *[grads[0]] * ctx.riding


class _ProbeTokens(torch.autograd.Function):
    """Tokens' log-probabilities unchanged; the backward pass reads the scale of a mean over them.

    A loss −c · Σ log p has the gradient −c at each token. With c = 1 / labels it is the mean over
    this very batch; another c is that of a mean only where the loop says so (`certain`), since
    other losses (DPO, KTO) may by chance have the same gradient at all tokens.
    """

    @staticmethod
    def forward(ctx, log_probs, scale, labels, tokens, certain):
        ctx.scale = scale
        ctx.certain = certain
        ctx.save_for_backward(labels, tokens)
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx, *grads):
        labels, tokens = ctx.saved_tensors
        size = grads[0].abs().amax()
        own = (size * tokens).to(ctx.scale.value)
        if ctx.certain:
            ctx.scale.value.copy_(own)
            ctx.scale.seen = True
        else:
            even = (grads[0] + size).abs().amax() <= 1e-4 * size
            mean = even & ((size * labels - 1).abs() < 1e-4)
            ctx.scale.value.copy_(torch.where(mean, own, ctx.scale.value))
        return grads[0], None, None, None, None
