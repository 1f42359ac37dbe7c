"""What a configuration says of the choice and the ranks of experts, when experts come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mode

from ..config import MoeLoraConfig
from ..core.experts import LoraFactors
from ..core.mixture import Mixture


def carry_choices(
    mixture: Mixture,
    config: MoeLoraConfig,
    keep: Sequence[int | None],
    fresh: Mapping[str, LoraFactors],
    original: int | None,
) -> None:
    """Give `config`, of the changed experts, which layers have them and how often each is dropped.

    Patterns and counts, by which ranks and layers were written out, no longer describe them.

    Args:
        mixture: before the change.
        config: whose number of experts is the new one already.
        keep: expert i is the former expert `keep[i]`, or the new one where that is None.
        fresh: the new expert's factors by the linear's name, where it is there.
        original: the number of the expert that the new one is a copy of, or None.
    """
    for name in ("rank_pattern", "alpha_pattern", "experts_per_layer"):
        setattr(config, name, None)
    dropout = mixture.config.expert_dropout
    if isinstance(dropout, list):
        new = mode(dropout) if original is None else dropout[original]
        config.expert_dropout = [new if e is None else dropout[e] for e in keep]
    by_layer = mixture.config.layer_experts
    if by_layer is None:
        return
    routed = keep[: config.num_routed_experts]
    with_new = {
        site.layer
        for site in mixture.sites.values()
        for name in site.names
        if name in fresh and len(fresh[name].A)
    }
    config.layer_experts = {
        layer: [i for i, e in enumerate(routed) if e in former or (e is None and layer in with_new)]
        for layer, former in by_layer.items()
    }


def common_shape(config: MoeLoraConfig, linear: str) -> tuple[int, float] | None:
    """The rank and scaling in one linear, where all experts that are there have the same."""
    shapes = set(zip(config.ranks_of(linear), config.scaling_of(linear)))
    present = [(rank, scaling) for rank, scaling in shapes if rank]
    return present[0] if len(present) == 1 else None
