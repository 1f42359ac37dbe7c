"""The demo: three tasks arrive one after another, and each one's data is gone when the next comes.

    python examples/quickstart.py [--model ID_OR_FOLDER] [--steps N] [--output FOLDER] [--seed N]

Every task wants its answers in a form of its own. One LoRA that is trained on and on forgets what
it knew. The mixture gets one more expert for each task, a LoRA trained by stock PEFT, and its gate
learns from the new prompts and a tenth of the old ones which expert a prompt needs. Beside them:
the LoRAs merged evenly, and one LoRA that has all the data at once. All learn for the same number
of steps a task, at the same rate; what comes out is printed, whichever wins.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that wait without turning in circles: on a busy machine a step took 20 s with circles and
# 4.5 s without. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import reporting
import torch
from arriving import ArrivingTask, Score, load_tasks, measure
from finetuning import ROWS, Recipe, fit, single_lora
from smollm2 import load_base, prepare_base
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.recipes import add_task
from moelora.training import PadRouting, Texts

RANK = 8
KEPT = 10  # one prompt in so many is kept of an old task
LEARNING_RATE = 2e-3
BASE = "base, untrained"
ONE = "one LoRA, trained on and on"
MERGED = "LoRAs of the tasks, merged evenly"
MIXTURE = "mixture: an expert a task, and a gate"
JOINT = "one LoRA on all the data at once"
# A row costs this many times as much to learn from as to be measured on.
BACKWARD = 3
Scores = dict[str, Score]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="any causal LM: an id or a folder (default: SmolLM2-135M)")
    parser.add_argument("--steps", type=int, default=16, help=f"of {ROWS} texts, for each task")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 steps on 2 layers: does it run?")
    return parser.parse_args(arguments)


@dataclass
class Demo:
    """One run: what all candidates share, and what they scored.

    stages: by candidate the scores after each arrival, on the tasks that had arrived by then.
    """

    base: str
    tasks: list[ArrivingTask]
    collator: PadRouting
    recipe: Recipe
    done: Callable[[int], None]
    stages: dict[str, list[Scores]] = field(default_factory=dict)

    @property
    def equal_rank(self) -> int:
        """The rank of one LoRA with the parameters of all experts together."""
        return RANK * len(self.tasks)

    def lora(self, rank: int) -> Any:
        """An untrained LoRA, by PEFT."""
        return single_lora(load_base(self.base), rank, self.recipe.seed)

    def learn(self, model: Any, texts: Texts) -> None:
        """Train a LoRA."""
        fit(model, plain(texts), self.collator, self.recipe, lambda n: self.done(BACKWARD * n))

    def scores(self, name: str, model: Any, arrived: int) -> None:
        """Note what a candidate scores on the tasks that have arrived."""
        found = {}
        for task in self.tasks[:arrived]:
            texts = task.test if hasattr(model, "moelora") else plain(task.test)
            found[task.name] = measure(model, texts, self.collator, self.done)
        self.stages.setdefault(name, []).append(found)


def plain(texts: Texts) -> Texts:
    """The texts as a model without routers takes them."""
    return texts.without("router_mask")


def trained_on(demo: Demo) -> None:
    """One LoRA that learns task after task."""
    model = demo.lora(demo.equal_rank)
    for arrived, task in enumerate(demo.tasks, 1):
        demo.learn(model, task.train)
        demo.scores(ONE, model, arrived)


def grown(demo: Demo) -> Any:
    """The mixture, which gets an expert a task; an old task leaves a tenth of its prompts."""
    model: Any = None
    memory: dict[str, Texts] = {}
    for arrived, task in enumerate(demo.tasks, 1):
        folder = demo.recipe.output / "adapters" / task.name
        lora = demo.lora(RANK)
        demo.learn(lora, task.train)
        lora.save_pretrained(str(folder))
        if model is None:
            model = MoeLoraForCausalLM.from_adapters(
                demo.base, {task.name: str(folder)}, mixture_config(task.name), dtype="float32"
            )
        else:
            add_task(model, task.name, task.train, adapter=str(folder), old=memory, replay=1.0)
        memory[task.name] = task.train.subset(range(0, len(task.train), KEPT))
        demo.scores(MIXTURE, model, arrived)
    return model


def mixture_config(first: str) -> MoeLoraConfig:
    """One expert to begin with; the gate reads a prompt's embeddings and picks one expert."""
    return MoeLoraConfig(
        num_experts=1,
        expert_names=[first],
        num_experts_per_tok=1,
        routing_level="sequence",
        router_scope="model",
        router_input_norm=True,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
        # What is chosen acts whole. The gate learns from prompts, not through this weight.
        norm_topk_prob=True,
    )


