"""A base that is tensor-parallel or sharded already is refused, with what to do instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bases import VOCAB, causal_base
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training.processes import WORLD, in_two_processes, one_process
from transformers import AutoModelForCausalLM

from moelora import MoeLoraConfig, MoeLoraForCausalLM

CONFIG = MoeLoraConfig(num_experts=2, r=4)


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def _refusal(make: Any) -> str:
    with pytest.raises(ValueError) as refused:
        make()
    return str(refused.value)


def _worker(rank: int, port: int, folder: str) -> None:
    where = Path(folder)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    # Where there is a GPU transformers would use it, and two processes cannot share one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    with one_process(rank, where), torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(where / "base", tp_plan="auto")
        query = base.model.layers[0].self_attn.q_proj
        found: dict[str, Any] = {"part": tuple(query.weight.to_local().shape)}
        found["before"] = base(_ids()).logits
        found["said"] = _refusal(lambda: MoeLoraForCausalLM.from_base(base, CONFIG))
        found["loaded"] = _refusal(
            lambda: MoeLoraForCausalLM.from_pretrained(where / "experts", base=base)
        )
        found["after"] = base(_ids()).logits
        found["class"] = type(base).__name__
        sharded = causal_base()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (WORLD,)))
        found["sharded"] = _refusal(lambda: MoeLoraForCausalLM.from_base(sharded, CONFIG))
        torch.save(found, where / f"{rank}.pt")


def test_a_tensor_parallel_base_is_refused_and_left_as_it_was(tmp_path):
    base = causal_base()
    base.save_pretrained(tmp_path / "base")
    MoeLoraForCausalLM.from_base(tmp_path / "base", CONFIG).save_pretrained(tmp_path / "experts")
    with torch.no_grad():
        expected = causal_base()(_ids()).logits
    for found in in_two_processes(_worker, tmp_path):
        # Half of the rows, and yet the whole model's logits: it really is tensor-parallel.
        assert found["part"] == (16, 32)
        torch.testing.assert_close(found["before"], expected)
        for said in (found["said"], found["loaded"]):
            assert "LlamaForCausalLM is tensor-parallel over 2 processes" in said
            assert "load the base whole" in said
        assert torch.equal(found["after"], found["before"])
        assert found["class"] == "LlamaForCausalLM"
        assert (
            "is sharded (model.embed_tokens.weight …) before it has a mixture" in found["sharded"]
        )


@pytest.mark.parametrize("keyword, value", [("tp_plan", "auto"), ("tp_size", 2)])
def test_keywords_that_would_shard_the_base_are_refused_before_it_is_loaded(
    keyword, value, tmp_path
):
    asked = {keyword: value}
    said = rf"{keyword}={value!r} would give each process a part.*load the base whole"
    # There is nothing to load.
    with pytest.raises(ValueError, match=said):
        MoeLoraForCausalLM.from_base(tmp_path / "none", CONFIG, **asked)
    causal_base().save_pretrained(tmp_path / "base")
    MoeLoraForCausalLM.from_base(tmp_path / "base", CONFIG).save_pretrained(tmp_path / "experts")
    for cls in (AutoModelForCausalLM, MoeLoraForCausalLM):
        with pytest.raises(ValueError, match=said):
            cls.from_pretrained(tmp_path / "experts", **asked)
