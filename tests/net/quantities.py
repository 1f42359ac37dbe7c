"""What is recorded of a mixture: forward passes, training steps, forcing and generation."""

from __future__ import annotations

import torch
from access import E, trainable
from models import batch, plain
from recorder import Recorder


def evaluation(case: Recorder, level: str) -> None:
    """Forward passes in eval mode, with and without labels, and the report of the routing."""
    model, inputs = case.model, batch(10)
    with torch.no_grad():
        case.outputs("eval", model(**inputs))
        case.outputs("eval routed", model(**inputs, output_expert_routing=True))
        case.outputs("eval unlabelled", model(**plain(inputs)))
    report = model.route(**plain(inputs))
    for name in ("by_router", "by_sequence", "probabilities", "choice_names"):
        case.keep(f"route {name}", getattr(report, name))
    case.keep("route routers", [n.replace("-", ".") for n in report.router_names])
    case.keep("route routing", report.routing)


def training(case: Recorder, level: str, classes: int = 0) -> None:
    """Two optimizer steps of two micro-batches each, then losses of other kinds, a step each."""
    model = case.model.train()
    items = None
    for step in range(2):
        # Labels from the start in one of them: a sequence router reads a prefix there.
        micro = [batch(20 + 2 * step, 4, 9, classes), batch(21 + 2 * step, 0, 7, classes)]
        items = sum(int((m["labels"] != -100).sum()) for m in micro)
        given = {} if classes else {"num_items_in_batch": torch.tensor(items)}
        for i, inputs in enumerate(micro):
            torch.manual_seed(100 * step + i)
            outputs = case.outputs(f"step {step}.{i}", model(**inputs, **given))
            outputs.loss.backward()
        case.gradients(f"step {step}")
        case.step()
    for name, (parameter, rows) in trainable(model, case.frozen).items():
        case.keep(f"after {name}", parameter[rows])
    targets = {"targets": torch.tensor([1, -100])}
    if level == "token":
        each = torch.randint(0, E, (2, 9), generator=torch.Generator().manual_seed(2))
        targets["token targets"] = each.masked_fill(torch.arange(9) % 3 == 0, -100)
    for what, choice in targets.items():
        for inputs in (batch(30, 4, 9, classes), plain(batch(31))):
            torch.manual_seed(3)
            if level == "sequence" and "labels" not in inputs:
                inputs["router_mask"] = inputs["attention_mask"].bool()
            label = what if "labels" in inputs else f"{what} alone"
            outputs = case.outputs(label, model(**inputs, expert_targets=choice))
            outputs.loss.backward()
            case.gradients(label)
            case.step()
    outside(case, level)


def outside(case: Recorder, level: str) -> None:
    """A loss that the training loop makes of the logits, and the routing alone."""
    model, inputs = case.model, plain(batch(40))
    if level == "sequence":
        inputs["router_mask"] = (torch.arange(9) < 4).expand(2, -1)
    torch.manual_seed(4)
    outputs = case.outputs("outside", model(**inputs))
    outputs.logits.square().mean().backward()
    case.gradients("outside")
    case.step()
    torch.manual_seed(5)
    routing = model.routing_only(**inputs)
    case.keep("routing only", routing)
    sum(r.logits.square().mean() for r in routing).backward()
    case.gradients("routing only")
    case.step()


def forcing_that_learns(case: Recorder) -> None:
    """Weights of every shape that take gradients, in training."""
    model, inputs = case.model.train(), batch(50)
    for shape in ((E,), (2, E), (2, 9, E)):
        generator = torch.Generator().manual_seed(6)
        weights = torch.rand(shape, generator=generator).requires_grad_()
        torch.manual_seed(6)
        outputs = case.outputs(f"learned {shape}", model(**inputs, expert_weights=weights))
        outputs.loss.backward()
        case.keep(f"learned {shape} weights", weights.grad)
        case.gradients(f"learned {shape}")
        case.step()


def forcing(case: Recorder) -> None:
    """Experts forced and banned, by context and by input, in eval mode."""
    model, inputs = case.model.eval(), batch(60)
    contexts = {
        "one": dict(experts="expert_1"),
        "two": dict(experts=["expert_1", "expert_3"]),
        "weighted": dict(experts={"expert_0": 0.7, "expert_2": -0.3}),
        "none": dict(experts={"expert_0": 0.0}),
        "ban": dict(ban="expert_0"),
        "ban three": dict(ban=["expert_0", "expert_1", "expert_2"]),
    }
    with torch.no_grad():
        for name, how in contexts.items():
            with model.use_experts(**how):
                case.outputs(f"use {name}", model(**inputs, output_expert_routing=True))
        with model.use_experts(ban="expert_0"), model.use_experts({"expert_1": 0.5}):
            case.outputs("use nested", model(**inputs))
        case.outputs("banned", model(**inputs, banned_experts=["expert_3"]))
        for shape in ((E,), (2, E), (2, 9, E)):
            weights = torch.rand(shape, generator=torch.Generator().manual_seed(7))
            weights = weights.masked_fill(weights < 0.4, 0)
            case.outputs(f"forced {shape}", model(**inputs, expert_weights=weights))


def generation(case: Recorder) -> None:
    """Greedy, beams and samples from a batch padded on the left, free and forced."""
    model, inputs = case.model.eval(), plain(batch(70))
    common = dict(return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    common |= dict(max_new_tokens=5, min_new_tokens=5)
    weights = torch.rand(2, 9, E, generator=torch.Generator().manual_seed(8))
    ways = {
        "greedy": {},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "samples": {"do_sample": True, "num_return_sequences": 2},
        "uncached": {"use_cache": False},
        "forced": {"expert_weights": weights, "num_beams": 2},
        "banned": {"banned_experts": ["expert_2"]},
    }
    for name, way in ways.items():
        torch.manual_seed(9)
        made = model.generate(**inputs, **common, **way)
        case.keep(f"generate {name} sequences", made.sequences)
        case.keep(f"generate {name} logits", torch.stack(made.logits))
