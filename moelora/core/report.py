"""`RoutingReport`: which experts were chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..routers import Routing
from .collapse import ENOUGH, collapse_in_words, shares_of

if TYPE_CHECKING:
    from ..config import MoeLoraConfig
    from .mixture import Mixture


@dataclass(frozen=True)
class RoutingReport:
    """Which experts the routers chose for a batch, and how probable each was; padding is left out.

    choice_names: the routed experts, and with `null_expert` after them "(base)": C names; where
    experts are forced, all experts.
    router_names: what each routes.
    by_router: `[num_routers, C]` each choice's share of a router's slots (rows sum to 1).
    by_sequence: `[batch, C]` each choice's share of a sequence's slots, over all routers.
    probabilities: `[batch, C]` the softmax of the logits, mean over a sequence's tokens and over
    routers; where experts are forced, by_sequence.
    routing: one `Routing` a router, as they came.
    config: of the mixture.
    shared_experts: those that act on every token beside the chosen ones; no share counts them.
    """

    choice_names: list[str]
    router_names: list[str]
    by_router: Tensor
    by_sequence: Tensor
    probabilities: Tensor
    routing: tuple[Routing, ...]
    config: MoeLoraConfig
    shared_experts: tuple[str, ...] = ()

    @property
    def expert_share(self) -> Tensor:
        """Each choice's share of all slots, `[C]`: the mean over routers."""
        return self.by_router.mean(0)

    def top_experts(self) -> list[str]:
        """For each sequence the name of the most probable choice."""
        return [self.choice_names[i] for i in self.probabilities.argmax(1).tolist()]

    def collapse(self) -> str:
        """Which router leaves most of its experts idle on this batch, in words with what to change;
        "" where none does, or where too few rows were routed to say (20 slots a choice).

        It means something for a batch of all the kinds of text that the experts are for. Where
        experts are forced, no router has chosen, and there is nothing to say.
        """
        if any(own.logits.shape[-1] != len(self.choice_names) for own in self.routing):
            return ""
        slots = [int((own.expert_ids >= 0).sum()) for own in self.routing]
        rows = len(self.routing[0].expert_ids)
        if min(slots) < ENOUGH * len(self.choice_names):
            return ""
        in_use = max(min(slots) // rows, 1)
        return collapse_in_words(self.by_router, in_use, self.config, self.router_names)

    def __str__(self) -> str:
        shares = ", ".join(
            f"{n} {s:.1%}" for n, s in zip(self.choice_names, self.expert_share.tolist())
        )
        always = f"; always {', '.join(self.shared_experts)}" if self.shared_experts else ""
        return f"RoutingReport({len(self.router_names)} routers; {shares}{always})"

    @classmethod
    def of(
        cls, mixture: Mixture, routing: tuple[Routing, ...], inputs: dict[str, Any]
    ) -> RoutingReport:
        """Count the choices in `routing` of a forward pass on `inputs`."""
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        assert tokens is not None
        batch, length = tokens.shape[:2]
        config = mixture.config
        names = config.choice_names
        shared = tuple(config.shared_expert_names)
        if all(own.logits.shape[-1] == 0 for own in routing):
            # Forced, perhaps to shared ones.
            names = [*(config.expert_names or []), *names[config.num_routed_experts :]]
            shared = ()
        mask = inputs.get("attention_mask")
        present = torch.ones(batch, length) if mask is None else mask.detach().float().cpu()
        counts = [_by_sequence(_slots(own, names, config), present) for own in routing]
        by_router = torch.stack([shares_of(own.sum(0)) for own in counts])
        zero = torch.zeros(())
        by_sequence = sum((shares_of(own) for own in counts), zero) / len(routing)
        probabilities = by_sequence
        asked = [own.logits.detach().cpu() for own in routing if own.logits.shape[-1] == len(names)]
        if asked:
            probable = [_by_sequence(logits.softmax(-1), present) for logits in asked]
            probabilities = sum((shares_of(own) / len(routing) for own in probable), zero)
        routers = list(mixture.router_names)
        of_batch = (by_router, by_sequence, probabilities, routing)
        return cls(names, routers, *of_batch, mixture.config, shared)


def _slots(routing: Routing, names: list[str], config: MoeLoraConfig) -> Tensor:
    """How many slots of each row went to each choice, `[N, C]`."""
    experts = len(names) - int(config.null_expert)
    counts = torch.nn.functional.one_hot(routing.expert_ids.cpu() + 1, experts + 1).sum(1).float()
    # An empty slot is a choice where routers may choose no expert, and else nothing (a banned
    # expert's).
    return counts.roll(-1, dims=1) if config.null_expert else counts[:, 1:]


def _by_sequence(rows: Tensor, present: Tensor) -> Tensor:
    """rows `[N, C]` of tokens or sequences, summed over the tokens in present `[batch, S]`:
    `[batch, C]`.
    """
    batch = len(present)
    choices = rows.shape[-1]
    if len(rows) == present.numel():
        return (rows.view(*present.shape, choices) * present.unsqueeze(-1)).sum(1)
    return rows.view(batch, -1, choices).sum(1)
