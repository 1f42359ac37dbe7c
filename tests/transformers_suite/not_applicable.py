"""The tests of `ModelTesterMixin` that ask for what a mixture is not, each with the reason."""

from __future__ import annotations

_OTHER_FILES = (
    "from_pretrained reads what a mixture's save_pretrained wrote; a base goes to from_base"
)
_HEAD = "the head was trained with the experts: another number of labels is refused"

NOT_APPLICABLE = {
    "test_base_model_prefix_loads_base_weights": _OTHER_FILES,
    "test_correct_missing_keys": _OTHER_FILES,
    "test_from_pretrained_no_checkpoint": _OTHER_FILES,
    "test_model_weights_reload_no_missing_tied_weights": "missing experts are never forgiven",
    "test_can_load_ignoring_mismatched_shapes": _HEAD,
    "test_load_with_mismatched_shapes": _HEAD,
    "test_retain_grad_hidden_states_attentions": "no gradient reaches frozen embeddings",
}

# In train mode without labels a sequence router must be told where the prompts end.
NEEDS_ROUTER_MASK = ("test_resize_tokens_embeddings",)
