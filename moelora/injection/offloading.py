"""Experts that stay on the host while the model computes elsewhere: begun, ended and reported."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from torch import nn

from ..core.expert_tier import Counts, ExpertTier
from ..validation import check_integer
from .modules import site_device


@dataclass(frozen=True)
class ExpertCacheReport:
    """How well the resident experts served since they were offloaded.

    resident, num_experts: how many experts a site has at hand at most, and how many there are.
    total: the counts of all sites together; `by_site`: those of each, by its first linear.
    bytes_resident: what the slots take, on the devices that compute.
    bytes_offloaded: what all experts take, on the host or in the checkpoint.
    """

    resident: int
    num_experts: int
    total: Counts
    by_site: dict[str, Counts]
    bytes_resident: int
    bytes_offloaded: int

    @property
    def hit_rate(self) -> float:
        """The share of experts that were resident when they were needed; 1 where none was."""
        asked = self.total.hits + self.total.fetched
        return self.total.hits / asked if asked else 1.0

    def __str__(self) -> str:
        total = self.total
        return (
            f"{self.resident} of {self.num_experts} experts resident a site, "
            f"{_size(self.bytes_resident)} of {_size(self.bytes_offloaded)}; "
            f"{self.hit_rate:.1%} of {total.hits + total.fetched} experts were there, "
            f"{total.fetched} were fetched ({total.prefetched} ahead), {_size(total.bytes_moved)}"
        )


def check_slots(resident: Any) -> None:
    """Raise ValueError or TypeError unless `resident` is a number of experts."""
    check_integer("resident", resident, 1)


def offload(model: Any, resident: int) -> None:
    """Keep the experts on the host; see `MoeLoraModel.offload_experts`."""
    check_slots(resident)
    mixture = model.moelora
    mixture.check_resident("offload its experts")
    for site in mixture.sites.values():
        for factor in site.factors():
            factor.stays = False
            factor.to("cpu")
            factor.stays = True
        site.tier = ExpertTier(site.factors, resident)
    mixture.tiers = [site.tier for site in mixture.sites.values()]


def onload(model: Any) -> None:
    """Have all experts where the model computes; see `MoeLoraModel.onload_experts`."""
    mixture = model.moelora
    if mixture.resident_experts is None:
        return
    for site in mixture.sites.values():
        device = site_device(model, site.names)
        for factor in site.factors():
            factor.stays = False
            for name, rows in list(factor.named_parameters()):
                # A copy: they may be a file's, which others may write.
                own = rows.detach().to(device, copy=True)
                setattr(factor, name, nn.Parameter(own, requires_grad=rows.requires_grad))
        site.tier = None
    mixture.tiers = []


def cache_report(model: Any, reset: bool = False) -> ExpertCacheReport:
    """See `MoeLoraModel.expert_cache_report`."""
    mixture = model.moelora
    if mixture.resident_experts is None:
        raise ValueError(
            "No experts are offloaded, so there is nothing to report: call "
            "model.offload_experts(resident=…) first."
        )
    tiers = {name: site.tier for name, site in mixture.sites.items()}
    by_site = {name: Counts(*astuple(tier.counts)) for name, tier in tiers.items()}
    report = ExpertCacheReport(
        resident=min(mixture.resident_experts, mixture.num_experts),
        num_experts=mixture.num_experts,
        total=Counts(*(sum(own) for own in zip(*map(astuple, by_site.values()), strict=True))),
        by_site=by_site,
        bytes_resident=sum(tier.resident_bytes() for tier in tiers.values()),
        bytes_offloaded=sum(p.nbytes for own in mixture.factors() for p in own.parameters()),
    )
    if reset:
        for tier in tiers.values():
            tier.counts = Counts()
    return report


def _size(num_bytes: float) -> str:
    """In words."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
