"""FSDP2: a mixture whose layers are sharded over two processes is the mixture of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bases import causal_base
from core.mixtures import causal, own_parameters, tokens
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training.processes import WORLD, in_two_processes, one_process
from training.runs import LOSSES, assert_same

from moelora import MoeLoraForCausalLM

STEPS = 2
TOLERANCE = 2e-5
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
# What is trained, and how: the mixture's fields, reentrant checkpointing or not, micro-batches.
CASES: dict[str, dict[str, Any]] = {
    "site": {"fields": {}},
    "layer, frozen": {
        "fields": {"router_scope": "layer"},
        "frozen": ["expert_1"],
        "reentrant": True,
    },
    "model, sequence": {
        "fields": {"router_scope": "model", "routing_level": "sequence", "router_prefix_tokens": 3},
        "reentrant": False,
    },
    "accumulated": {"fields": {}, "micro": 2},
    "shared A": {"fields": {"share_lora_A": True}},
    "series": {
        "fields": {
            "expert_placement": "series",
            "target_blocks": ["mlp"],
            "expert_activation": "gelu",
        }
    },
    "shared, by layer": {"fields": {"num_shared_experts": 1, "experts_per_layer": [2, 3]}},
}
EDITS = {
    "freeze": lambda model: model.freeze_experts(["expert_1"]),
    "add": lambda model: model.add_expert("another"),
    "remove": lambda model: model.remove_expert("expert_0"),
    "replace": lambda model: model.replace_expert("expert_1"),
}


def _made(case: dict) -> Any:
    model = causal(**case["fields"], **LOSSES).train()
    if "frozen" in case:
        model.freeze_experts(case["frozen"])
    if "reentrant" in case:
        model.gradient_checkpointing_enable({"use_reentrant": case["reentrant"]})
    return model


def _sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()  # type: ignore[operator]


def _train(model: Any, rank: int, world: int, micro: int) -> dict[str, Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    found: dict[str, Any] = {"gradients": [], "counts": []}
    for step in range(STEPS):
        rows = tokens(8, 8, seed=step).chunk(world)[rank].chunk(micro)
        for number, ids in enumerate(rows):
            if world > 1:
                model.set_requires_gradient_sync(number == micro - 1)
            (model(input_ids=ids, labels=ids).loss / micro).backward()
        gradients = {
            name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None
        }
        found["gradients"].append(gradients)
        load = model.moelora.load
        found["counts"] += [load.current.clone(), load.previous.clone()]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found["logits"] = model.eval()(tokens()).logits
    return found


def _run(name: str, rank: int, folder: Path) -> dict[str, Any]:
    case = CASES[name]
    model = _sharded(_made(case))
    found = _train(model, rank, WORLD, case.get("micro", 1))
    own = own_parameters(model).values()
    # FSDP2 shards rows; where their number is odd a process has one more.
    found["all are sharded"] = all(hasattr(p, "to_local") for p in own)
    found["in their layers"] = sum(
        "moelora" in name.split(".")
        for layer in model.model.layers
        for name, _ in layer.named_parameters()
    ) == len(own)

    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    again = _sharded(_made(case))
    state = {"model": get_model_state_dict(again)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(again, state["model"])
    with torch.no_grad():
        found["logits after DCP"] = again.eval()(tokens()).logits

    gathered = get_model_state_dict(model, options=FULL)
    found["save"] = "no error"
    if rank == 0:
        try:
            model.save_pretrained(folder / "saved", state_dict=gathered)
        except Exception as error:
            found["save"] = f"{type(error).__name__}: {error}"
    dist.barrier()
    return found


def _edit(name: str) -> dict[str, str]:
    """What happens when the experts of a sharded mixture are changed."""
    model = _sharded(causal())
    try:
        EDITS[name](model)
        return {"error": "none"}
    except Exception as error:
        return {"error": type(error).__name__}


def worker(rank: int, port: int, folder: str) -> None:
    """One of two processes: run all cases, and leave what came out in `folder`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    where = Path(folder)
    with one_process(rank, where):
        found: dict[str, Any] = {name: _run(name, rank, where / name) for name in CASES}
        found["edits"] = {name: _edit(name) for name in EDITS}
        torch.save(found, where / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder, and what each of two processes found in every case."""
    folder = tmp_path_factory.mktemp("two")
    return folder, in_two_processes(worker, folder)


@pytest.fixture(scope="module")
def alone():
    """The same in this process, on whole batches."""
    return {name: _train(_made(case), 0, 1, 1) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_sharded_layers_have_the_gradients_of_one_process(name, two, alone):
    for found in two[1]:
        for gradients, expected in zip(found[name]["gradients"], alone[name]["gradients"]):
            assert_same(gradients, expected, TOLERANCE)
        torch.testing.assert_close(found[name]["logits"], alone[name]["logits"])


@pytest.mark.parametrize("name", CASES)
def test_the_window_is_that_of_one_process(name, two, alone):
    for found in two[1]:
        assert all(torch.equal(a, b) for a, b in zip(found[name]["counts"], alone[name]["counts"]))


@pytest.mark.parametrize("name", CASES)
def test_every_expert_and_router_is_sharded_with_its_layer(name, two):
    for found in two[1]:
        assert found[name]["all are sharded"] and found[name]["in their layers"]


@pytest.mark.parametrize("name", CASES)
def test_a_distributed_checkpoint_comes_back(name, two):
    for found in two[1]:
        assert torch.equal(found[name]["logits after DCP"], found[name]["logits"])


@pytest.mark.parametrize("name", CASES)
def test_a_gathered_state_dict_is_saved_and_loads_in_one_process(name, two):
    folder, (found, _) = two
    assert found[name]["save"] == "no error"
    model = MoeLoraForCausalLM.from_pretrained(folder / name / "saved", base=causal_base())
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, found[name]["logits"])


@pytest.mark.parametrize("edit", EDITS)
def test_experts_of_a_sharded_mixture_cannot_be_changed(edit, two):
    # The sharding keeps the parameters that it was made with: new ones would not train.
    assert {found["edits"][edit]["error"] for found in two[1]} == {"ValueError"}
