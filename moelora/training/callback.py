"""An optional callback for the stock `Trainer`: it logs expert load and knows the loss's scale."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.modeling_utils import unwrap_model
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..core.collapse import ENOUGH, collapse_in_words, shares_of
from ..registry import router_class

# Beside transformers' own loggers, whose verbosity it follows.
logger = logging.get_logger("transformers.moelora")


class MoeLoraCallback(TrainerCallback):
    """Logs how evenly the experts are used, warns once where a router has collapsed, and tells the
    model how the loop scales its loss.

    Training needs it only where the loop computes the loss outside of the model (label smoothing,
    `compute_loss_func`, the trainers of TRL) under fp16, several processes or gradient
    accumulation; elsewhere the model sees the scale by itself.
    """

    def __init__(self):
        # Who was chosen since collapse was looked for, `[num_routers, C]`.
        self._counts: Tensor | None = None
        self._has_warned = False
        # The step at which this epoch began.
        self._epoch_start = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Have the model count who is chosen, and begin to watch anew."""
        _mixture_of(model).counts_load = True
        self._counts = None
        self._has_warned = False

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        """Note at which step the epoch began, which may be before a run that resumes it."""
        batches = _length_of(train_dataloader)
        done = 0
        if batches and not args.ignore_data_skip:
            done = state.global_step % math.ceil(batches / args.gradient_accumulation_steps)
        self._epoch_start = state.global_step - done

    def on_step_begin(
        self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs
    ) -> None:
        """Read by how much the loop multiplies its loss before it calls backward."""
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        mixture = _mixture_of(model)
        # Where no num_items_in_batch reaches the model, the loop takes means and divides their sum.
        mixture.mean_loss_scale = scale / self._micro_batches(args, state, train_dataloader)
        # Of TRL's SFTConfig.
        mixture.loss_is_token_mean = getattr(args, "loss_type", None) == "nll"
        if args.average_tokens_across_devices:
            # Trainer multiplies the loss by this, because DDP averages the gradients.
            scale *= args.world_size
        mixture.loss_scale = scale

    def _micro_batches(self, args: Any, state: Any, dataloader: Any) -> int:
        """How many micro-batches this step has: the last one of an epoch may have fewer."""
        most = getattr(args, "gradient_accumulation_steps", 1)
        batches = _length_of(dataloader)
        if batches is None:
            # None is known to be the last.
            return most
        left = batches - (state.global_step - self._epoch_start) * most
        return left if 0 < left < most else most

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Add up who was chosen."""
        mixture = _mixture_of(model)
        # Bans and forced experts are meant.
        if mixture.load is None or mixture.overridden or self._has_warned:
            return
        counts = mixture.load.current
        fits = self._counts is not None and self._counts.shape == counts.shape
        self._counts = self._counts + counts if fits else counts.clone()  # type: ignore[operator]

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Forget the scale: another loop may have another one."""
        mixture = _mixture_of(model)
        mixture.loss_scale = None
        mixture.mean_loss_scale = None
        mixture.loss_is_token_mean = False
        mixture.counts_load = False

    def on_log(self, args, state, control, model=None, logs=None, **kwargs) -> None:
        """Add the experts' peak load: the largest share, times the number of experts.

        It is 1 where all are used alike, and the number of experts where one takes all. There are
        two: the worst router's, and the mean over routers. Where a router has collapsed, a warning
        says so once, with what to change.
        """
        load = _mixture_of(model).load
        if logs is None or load is None or not bool(load.current.any()):
            return
        shares = shares_of(load.current)
        peak = shares.max(1).values * shares.shape[1]
        peaks = {"expert_peak_load": peak.max(), "expert_mean_peak_load": peak.mean()}
        figures = {name: round(float(value), 4) for name, value in peaks.items()}
        logs.update(figures)
        # Trainer has put a copy of the logs into its history (trainer_state.json) before it calls
        # its callbacks.
        if state.log_history:
            state.log_history[-1].update(figures)
        self._warn_of_collapse(_mixture_of(model), state.is_world_process_zero)

    def _warn_of_collapse(self, mixture: Any, is_main: bool) -> None:
        """Say what is wrong with who was chosen since the last time, if those were enough."""
        counts = self._counts
        if counts is None or int(counts.sum(1).min()) < ENOUGH * counts.shape[1]:
            return
        self._counts = None
        config = mixture.config
        decides = router_class(config.router).decides_how_many
        in_use = 1 if decides else config.num_experts_per_tok
        words = collapse_in_words(shares_of(counts).cpu(), in_use, config, mixture.router_names)
        self._has_warned = bool(words)
        if words and is_main:
            logger.warning(words)


def _length_of(dataloader: Any) -> int | None:
    """The number of batches of an epoch, None where nobody knows."""
    return len(dataloader) if has_length(dataloader) else None


def _mixture_of(model: Any) -> Any:
    return unwrap_model(model).moelora
