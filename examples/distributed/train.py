"""Fine-tune a mixture on several processes, by torch's, accelerate's or DeepSpeed's engines:

    torchrun --nproc_per_node 2 examples/distributed/train.py \\
        --base BASE --data rows.jsonl --output_dir out --max_steps 100 ENGINE

ENGINE is nothing (DistributedDataParallel), or
    --fsdp full_shard --fsdp_config examples/distributed/fsdp2.json
    --deepspeed examples/distributed/zero2.json
    --deepspeed examples/distributed/zero3.json

A line of the data is a JSON object with "prompt" and "completion". All of `TrainingArguments` can
be given too. What one engine saved, every other one and a single process load.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.training import MoeLoraCallback, PadRouting, Texts


@dataclass
class Arguments:
    """What is trained on what."""

    base: str = field(metadata={"help": "A hub id or a folder."})
    data: Path = field(metadata={"help": "A file of JSON lines with prompt and completion."})
    num_experts: int = 8
    expert_rank: int = 16
    num_experts_per_tok: int = 2
    routing_level: str = "token"
    router_scope: str = "site"


def main() -> None:
    """Train, save, and say where."""
    parser = HfArgumentParser((Arguments, TrainingArguments))  # type: ignore[arg-type]
    own, args = parser.parse_args_into_dataclasses()
    # Every process draws the same experts.
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(own.base)
    config = MoeLoraConfig(
        num_experts=own.num_experts,
        r=own.expert_rank,
        num_experts_per_tok=own.num_experts_per_tok,
        routing_level=own.routing_level,
        router_scope=own.router_scope,
        target_modules="all-linear",
    )
    model = MoeLoraForCausalLM.from_base(own.base, config)
    rows = [json.loads(line) for line in own.data.read_text(encoding="utf-8").splitlines()]
    texts = Texts.of(rows, tokenizer)
    if own.routing_level == "token":
        texts = texts.without("router_mask")
    trainer = Trainer(
        model,
        args,
        train_dataset=texts,
        data_collator=PadRouting(pad_token_id=tokenizer.pad_token_id or 0),
        callbacks=[MoeLoraCallback()],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
