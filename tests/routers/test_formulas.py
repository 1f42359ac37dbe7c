"""Each router's weights and gradients are its paper's, written here from the paper in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moelora import ROUTERS, MoeLoraConfig
from moelora.routers import Router, Routing

E, D, ROWS, SEED = 5, 6, 7, 3


def router_of(name: str, training: bool = False, **fields) -> Router:
    """A router in float64 whose parameters are all far from 0."""
    config = MoeLoraConfig(num_experts=E, router=name, **fields)
    router = ROUTERS[name](config, D).double().train(training)
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.8 * drawn
    return router


def inputs(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gates(routing: Routing, choices: int = E) -> Tensor:
    """The weight of each choice, `[N, choices]`."""
    ids = routing.expert_ids
    weights = routing.expert_weights.masked_fill(ids < 0, 0.0)
    gate = torch.zeros(len(ids), choices, dtype=weights.dtype)
    return gate.scatter_add(1, ids.clamp(min=0), weights)


def gates_of(router: Router, x: Tensor, **call) -> Tensor:
    torch.manual_seed(SEED)
    return gates(router(x, **call), router.num_choices)


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def by_row(of_row):
    """A plain function of (router, scores of a row, that row) as one of all rows."""

    def of_all(router: Router, x: Tensor) -> Tensor:
        scores = (x @ router.get_parameter("weight").T).tolist()
        rows = [of_row(router, own, row) for own, row in zip(scores, x)]
        return torch.tensor(rows, dtype=torch.float64)

    return of_all


def normed(weights: list[float]) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights]


@by_row
def soft(router, scores, row):
    return softmax([s / router.options.temperature for s in scores])


def of_nucleus(router, scores, row):
    p = softmax(scores)
    chosen, total = [0.0] * E, 0.0
    for e in sorted(range(E), key=lambda e: -p[e]):
        chosen[e] = p[e]
        total += p[e]
        if total >= router.options.p:
            break
    return chosen


def of_threshold(router, scores, row):
    score = float(row @ router.threshold_weight[0] + router.threshold_bias)
    largest = router.options.max_threshold or 1 / E
    tau = largest / (1 + math.exp(-score))
    return [max(p - tau, 0.0) for p in softmax(scores)]


top_p = by_row(lambda *given: normed(of_nucleus(*given)))
top_p_as_in_the_paper = by_row(of_nucleus)
threshold = by_row(lambda *given: normed(of_threshold(*given)))
threshold_alone = by_row(of_threshold)


@by_row
def sparsegen(router, scores, row):
    """Bisection for t, at which max(z − t, 0) / (1 − λ) add up to 1."""
    rest = 1 - router.options.sparsity
    if router.options.predicts_sparsity:
        hidden = (router.sparsity_hidden_weight @ row + router.sparsity_hidden_bias).clamp(min=0)
        score = float(router.sparsity_weight[0] @ hidden + router.sparsity_bias)
        rest = 1 - (1 - 0.01 + math.log(1 / (1 + math.exp(-score))))
    low, high = min(scores) - rest, max(scores)
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if sum(max(s - t, 0.0) for s in scores) > rest else (low, t)
    return [max(s - t, 0.0) / rest for s in scores]


def cosine(router: Router, x: Tensor) -> Tensor:
    rows = []
    for row in x:
        y = router.projection @ row
        scores = []
        for e in router.embeddings:
            scores.append(float(y @ e / (y.norm() * e.norm()) * router.log_scale.exp()))
        kept = sorted(scores)[-2:]
        rows.append(normed([math.exp(s) if s in kept else 0.0 for s in scores]))
    return torch.tensor(rows, dtype=torch.float64)


def noisy(router: Router, x: Tensor) -> Tensor:
    """H = x W_g + N(0, 1) · softplus(x W_noise); G = softmax(KeepTopK(H, 2))."""
    torch.manual_seed(SEED)
    noise = torch.randn(len(x), E, dtype=torch.float64)
    h = x @ router.weight.T + noise * torch.log(1 + torch.exp(x @ router.noise_weight.T))
    kept = h >= h.sort(1).values[:, -2:-1]
    return h.masked_fill(~kept, -torch.inf).softmax(1)


def no_norm(**options):
    return {"norm_topk_prob": False, "router_options": options}


# Name: router, fields, formula.
CASES = {
    "noisy_top_k": ("noisy_top_k", {}, noisy),
    "soft": ("soft", {"router_options": {"temperature": 0.5}}, soft),
    "top_p": ("top_p", {"router_options": {"p": 0.7}}, top_p),
    "top_p 1": ("top_p", {"router_options": {"p": 1.0}}, top_p),
    "top_p, not normed": ("top_p", no_norm(p=0.6), top_p_as_in_the_paper),
    "threshold": ("threshold", {}, threshold),
    "threshold, not normed": ("threshold", no_norm(max_threshold=0.9), threshold_alone),
    "sparsegen, sparsemax": ("sparsegen", {}, sparsegen),
    "sparsegen, dense": ("sparsegen", {"router_options": {"sparsity": -4.0}}, sparsegen),
    "sparsegen, sparse": ("sparsegen", {"router_options": {"sparsity": 0.4}}, sparsegen),
    "sparsegen, predicted": (
        "sparsegen",
        {"router_options": {"predicts_sparsity": True, "hidden_size": 3}},
        sparsegen,
    ),
    "cosine": ("cosine", {"router_options": {"hidden_size": 3}}, cosine),
}
cases = pytest.mark.parametrize("case", CASES)


def made(case: str, **more) -> Router:
    name, fields, _ = CASES[case]
    return router_of(name, training=name == "noisy_top_k", **fields, **more)


@cases
def test_the_weights_are_the_papers(case):
    router = made(case)
    x = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            gates_of(router, x), CASES[case][2](router, x), rtol=1e-9, atol=1e-9
        )


@cases
def test_every_parameters_gradient_is_the_slope_of_the_weights(case):
    """By finite differences."""
    router = made(case)
    x = inputs(4)
    names, parameters = zip(*router.named_parameters())

    def weights(*tensors: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        routing = functional_call(router, dict(zip(names, tensors)), (x,))
        return gates(routing)

    assert torch.autograd.gradcheck(weights, parameters, eps=1e-7, atol=1e-6)
    loss = (gates_of(router, x) * torch.arange(E)).sum()
    for gradient in torch.autograd.grad(loss, parameters):
        assert bool(gradient.any())


@cases
def test_with_banned_experts_it_is_the_router_of_the_others(case):
    router = made(case)
    x = inputs()
    banned = torch.tensor([False, True, False, True, False])
    found = gates_of(router, x, banned=banned)
    assert not found[:, banned].any()
    if "noisy" not in case and "threshold" not in case:
        # Those two depend on how many choices there are: on their noise, and τ_max = 1 / E.
        others = made(case)
        others.resize([0, 2, 4])
        torch.testing.assert_close(found[:, ~banned], gates_of(others, x), rtol=1e-9, atol=1e-9)
    loss = (found * torch.arange(E)).sum()
    for gradient in torch.autograd.grad(loss, list(router.parameters())):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.partition(",")[0] in ("threshold", "sparsegen")]
)
def test_a_limit_keeps_the_heaviest(case):
    most = made(case, num_experts_per_tok=2)
    x = inputs(40)
    whole, kept = gates_of(made(case), x), gates_of(most, x)
    assert int((whole > 0).sum(1).max()) > 2 == int((kept > 0).sum(1).max())
    expected = whole.masked_fill(whole < whole.sort(1).values[:, -2:-1], 0.0)
    if most.norm_topk_prob:
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(kept, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_top_p_stops_at_its_limit(limit):
    router = router_of("top_p", num_experts_per_tok=limit, router_options={"p": 0.999})
    routing = router(inputs(40))
    assert routing.expert_ids.shape == (40, limit) and bool((routing.expert_ids >= 0).all())
    largest = routing.logits.softmax(1).topk(limit).indices
    assert torch.equal(routing.expert_ids, largest)


def test_a_selection_bias_brings_an_expert_to_the_front_of_top_p():
    router = router_of("top_p", router_options={"p": 0.5})
    x = inputs(40)
    bias = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0], dtype=torch.float64)
    plain, shifted = gates_of(router, x), gates_of(router, x, selection_bias=bias)
    assert bool((shifted[:, 2] > 0).all()) and not bool((plain[:, 2] > 0).all())


def test_rows_below_a_high_threshold_have_no_expert():
    router = router_of("threshold", router_options={"max_threshold": 0.99})
    router.threshold_bias.data += 9.0
    routing = router(0.1 * inputs(20))
    assert bool((routing.expert_ids == -1).all()) and not routing.expert_weights.any()
    (1e9 * routing.expert_weights).sum().backward()
    for parameter in router.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_equal_scores_share_the_weight():
    for name in ("soft", "sparsegen", "threshold"):
        found = gates_of(router_of(name), torch.zeros(2, D, dtype=torch.float64))
        torch.testing.assert_close(found, torch.full_like(found, 1 / E))


def test_the_predicted_sparsity_begins_near_the_one_that_is_given():
    options = {"predicts_sparsity": True, "sparsity": 0.4}
    router = ROUTERS["sparsegen"](MoeLoraConfig(router="sparsegen", router_options=options), D)
    rest = router.rest(inputs(200).float()).detach()
    assert float((1 - rest).mean()) == pytest.approx(0.4, abs=0.05)
    assert 0.001 < float(rest.std()) < 0.1


def test_the_cosine_router_does_not_see_how_long_its_input_is():
    router = router_of("cosine")
    x = inputs()
    torch.testing.assert_close(router(x).logits, router(1e3 * x).logits)
