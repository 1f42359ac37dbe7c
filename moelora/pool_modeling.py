"""The public methods of a model that are about its pool of experts: who is in it, who trains, and
where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import rooms
from .core.model import MixtureModel

if TYPE_CHECKING:
    from .expert_pool.optimizer_state import PoolChange
    from .injection.offloading import ExpertCacheReport

Names = str | Iterable[str]


class PoolModel(MixtureModel):
    """What every model with a mixture inside can do with its pool of experts."""

    def add_expert(
        self,
        name: str,
        *,
        adapter: Any = None,
        copy_of: str | None = None,
        noise: float = 0.0,
        r: int | None = None,
        lora_alpha: float | None = None,
        seed: int | None = None,
        allow_base_mismatch: bool = False,
    ) -> PoolChange:
        """Add a trainable expert: a fresh one (B = 0), a PEFT adapter, or a copy of another.

        The other experts and their router rows keep their bits. A copy begins with the router row
        of its original, any other expert with the mean of all rows. Shared experts stay the last.
        A fresh expert's A begins as `expert_init` says: "kaiming" at random; "orthogonal" also
        orthogonal to all rows that the others have now; "svd" with the first right singular
        vectors that the others do not read. An A that all experts share stays as it is.

        Args:
            name: of the new expert; it must be fit for a folder.
            adapter: a folder, hub id or `PeftModel`.
            copy_of: an expert's name.
            noise: the Gaussian noise on a copy, in standard deviations of each factor's block; a
                shared A stays as it is.
            r: the rank of a fresh expert, by default the others', or their most common.
            lora_alpha: of a fresh expert, likewise.
            seed: for A or the noise.
            allow_base_mismatch: take an adapter that names another base.

        Returns:
            What `resume_optimizer` needs to go on with an optimizer.

        Raises:
            ValueError, TypeError: a name or an adapter that does not fit, arguments at odds, or no
                room for further directions of A in a linear ("orthogonal", "svd").
        """
        return rooms.changes.add_expert(
            self,
            name,
            adapter=adapter,
            copy_of=copy_of,
            noise=noise,
            r=r,
            lora_alpha=lora_alpha,
            seed=seed,
            allow_base_mismatch=allow_base_mismatch,
        )

    def replace_expert(self, name: str, **options: Any) -> PoolChange:
        """Put a new trainable expert in the place of one.

        Args:
            name: of the expert.
            options: as those of `add_expert`, which raises the same errors.
        """
        return rooms.changes.replace_expert(self, name, **options)

    def remove_expert(self, name: str) -> PoolChange:
        """Remove an expert with its router rows; the others keep their bits.

        Args:
            name: of the expert. At least num_experts_per_tok experts must remain.
        """
        return rooms.changes.remove_expert(self, name)

    def freeze_experts(self, names: Names) -> PoolChange:
        """Freeze experts: no gradient, no optimizer state, no weight decay.

        Args:
            names: of the experts. Hand what comes back to `resume_optimizer` if there is one.
        """
        return rooms.changes.freeze_experts(self, names)

    def unfreeze_experts(self, names: Names) -> PoolChange:
        """Train frozen experts again.

        Args:
            names: as in `freeze_experts`.
        """
        return rooms.changes.unfreeze_experts(self, names)

    def offload_experts(self, resident: int) -> None:
        """Keep the experts on the host, and of each site `resident` where the model computes: for
        inference with more experts than fit there.

        Those that a forward pass chooses and that are not resident are fetched, in the place of the
        least recently used; with router_scope="model" for all layers before the first of them runs.
        The outputs are the same as with all experts resident, and a forward pass may choose more
        experts than are (it then computes in several passes). Saving, exporting, adding and
        removing experts work as ever; training raises.

        Args:
            resident: how many experts of each site are at hand, at least 1.

        Raises:
            ValueError, TypeError: a wrong number, or weights that another engine keeps elsewhere.
        """
        rooms.offloading.offload(self, resident)

    def onload_experts(self) -> None:
        """Bring all experts back to where the model computes, to train them for instance."""
        rooms.offloading.onload(self)

    def expert_cache_report(self, *, reset: bool = False) -> ExpertCacheReport:
        """How often the experts that were needed were resident, and how many bytes were moved.

        Args:
            reset: count from here on.

        Raises:
            ValueError: no experts are offloaded.
        """
        return rooms.offloading.cache_report(self, reset)