def with_all_data(demo: Demo) -> None:
    """One LoRA that learns all tasks at once, their rows in turns."""
    model = demo.lora(demo.equal_rank)
    parts = [task.train.rows for task in demo.tasks]
    demo.learn(model, Texts([row for rows in zip(*parts, strict=True) for row in rows]))
    demo.scores(JOINT, model, len(demo.tasks))


def compare(demo: Demo) -> Any:
    """Train and measure every candidate; return the mixture."""
    count = len(demo.tasks)
    demo.scores(BASE, load_base(demo.base), count)
    trained_on(demo)
    model = grown(demo)
    with model.use_experts(dict.fromkeys(model.moelora_config.expert_names, 1 / count)):
        demo.scores(MERGED, model, count)
    with_all_data(demo)
    return model


def work(tasks: list[ArrivingTask]) -> int:
    """All that is to be done, in rows that are measured on."""
    rows = sum(len(task.train) for task in tasks) * BACKWARD
    by_arrival = sum(len(task.test) * (len(tasks) - i) for i, task in enumerate(tasks))
    return 3 * rows + 2 * by_arrival + 3 * sum(len(task.test) for task in tasks)


def show_routing(model: Any, demo: Demo) -> None:
    """Print which expert the gate picks for the test prompts of each task."""
    shares = []
    for task in demo.tasks:
        batch = demo.collator(task.test.rows)
        del batch["labels"]
        shares.append(model.route(**batch).expert_share)

    experts = list(model.moelora_config.expert_names)
    reporting.share_table(torch.stack(shares), [task.name for task in demo.tasks], experts)


def show_answers(model: Any, tasks: list[ArrivingTask], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what the mixture answers to one new prompt of each task, greedily."""
    lines = {}
    for task in tasks:
        inputs = tokenizer(task.rows[0]["prompt"] + "\n", return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lines[task.name] = (task.rows[0]["prompt"], answer)
    reporting.generations(lines)


def save_and_reload(model: Any, tasks: list[ArrivingTask], folder: Path) -> None:
    """Save the mixture, load it again, and compare the logits of a prompt of each task bit for bit.

    Raises RuntimeError when they differ.
    """
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").to(model.device)
    with torch.no_grad():
        same = all(
            torch.equal(model.eval()(ids[None]).logits, reloaded.eval()(ids[None]).logits)
            for ids in (task.test[0]["input_ids"].to(model.device) for task in tasks)
        )
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    reporting.line(
        f"checkpoint: {checkpoint}, {size / 2**20:.1f} MiB; loaded again, logits equal bit for "
        f"bit: {same}"
    )
    if not same:
        raise RuntimeError(f"the model reloaded from {checkpoint} gives other logits")


def main(arguments: list[str] | None = None) -> dict[str, list[Scores]]:
    """Run the demo and return every candidate's scores after each arrival."""
    start = time.perf_counter()
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    # One bar for the whole is enough.
    logging.disable_progress_bar()
    # PEFT asks for an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    steps, test = (2, 4) if options.quick else (options.steps, 24)
    base = prepare_base(options.model, options.quick, options.output)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tasks = load_tasks(tokenizer, steps * ROWS, test)
    reporting.arrivals(tasks)

    recipe = Recipe(steps, LEARNING_RATE, options.seed, options.output)
    collator = PadRouting(pad_token_id=tokenizer.pad_token_id or 0)
    with reporting.progress(work(tasks)) as done:
        demo = Demo(base, tasks, collator, recipe, done)
        model = compare(demo)

    reporting.score_table(demo.stages, unlike=JOINT)
    picture = options.output / "forgetting.png"
    reporting.plot_stages({name: demo.stages[name] for name in (ONE, MIXTURE)}, picture)
    show_routing(model, demo)
    show_answers(model, tasks, tokenizer)
    save_and_reload(model, tasks, options.output)
    minutes = (time.perf_counter() - start) / 60
    reporting.line(f"picture: {picture}; the whole demo took {minutes:.1f} minutes")
    return demo.stages


if __name__ == "__main__":
    main()
