"""Tasks that routers learn in seconds, each of its own token ids; and a tokenizer of words."""

from __future__ import annotations

from typing import Any

import torch
from core.mixtures import NO_ROUTER_LOSS, causal, suited
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moelora.training import Texts

# So few that a linear router on 32 random numbers a token can tell them apart.
FIRST, WIDTH = 4, 6
GATE = {
    "num_experts": 3,
    "expert_names": ["red", "green", "blue"],
    "num_experts_per_tok": 1,
    "routing_level": "sequence",
    "router_scope": "model",
    "router_input_norm": True,
    **NO_ROUTER_LOSS,
}


def gate(**fields: Any) -> Any:
    """A tiny Llama with one gate on its embeddings among red, green and blue."""
    router = fields.get("router", "top_k")
    return causal(**{**suited(**GATE, router=router), **fields})


@torch.no_grad()
def redrawn(model: Any, seed: int) -> Any:
    """The same new mixture with routers and A of another seed; its B stay as they are."""
    # Far from the seeds that bases are drawn by: equal ones give routers the embeddings' numbers.
    torch.manual_seed(1000 + seed)
    for router in model.moelora.routers.values():
        router.reset_parameters()
    for expert in range(model.moelora.num_experts):
        for own in model.moelora.expert(expert).values():
            bound = own.A.shape[1] ** -0.5
            own.A.uniform_(-bound, bound)
    return model


def task(number: int, rows: int = 24, seed: int = 0, target: int = 3) -> Texts:
    """Prompts of 4 to 9 tokens of the task's own range, each with `target` tokens to learn."""
    generator = torch.Generator().manual_seed(100 * number + seed)
    made = []
    for i in range(rows):
        prompt, start = 4 + i % 6, FIRST + WIDTH * number
        ids = torch.randint(start, start + WIDTH, (prompt + target,), generator=generator)
        # Every token ends some prompt, so that a router of last tokens can learn them all.
        ids[prompt - 1] = start + i % WIDTH
        mask = torch.arange(prompt + target) < prompt
        made.append({"input_ids": ids, "labels": ids.masked_fill(mask, -100), "router_mask": mask})
    return Texts(made)


def tasks(
    rows: int = 24, seed: int = 0, names: tuple[str, ...] = ("red", "green", "blue")
) -> dict[str, Texts]:
    """By expert the texts of its task; a name's place in the list is its task's number."""
    return {name: task(number, rows, seed) for number, name in enumerate(names)}


@torch.no_grad()
def choices(model: Any, texts: Texts) -> list[str]:
    """The most probable choice for each prompt, asked alone."""
    return [model.route(input_ids=prompt[None]).top_experts()[0] for prompt in texts.prompts()]


def share(model: Any, name: str, texts: Texts) -> float:
    """How many of the texts' prompts go to `name`."""
    found = choices(model, texts)
    return found.count(name) / len(found)


def word_tokenizer(
    words: str = "what is two plus three the answer", **special: Any
) -> PreTrainedTokenizerFast:
    """One token a word; "[BOS]" before, unless special tokens are left out; "[EOS]" is its end."""
    names = ["[PAD]", "[BOS]", "[EOS]", *dict.fromkeys(words.split())]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    found = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **found)
