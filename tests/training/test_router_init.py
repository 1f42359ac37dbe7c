"""Routers that start good: arrow against a full SVD, prototypes that find whose text it is, before
any training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.mixtures import activate, causal
from training.runs import router_parameters

from moelora.training.router_init import discriminants, initialise

EXPERTS = ["a", "b", "c"]
SCOPES = ["site", "projection", "layer", "model"]


def mixture(**fields: Any) -> Any:
    return causal("llama", num_experts=3, num_experts_per_tok=1, expert_names=EXPERTS, **fields)


def texts_of() -> dict[str, list[torch.Tensor]]:
    """Each expert's texts are of tokens of its own."""
    torch.manual_seed(3)
    return {
        name: [torch.randint(5 + 12 * e, 17 + 12 * e, (24,)) for _ in range(16)]
        for e, name in enumerate(EXPERTS)
    }


@pytest.mark.parametrize("scope", ["site", "projection"])
def test_arrow_is_the_top_right_singular_vector(scope: str) -> None:
    model = mixture(router="arrow", router_scope=scope)
    initialise(model, "arrow")
    for site in model.moelora.sites.values():
        weight = list(model.moelora.routers.values())[site.router_index].weight
        for expert in range(3):
            factors = [model.moelora.expert(expert)[linear] for linear in site.names]
            deltas = [own.scaling * own.B.T @ own.A for own in factors]
            vector = torch.linalg.svd(torch.cat(deltas).detach().double()).Vh[0]
            assert abs(float(vector @ weight[expert].detach().double())) == pytest.approx(
                1.0, abs=1e-5
            )


def test_arrow_routes_by_direction_without_a_sign() -> None:
    model = mixture(router="arrow")
    initialise(model, "arrow")
    router = next(iter(model.moelora.routers.values()))
    for sign in (1.0, -1.0):
        assert router(sign * router.weight.detach()).expert_ids[:, 0].tolist() == [0, 1, 2]


def test_an_expert_that_is_not_there_has_no_direction() -> None:
    linear = "model.layers.0.self_attn.o_proj"
    model = mixture(router="arrow", expert_ranks={linear: [3, 0, 3]})
    initialise(model, "arrow")
    (site,) = (site for site in model.moelora.sites.values() if site.names == [linear])
    weight = list(model.moelora.routers.values())[site.router_index].weight
    assert not weight[1].any() and weight[0].norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scope", SCOPES)
def test_prototypes_route_texts_that_they_have_not_seen(scope: str, level: str) -> None:
    model = mixture(router_scope=scope, routing_level=level)
    # Experts as large as the base would move what later routers read, wherever one chooses wrongly.
    activate(model, std=0.03)
    initialise(model, "prototype", texts_of())
    torch.manual_seed(4)
    for expert, name in enumerate(EXPERTS):
        ids = torch.randint(5 + 12 * expert, 17 + 12 * expert, (8, 24))
        with torch.no_grad():
            routings = model(ids, output_expert_routing=True).expert_routing
        chosen = torch.cat([routing.expert_ids.flatten() for routing in routings])
        assert (chosen == expert).float().mean() > 0.75, name
        report = model.route(input_ids=ids)
        assert report is not None


@pytest.mark.parametrize("router", ["noisy_top_k", "soft", "top_p", "threshold", "sparsegen"])
def test_prototypes_set_every_router_with_linear_scores(router: str) -> None:
    fields = {"num_experts_per_tok": None, "router_scope": "layer", "expert_names": EXPERTS}
    like, model = (
        causal("llama", num_experts=3, router=kind, **fields) for kind in ("top_k", router)
    )
    for one in (like, model):
        initialise(one, "prototype", texts_of())
    for one, two in zip(model.moelora.router_list, like.moelora.router_list):
        assert torch.equal(one.get_parameter("weight"), two.get_parameter("weight"))


@pytest.mark.parametrize("router", ["mlp", "arrow", "cosine", "random"])
def test_prototypes_refuse_the_others(router: str) -> None:
    with pytest.raises(ValueError, match=rf"linear scores \(.*top_k.*top_p\), not '{router}'"):
        initialise(mixture(router=router), "prototype", texts_of())


def test_discriminants_are_those_of_the_closed_form() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 10.0, 0.0], [0.0, 10.0, 4.0]])
    classes = [centre + torch.randn(400, 3) * torch.tensor([3.0, 0.05, 1.0]) for centre in centres]
    rows = discriminants(classes)
    for expert, x in enumerate(classes):
        assert ((x @ rows.T).argmax(1) == expert).float().mean() > 0.95
    flat = torch.stack([x.mean(0) for x in classes])
    assert ((classes[1] @ flat.T).argmax(1) == 1).float().mean() < 0.95  # the plain means do worse


def test_texts_come_in_many_forms(tmp_path: Path) -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    tensors = texts_of()
    strings = {n: [" ".join(map(str, t.tolist())) for t in ts] for n, ts in tensors.items()}
    files = {}
    for name, lines in strings.items():
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n\n".join(lines))
    rows = {name: [{"text": line} for line in lines] for name, lines in strings.items()}
    weights = []
    for texts in (tensors, strings, files, rows):
        model = mixture()
        initialise(model, "prototype", texts, tokenizer)
        weights.append(next(iter(model.moelora.routers.values())).weight.detach())
    assert all(torch.equal(weight, weights[0]) for weight in weights)


@pytest.mark.parametrize(
    ("how", "fields", "texts", "message"),
    [
        (
            "best",
            {},
            None,
            "router_init='best' is unknown; expected one of: random, arrow, prototype",
        ),
        ("arrow", {}, None, "sets the rows of router='arrow', not 'top_k'"),
        (
            "arrow",
            {"router": "arrow", "router_scope": "layer"},
            None,
            "needs router_scope='site' or 'projection'",
        ),
        ("arrow", {"router": "arrow"}, {"a": ["x"]}, "texts are for router_init='prototype'"),
        ("prototype", {}, {"a": ["x"], "d": ["y"]}, r"missing \['b', 'c'\], unknown \['d'\]"),
        (
            "prototype",
            {},
            {"a": ["x"], "b": ["x"], "c": ["x"]},
            "'a' are strings: pass the base's tokenizer",
        ),
        ("prototype", {}, {"a": [], "b": [], "c": []}, "no texts of 'a'"),
        ("prototype", {}, {n: [torch.tensor([])] for n in "abc"}, "A text of 'a' has no tokens"),
    ],
)
def test_mistakes_are_named(how: str, fields: dict, texts: Any, message: str) -> None:
    model = mixture(**fields)
    before = [p.clone() for p in router_parameters(model)]
    with pytest.raises(ValueError, match=message):
        initialise(model, how, texts)
    assert all(torch.equal(p, was) for p, was in zip(router_parameters(model), before))
