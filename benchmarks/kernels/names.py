"""What rows call the candidates and the measures; no package of ours is needed to read them."""

from __future__ import annotations

FROZEN = "frozen linear"
LORA = "single LoRA rank K·r"
LORA_16 = "single LoRA rank 16, addmm_"
LOOP = "loop over experts"
PEFT_LOOP = "loop over experts, PEFT's way"
EINSUM = "dense einsum"
GROUPED = "grouped_mm"
PAIRS = "pair rows with reduce"

# Whole models and single decoder layers.
BASE = "frozen base"
PEFT_LORA = "PEFT LoRA rank K·r"
LAYER = "layer"
MODEL = "model"
TRAINING_STEP = "training step"
GRAPH = "forward, CUDA graph"
EAGER = "forward, eager"
COMPILED = 'forward, mode="reduce-overhead"'
GENERATE = "generate"
STATIC = "generate, static cache"


def ours(backend: str, path: str | None = None, fp32: bool = False) -> str:
    """The name of our candidate; fp32: its factors are fp32 beside 16-bit activations, as in a
    model.
    """
    name = f"ours {backend}" + (f" {path}" if path else "")
    return f"{name}, fp32 factors" if fp32 else name
