"""The cases: {level} × {scope} × {checkpointing} × {variant}, and one for each thing beside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from access import trainable
from models import build, fill
from quantities import evaluation, forcing, forcing_that_learns, generation, training
from recorder import Recorded, Recorder

LEVELS = ("token", "sequence")
SCOPES = ("projection", "site", "layer", "model")
CHECKPOINTING = {"none": None, "reentrant": True, "nonreentrant": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "null": {"null_expert": True},
    "micro": {"router_aux_loss_window": "micro_batch"},
}


def grid() -> Iterator[tuple[str, Any]]:
    """{level} × {scope} × {checkpointing} × {variant}; forward-only things once each."""
    for level in LEVELS:
        for scope in SCOPES:
            for variant, fields in VARIANTS.items():
                for way, reentrant in CHECKPOINTING.items():
                    settings = dict(level=level, scope=scope, reentrant=reentrant, **fields)
                    yield f"{level} {scope} {variant} {way}", settings


# One thing each that the grid leaves alone, at token and at sequence level.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"base": "gpt2"},
    "mamba": {"base": "mamba"},
    "falcon": {"base": "falcon"},
    "bert": {"base": "bert"},
    "dropout": {"lora_dropout": 0.2, "router_jitter_noise": 0.1},
    "bias": {"router_bias_update_rate": 0.01, "router_aux_loss_coef": 0.0},
    "top one": {"num_experts_per_tok": 1, "use_rslora": True},
    "not normed": {"norm_topk_prob": False, "router_input_norm": True},
    "mlp": {"router": "mlp"},
    "descriptor": {"router": "descriptor"},
    "modules": {"modules_to_save": ["lm_head"]},
    "later layer": {"scope": "model", "router_layer": 1},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "frozen": {"frozen": (1, 3)},
    "attention": {"router_pooling": "attention"},
    "last": {"router_pooling": "last"},
}


def others() -> Iterator[tuple[str, Any]]:
    """The cases of `OTHERS`, without and with checkpointing."""
    for level in LEVELS:
        for name, fields in OTHERS.items():
            if "router_pooling" in fields and level == "token":
                continue
            for way in ("none", "nonreentrant"):
                if way != "none" and name in ("mamba", "bert"):
                    continue
                settings = {"level": level, "reentrant": CHECKPOINTING[way], **fields}
                yield f"{level} {name} {way}", settings


def run_case(settings: dict[str, Any]) -> Recorded:
    """Everything of one case."""
    settings = dict(settings)
    reentrant, frozen = settings.pop("reentrant"), settings.pop("frozen", ())
    model = build(**settings)
    drawn = {name: p[rows].clone() for name, (p, rows) in trainable(model).items()}
    fill(model)
    if frozen:
        model.freeze_experts([f"expert_{e}" for e in frozen])
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    case = Recorder(model, frozenset(frozen))
    case.keep("drawn", drawn)
    level, classifier = settings["level"], settings.get("base") == "bert"
    if classifier:
        training(case, level, classes=3)
        return case.kept
    if reentrant is None:
        evaluation(case, level)
        forcing(case)
        generation(case)
    training(case, level)
    forcing_that_learns(case)
    return case.kept
