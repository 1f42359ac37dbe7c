"""Decoding through all linears of a decoder layer, as a model does it: one plan and one shrink for
each site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from moelora_kernels import BACKENDS, TopK, build_decode_plan, build_plan, expand, reference, shrink
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.kernels.candidates import FROZEN, SCALING, ours, refusal
from benchmarks.kernels.cases import Case, Layer
from benchmarks.kernels.check import TOLERANCES, WrongResult
from benchmarks.kernels.measures import Row, Run, spread
from benchmarks.kernels.timing import Call, captured, timed

MEASURE = "layer decode"
ROUTED = "ours triton, router inside"


@dataclass(frozen=True)
class SiteInputs:
    """A site's tensors: x [T, d_in], lora_A [L·R, d_in], and W_l [d_out, d_in], B_l [R, d_out] of
    its L linears.

    ids and weights [T, K] are what router [E, d_in] makes of x.
    """

    x: Tensor
    lora_A: Tensor
    bases: list[Tensor]
    lora_Bs: list[Tensor]
    router: Tensor
    ids: Tensor
    weights: Tensor


def layer_decode(run: Run) -> list[Row]:
    """The layer's linears with a mixture over the layer's linears alone, for each backend of ours.

    The routing is given, and on the triton backend's decode path also computed, router and all.
    """
    layer = run.suite.layer
    rows: list[Row] = []
    for tokens in run.suite.decode_tokens:
        name = layer.named(tokens)
        sites = [_site(run, layer, tokens, d_in, d_outs) for d_in, d_outs in layer.sites]
        calls: dict[str, Callable[[], list[Tensor]]] = {FROZEN: lambda sites=sites: _bases(sites)}
        wanted = _wanted(sites, layer)
        refused = []
        for backend in BACKENDS:
            if backend == "reference":
                continue
            if reason := refusal(backend, run.device, run.suite.dtype):
                refused.append((backend, reason))
                continue
            added = {
                ours(backend): lambda sites=sites, backend=backend: _mixtures(sites, layer, backend)
            }
            if backend == "triton":
                added[ROUTED] = lambda sites=sites, backend=backend: _mixtures(
                    sites, layer, backend, routes=True
                )
            for candidate, call in added.items():
                _check(call, wanted, candidate, run.suite.dtype)
            calls |= added
        rows += _rows(run, name, calls)
        rows += [
            {"case": name, "measure": MEASURE, "candidate": ours(b), "not run": why}
            for b, why in refused
        ]
    return rows


def _rows(run: Run, case: str, calls: dict[str, Callable[[], list[Tensor]]]) -> list[Row]:
    ready: dict[str, Call] = {name: _without_gradients(call) for name, call in calls.items()}
    if run.is_gpu:
        ready = {name: captured(call) for name, call in ready.items()}
    timings = timed(ready, run.device, run.suite.rounds)
    return [
        {
            "case": case,
            "measure": MEASURE,
            "candidate": name,
            "microseconds": 1e6 * timings.median(name),
            "microseconds min": 1e6 * min(timings.seconds[name]),
            **spread("over frozen linear", timings.ratio(name, FROZEN)),
        }
        for name in ready
    ]


def _site(run: Run, layer: Layer, tokens: int, d_in: int, d_outs: tuple[int, ...]) -> SiteInputs:
    linears = [
        run.inputs(Case(tokens, d_in, d_out, layer.experts, layer.rank, layer.top_k), seed)
        for seed, d_out in enumerate(d_outs)
    ]
    first = linears[0]
    router = torch.randn(layer.experts, d_in, device=run.device) / d_in**0.5
    ids, weights = reference.top_k(first.x.detach().double(), router.double(), layer.top_k)
    lora_A = torch.cat([part.A.detach() for part in linears])
    bases = [part.base for part in linears]
    lora_Bs = [part.B.detach() for part in linears]
    return SiteInputs(first.x.detach(), lora_A, bases, lora_Bs, router, ids, weights.float())


def _bases(sites: list[SiteInputs]) -> list[Tensor]:
    return [linear(site.x, base) for site in sites for base in site.bases]


@torch.no_grad()
def _mixtures(
    sites: list[SiteInputs], layer: Layer, backend: str, routes: bool = False
) -> list[Tensor]:
    offsets = _offsets(layer)
    scaling = (SCALING,) * layer.experts
    results = []
    for site in sites:
        plan = _plan(site, layer, backend, routes)
        hs = shrink(site.x, site.lora_A, (offsets,) * len(site.bases), plan, checked=True)
        for h, base, lora_B in zip(hs, site.bases, site.lora_Bs, strict=True):
            y = linear(site.x, base)
            results.append(expand(h, lora_B, offsets, scaling, plan, y, inplace=True, checked=True))
    return results


def _plan(site: SiteInputs, layer: Layer, backend: str, routes: bool):
    if routes:
        return build_decode_plan(TopK(site.router), len(site.x), layer.top_k, backend=backend)
    total = layer.experts * layer.rank
    return build_plan(
        site.ids,
        site.weights,
        layer.experts,
        total_rank=total,
        complete=True,
        backend=backend,
        dtype=site.x.dtype,
    )


def _wanted(sites: list[SiteInputs], layer: Layer) -> list[Tensor]:
    results = []
    for site in sites:
        x = site.x.double()
        As = site.lora_A.double().chunk(len(site.bases))
        for A, base, lora_B in zip(As, site.bases, site.lora_Bs, strict=True):
            routing = (site.ids, site.weights.double())
            scaling = (SCALING,) * layer.experts
            y = x @ base.double().T
            results.append(
                reference.lora_mixture(x, A, lora_B.double(), *routing, _offsets(layer), scaling, y)
            )
    return results


def _check(
    call: Callable[[], list[Tensor]], wanted: list[Tensor], candidate: str, dtype: torch.dtype
) -> None:
    for number, (got, expected) in enumerate(zip(call(), wanted, strict=True)):
        error = float((got.double() - expected).norm() / expected.norm())
        if not error <= TOLERANCES[dtype]:
            raise WrongResult(f"{candidate}, {MEASURE}: linear {number} is off by {error:.1e}")


def _offsets(layer: Layer) -> tuple[int, ...]:
    return tuple(range(0, layer.experts * layer.rank + 1, layer.rank))


def _without_gradients(call: Callable[[], object]) -> Call:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run
