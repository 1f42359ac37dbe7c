"""Tiny mixtures on disk, what `generate` makes of prompts, and what the engine does."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

from moelora import MoeLoraConfig, MoeLoraForCausalLM

# vLLM's attention on a CPU takes heads of 32 and more.
LLAMA = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)
LENGTHS = (1, 2, 5, 9, 17, 40, 77, 120)
NEW_TOKENS = 24
# Four prompts of 60 tokens fill this cache, and their answers need more: some have to make room.
CROWD = (60,) * 4
SMALL_CACHE = dict(num_gpu_blocks_override=9, block_size=32, disable_log_stats=False)


@dataclass
class Answer:
    """New tokens of a prompt, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def tiny_base(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random base whose heads vLLM's attention on a CPU takes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**LLAMA, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_mixture(folder: Path, base: PreTrainedModel | None = None, **fields: Any) -> Any:
    """A mixture whose experts say something, saved with its base into `folder`."""
    settings = dict(num_experts=4, r=4, lora_alpha=8, target_modules="all-linear") | fields
    mixture = MoeLoraForCausalLM.from_base(base or tiny_base(), MoeLoraConfig(**settings)).eval()
    say_something(mixture)
    mixture.save_pretrained(folder, save_base=True)
    return mixture


@torch.no_grad()
def say_something(mixture: Any, seed: int = 1, std: float = 0.3) -> None:
    """Draw the B of all experts, which are 0 in a new mixture, and routers that choose."""
    torch.manual_seed(seed)
    for site in mixture.moelora.sites.values():
        for factor in site.factors()[1:]:
            factor.fill(torch.randn(sum(factor.blocks), factor.width) * std)
    for router in mixture.moelora.router_list:
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, w000 …, none of which begins another."""
    size = LLAMA["vocab_size"]
    words = Tokenizer(models.WordLevel({f"w{i:03}": i for i in range(size)}, unk_token="w000"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w000", eos_token="w002")


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 3) -> list[list[int]]:
    """Prompts of these lengths, by default eight of 1 to 120 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def generated(model: Any, rows: list[list[int]], **keywords: Any) -> list[Answer]:
    """What transformers' `generate` answers to each prompt alone, greedily."""
    answers = []
    for row in rows:
        output = model.generate(
            torch.tensor([row]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            eos_token_id=None,
            **keywords,
        )
        tokens = output.sequences[0, len(row) :].tolist()
        logprobs = [own[0].float().log_softmax(-1)[t] for own, t in zip(output.logits, tokens)]
        answers.append(Answer(tokens, [float(own) for own in logprobs]))
    return answers


def engine(folder: Path, **settings: Any) -> LLM:
    """An engine in this process that serves a folder."""
    defaults = dict(
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    return LLM(str(folder), **(defaults | settings))


def params(**extra: Any) -> SamplingParams:
    """Greedy, with the log-probability of each token; `extra` is what the request decides."""
    return SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        extra_args=extra or None,
    )


def served(llm: LLM, rows: list[list[int]], asked: Any = None) -> list[Answer]:
    """What the engine answers to all prompts together."""
    given = [{"prompt_token_ids": row} for row in rows]
    answers = []
    for output in llm.generate(given, asked or params(), use_tqdm=False):
        own = output.outputs[0]
        pairs = zip(own.logprobs, own.token_ids)
        answers.append(Answer(list(own.token_ids), [step[t].logprob for step, t in pairs]))
    return answers


def largest_difference(one: list[Answer], other: list[Answer]) -> float:
    """The largest difference of two runs' log-probabilities; their tokens are the same."""
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.tokens == b.tokens, f"prompt {i} of {LENGTHS[i % len(LENGTHS)]} tokens"
    pairs = ((x, y) for a, b in zip(one, other) for x, y in zip(a.logprobs, b.logprobs))
    return max(abs(x - y) for x, y in pairs)


def differing(one: list[Answer], other: list[Answer]) -> int:
    """How many answers are not the same tokens."""
    return sum(a.tokens != b.tokens for a, b in zip(one, other, strict=True))


def counted(llm: LLM, name: str) -> float:
    """A counter of an engine that keeps statistics."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def shut(llm: LLM) -> None:
    """Let go of an engine in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()
