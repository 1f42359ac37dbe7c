"""Training runs of the data-parallel tests, alone or as one of two processes, which import them
from here.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from core.mixtures import causal, classifier
from launches import end_process, free_port
from torch.nn.parallel import DistributedDataParallel
from training.runs import (
    LOSSES,
    NO_LOSSES,
    batch,
    classes,
    gradients_of,
    open_window,
    rows_of,
    train,
)

from moelora.training import MoeLoraCallback

WORLD = 2
ROWS = 16
STEPS = {"max_steps": 2, "optim": "sgd"}


# What is trained, and how; `rows` are what all processes together take at a time.
CASES: dict[str, dict] = {
    "token": {"fields": {"router_bias_update_rate": 0.05}},
    "sequence_checkpointed": {
        "fields": {"routing_level": "sequence", "router_scope": "layer"},
        "settings": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    },
    "accumulated": {"rows": 4, "settings": {"gradient_accumulation_steps": 2}},
    "unused": {"settings": {"ddp_find_unused_parameters": True}},
    "smoothed": {"settings": {"label_smoothing_factor": 0.2}, "callback": True},
    "no_callback": {"settings": {"label_smoothing_factor": 0.2}},
    "classifier": {"make": classifier},
    "lossless_classifier": {"make": classifier, "fields": NO_LOSSES},
}


def run_case(name: str, world: int, folder: Path) -> dict[str, Any]:
    """Train as `CASES[name]` says in this process, one of `world`; what was recorded, or the
    error's text.
    """
    case = CASES[name]
    make = case.get("make", causal)
    model = make(**{**LOSSES, **case.get("fields", {})}).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    open_window(model)
    data = rows_of(batch(ROWS) if make is causal else classes(ROWS))
    callbacks = [MoeLoraCallback()] if case.get("callback") else []
    settings = {
        **STEPS,
        "per_device_train_batch_size": case.get("rows", 8) // world,
        **case.get("settings", {}),
    }
    try:
        recorder = train(model, data, folder, callbacks=callbacks, **settings)
    except ValueError as error:
        return {"error": str(error)}
    load = model.moelora.load
    return {
        "gradients": recorder.gradients,
        "counts": [*recorder.current, *recorder.previous, load.current, load.previous],
        "bias": load.bias,
    }


def run_static_graph(rank: int, world: int) -> dict[str, Any]:
    """Two passes under plain DDP with a static graph (bare in a world of one): outputs and
    gradients.
    """
    model = causal(**LOSSES).double().train()
    open_window(model)
    wrapped = DistributedDataParallel(model, static_graph=True) if world > 1 else model
    inputs = batch(8)
    mine = {n: t[rank * 8 // world : (rank + 1) * 8 // world] for n, t in inputs.items()}
    items = (inputs["labels"][:, 1:] != -100).sum()
    for _ in range(2):
        model.zero_grad()
        outputs = wrapped(**mine, num_items_in_batch=items, output_expert_routing=True)
        (outputs.loss * world).backward()
    return {
        "class": type(outputs).__name__,
        "aux": outputs.expert_aux_loss,
        "logits": torch.stack([routing.logits.detach() for routing in outputs.expert_routing]),
        "gradients": gradients_of(model),
    }


def in_two_processes(worker: Callable[[int, int, str], None], folder: Path) -> list[Any]:
    """What each of two processes of `worker(rank, port, folder)` left in `folder`."""
    torch.multiprocessing.spawn(worker, args=(free_port(), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@contextmanager
def one_process(rank: int, where: Path) -> Iterator[None]:
    """A worker's work, and its end: an error is also left in the folder."""
    torch.set_num_threads(1)
    try:
        yield
    except BaseException:
        (where / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
    end_process()


def worker(rank: int, port: int, folder: str) -> None:
    """One of two processes: run all cases, and leave what came out in `folder`."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update(
        {name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1"
    )
    where = Path(folder)
    with one_process(rank, where):
        found = {name: run_case(name, WORLD, where / f"run-{rank}") for name in CASES}
        found["static_graph"] = run_static_graph(rank, WORLD)
        torch.save(found, where / f"{rank}.pt")
