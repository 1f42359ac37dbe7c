"""Four adapters trained with stock PEFT become one model that picks among them by itself, and go
out again.

    python examples/from_peft_adapters.py [--model ID_OR_FOLDER] [--steps N] [--output FOLDER]
    [--seed N]

Each adapter sees its own domain alone. Composed, the mixture routes without any training (arrow:
from the adapters' weights; prototype: from a few texts of each), then with its router trained and
the experts frozen. One expert is exported and checked in stock PEFT.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import reporting
import torch
from corpus import Blocks, load_corpus
from finetuning import Corpus, Recipe, Result, count_trainable, held_out_loss, single_lora, train
from peft import PeftModel
from smollm2 import load_base, prepare_base
from transformers import AutoTokenizer

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.training.router_init import initialise

RANKS = {"python": 4, "cpp": 8, "docs": 16, "licences": 32}
LEARNING_RATE = 2e-3
ROUTER_LEARNING_RATE = 1e-2
TEXTS = 8  # training blocks of each domain that the prototypes are made of


class Labelled(Blocks):
    """Blocks that say which expert is theirs: `expert_targets`, one number a sequence."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        target = torch.tensor(list(RANKS).index(self.domains[index]))
        return {**super().__getitem__(index), "expert_targets": target}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="any causal LM: an id or a folder (default: SmolLM2-135M)")
    parser.add_argument(
        "--steps", type=int, default=24, help="training steps of each adapter, and of the router"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/from_peft_adapters"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 steps on 2 layers: does it run?")
    return parser.parse_args(arguments)


def train_adapters(
    base: str, corpus: Corpus, recipe: Recipe, folder: Path
) -> tuple[dict[str, Path], list[Result]]:
    """Train one PEFT LoRA on each domain and save it as PEFT does; return the folders and the
    table's lines.
    """
    folders = {}
    results = []
    for domain, rank in RANKS.items():
        reporting.headline(f"PEFT LoRA, rank {rank}, on {domain} alone")
        lora = single_lora(load_base(base), rank, recipe.seed)
        seconds = train(lora, {domain: corpus[domain]}, recipe)
        folders[domain] = folder / domain
        lora.save_pretrained(folders[domain])
        parameters = count_trainable(lora)
        losses = held_out_loss(lora, corpus, recipe)
        results.append(
            Result(f"adapter {domain}, r={rank}", parameters, parameters, seconds, losses)
        )
    return folders, results


def oracle(results: list[Result]) -> Result:
    """Each domain with its own adapter: what a perfect choice by domain gives."""
    loss = {domain: result.loss[domain] for domain, result in zip(RANKS, results, strict=True)}
    return Result("own adapter (oracle)", 0, 0, 0.0, loss)


def compose(base: str, folders: dict[str, Path], router: str, **options: Any) -> Any:
    """One model of the adapters, one expert a token."""
    config = MoeLoraConfig(
        num_experts=len(folders), expert_names=list(folders), num_experts_per_tok=1, router=router,
        router_aux_loss_coef=0.0, router_z_loss_coef=0.0, norm_topk_prob=True,
    )  # fmt: skip
    return MoeLoraForCausalLM.from_adapters(base, folders, config, dtype="float32", **options)


def share_of_own(model: Any, corpus: Corpus) -> float:
    """How many of the held-out tokens' choices name their domain's own expert, over all routers."""
    shares = []
    for number, (_, held_out) in enumerate(corpus.values()):
        shares.append(float(model.route(input_ids=held_out.tokens).expert_share[number]))
    return sum(shares) / len(shares)


def measured(name: str, model: Any, corpus: Corpus, recipe: Recipe, seconds: float = 0.0) -> Result:
    """The table's line of a mixture; printed with it how often it chose the domain's own expert."""
    reporting.line(
        f"{name}: the domain's own expert has {share_of_own(model, corpus):.1%} of the choices"
    )
    routers = sum(p.numel() for p in model.moelora.routers.parameters())
    return Result(name, routers, routers, seconds, held_out_loss(model, corpus, recipe))


