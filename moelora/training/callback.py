"""An optional callback for the stock `Trainer`: it logs expert load and knows the loss's scale."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.modeling_utils import unwrap_model


class MoeLoraCallback(TrainerCallback):
    """Logs how evenly the experts are used, and tells the model how the loop scales its loss.

    Training needs it only where the loop computes the loss outside of the model (label smoothing,
    `compute_loss_func`, the trainers of TRL) under fp16, several processes or gradient
    accumulation; elsewhere the model sees the scale by itself.
    """

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Read by how much the loop multiplies its loss before it calls backward."""
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        mixture = _mixture_of(model)
        # Where no num_items_in_batch reaches the model, the loop takes means and divides their sum.
        mixture.mean_loss_scale = scale / getattr(args, "gradient_accumulation_steps", 1)
        # Of TRL's SFTConfig.
        mixture.loss_is_token_mean = getattr(args, "loss_type", None) == "nll"
        if args.average_tokens_across_devices:
            # Trainer multiplies the loss by this, because DDP averages the gradients.
            scale *= args.world_size
        mixture.loss_scale = scale

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Forget the scale: another loop may have another one."""
        mixture = _mixture_of(model)
        mixture.loss_scale = None
        mixture.mean_loss_scale = None
        mixture.loss_is_token_mean = False

    def on_log(self, args, state, control, model=None, logs=None, **kwargs) -> None:
        """Add the experts' peak load: the largest share, times the number of experts.

        It is 1 where all are used alike, and the number of experts where one takes all. There are
        two: the worst router's, and the mean over routers.
        """
        load = _mixture_of(model).load
        if logs is None or load is None or not bool(load.current.any()):
            return
        shares = load.current / load.current.sum(1, keepdim=True).clamp(min=1)
        peak = shares.max(1).values * shares.shape[1]
        peaks = {"expert_peak_load": peak.max(), "expert_mean_peak_load": peak.mean()}
        figures = {name: round(float(value), 4) for name, value in peaks.items()}
        logs.update(figures)
        # Trainer has put a copy of the logs into its history (trainer_state.json) before it calls
        # its callbacks.
        if state.log_history:
            state.log_history[-1].update(figures)


def _mixture_of(model: Any) -> Any:
    return unwrap_model(model).moelora