def train_router(model: Any, corpus: Corpus, recipe: Recipe, labelled: bool) -> float:
    """Train the routers alone; raises RuntimeError where an expert's bit changed."""
    model.freeze_experts(model.moelora_config.expert_names)
    before = _expert_bits(model)
    if labelled:
        corpus = {
            d: (Labelled(b.tokens, b.domains, b.sources), held_out)
            for d, (b, held_out) in corpus.items()
        }
    seconds = train(model, corpus, replace(recipe, learning_rate=ROUTER_LEARNING_RATE))
    if not all(torch.equal(now, then) for now, then in zip(_expert_bits(model), before)):
        raise RuntimeError("an expert changed while the router trained")
    return seconds


def _expert_bits(model: Any) -> list[torch.Tensor]:
    """A copy of every expert's A and B."""
    experts = [model.moelora.expert(e).values() for e in range(len(RANKS))]
    return [t.clone() for linears in experts for own in linears for t in (own.A, own.B)]


def export_and_check(model: Any, base: str, corpus: Corpus, folder: Path, name: str) -> None:
    """Export one expert as a PEFT folder; raises RuntimeError where stock PEFT gives other logits
    with it.
    """
    model.export_expert(name, folder)
    peft = PeftModel.from_pretrained(load_base(base), folder).eval()
    ids = corpus[name][1].tokens[:4]
    with torch.no_grad(), model.eval().use_experts(name):
        ours = model(ids).logits
        theirs = peft(ids).logits
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    reporting.line(
        f"expert {name} in stock PEFT from {folder}: largest relative difference of logits "
        f"{error:.1e}"
    )
    if error > 1e-5:
        raise RuntimeError(f"{folder} gives other logits in PEFT")


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run the example and return the table's lines."""
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    steps, block_size, held_out = (2, 32, 2) if options.quick else (options.steps, 64, 16)
    base = prepare_base(options.model, options.quick, options.output)
    tokenizer = AutoTokenizer.from_pretrained(base)
    corpus = load_corpus(tokenizer, block_size, max(steps, TEXTS), held_out, options.seed)
    recipe = Recipe(steps, LEARNING_RATE, options.seed, options.output)

    results = [Result("base", 0, 0, 0.0, held_out_loss(load_base(base), corpus, recipe))]
    folders, adapters = train_adapters(base, corpus, recipe, options.output / "adapters")
    results += [*adapters, oracle(adapters)]

    reporting.headline("composed, nothing trained")
    start = time.perf_counter()
    model = compose(base, folders, "arrow", router_init="arrow")
    reporting.line(
        f"base and four adapters loaded and composed in {time.perf_counter() - start:.1f} s"
    )
    results.append(measured("arrow", model, corpus, recipe))
    with model.use_experts(dict.fromkeys(RANKS, 0.25)):
        results.append(Result("uniform merge", 0, 0, 0.0, held_out_loss(model, corpus, recipe)))
    model = compose(base, folders, "top_k")
    texts = {domain: list(blocks.tokens[:TEXTS]) for domain, (blocks, _) in corpus.items()}
    initialise(model, "prototype", texts)
    results.append(measured("prototype", model, corpus, recipe))

    reporting.headline("the router trained, the experts frozen")
    seconds = train_router(model, corpus, recipe, labelled=False)
    results.append(measured("prototype, then router on the loss", model, corpus, recipe, seconds))
    model = compose(base, folders, "top_k")
    seconds = train_router(model, corpus, recipe, labelled=True)
    results.append(measured("random, then router on labels", model, corpus, recipe, seconds))

    reporting.loss_table(results)
    export_and_check(model, base, corpus, options.output / "exported" / "python", "python")
    return results


if __name__ == "__main__":
    main()
