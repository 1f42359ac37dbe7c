"""What one request decides in the routers' place: read from its `extra_args`, and checked before it
is queued.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams

from .. import config
from ..core.context import MixtureContext
from ..core.overrides import Override, override_of
from ..validation import check_names, check_number
from .tracker_v1 import TrackerV1
from .tracker_v2 import ValidatorV2

# In `SamplingParams.extra_args`, over HTTP `vllm_xargs`.
USE = "use_experts"
WEIGHTS = "expert_weights"
BANNED = "banned_experts"
CONTEXT = "router_context"
REPORT = "routing_report"
ARGUMENTS = (USE, WEIGHTS, BANNED, CONTEXT, REPORT)
# Of a mixture's configuration what these are checked by.
FIELDS = (
    *("num_experts", "num_shared_experts", "expert_names", "null_expert", "num_experts_per_tok"),
    *("router", "router_options", "routing_level", "layer_experts"),
)
PREFIX = "Tracker_"
LONGEST_LABEL = 200


@dataclass(frozen=True)
class Choice:
    """What a request decides.

    Args:
        override: what its routers may not decide, or None.
        context: what its routers read from outside, `[n]`, or None.
        report: by which name its routing is kept, or None.
    """

    override: Override | None = None
    context: Tensor | None = None
    report: str | None = None


def choice_of(context: MixtureContext, given: Mapping[str, Any] | None) -> Choice | None:
    """What a request's `extra_args` decide; None where they say nothing to a mixture.

    Args:
        context: of the mixture.
        given: the request's `extra_args`.

    Raises:
        ValueError, TypeError: unknown experts, weights of a wrong form, or contradictions.
    """
    own = {name: given[name] for name in ARGUMENTS if given and given.get(name) is not None}
    reads_outside = _reads_outside(context.config)
    if CONTEXT not in own and reads_outside and WEIGHTS not in own and USE not in own:
        raise ValueError(
            f"router='context' reads {CONTEXT}, which this request lacks: give a list of "
            f"{context.config.router_options['context_size']} numbers in extra_args (over HTTP in "
            "vllm_xargs)."
        )
    if not own:
        return None
    if CONTEXT in own and not reads_outside:
        raise ValueError(
            f"{CONTEXT} is read by router='context', and this mixture has "
            f"{context.config.router!r}: drop it."
        )
    weights = _weights(context.config, own)
    cpu = torch.device("cpu")
    override = override_of(context, weights, own.get(BANNED), 1, 1, cpu)
    return Choice(override, _context(context.config, own.get(CONTEXT)), _label(own.get(REPORT)))


def _weights(config_: config.MoeLoraConfig, own: Mapping[str, Any]) -> Tensor | None:
    """Weights of all experts `[E]`, from names or numbers, or None."""
    if USE in own and WEIGHTS in own:
        raise ValueError(f"{USE} and {WEIGHTS} both say which experts act: give one of them.")
    if WEIGHTS in own:
        return _numbers(WEIGHTS, own[WEIGHTS], config_.num_experts, "one an expert")
    if USE not in own:
        return None
    names = [own[USE]] if isinstance(own[USE], str) else own[USE]
    if not isinstance(names, (Mapping, Sequence)) or not names:
        raise TypeError(f"{USE}={own[USE]!r}; expected an expert's name, names, or names: weights.")
    check_names(list(names), config_.expert_names or [], "experts")
    weights = torch.zeros(config_.num_experts)
    for name in names:
        weight = names[name] if isinstance(names, Mapping) else 1.0
        check_number(f"{USE}[{name!r}]", weight, -float("inf"), float("inf"))
        weights[config_.expert_index(name)] = weight
    return weights


def _context(config_: config.MoeLoraConfig, given: Any) -> Tensor | None:
    if given is None:
        return None
    size = (config_.router_options or {})["context_size"]
    return _numbers(CONTEXT, given, size, "as router_options['context_size'] says")


def _numbers(name: str, given: Any, count: int, what: str) -> Tensor:
    """A list of `count` finite numbers as a tensor."""
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if not is_list or len(given) != count:
        raise ValueError(f"{name}={given!r:.200}; expected a list of {count} numbers, {what}.")
    for i, number in enumerate(given):
        check_number(f"{name}[{i}]", number, -float("inf"), float("inf"))
    return torch.tensor([float(number) for number in given])


def _label(given: Any) -> str | None:
    if given is not None and (not isinstance(given, str) or not 0 < len(given) <= LONGEST_LABEL):
        raise ValueError(
            f"{REPORT}={given!r:.200}; expected a name of at most {LONGEST_LABEL} letters, by "
            "which the request's routing can be had."
        )
    return given


def _reads_outside(config_: config.MoeLoraConfig) -> bool:
    return config_.router == "context"


def tracker_for(config_: config.MoeLoraConfig, **engine: bool) -> str:
    """The name of the class that knows what this mixture's requests may ask for.

    Requests are checked where they come in, by a class that vLLM finds by its name and that is told
    nothing of the engine: so what it must know is in the name.

    Args:
        config_: the mixture's.
        engine: of the engine `shares_prefixes`, whether requests use each other's keys and values;
            `has_graphs`, whether CUDA graphs are recorded; `is_v2`, whether its runner is V2.
    """
    fields = {name: getattr(config_, name) for name in FIELDS}
    return f"{__name__}:{PREFIX}{json.dumps({'fields': fields, **engine}).encode().hex()}"


def tracker_of(processors: Sequence[Any] | None) -> Any:
    """The class that `tracker_for` named, among the names of an engine's logits processors.

    Args:
        processors: `model_config.logits_processors`.
    """
    start = f"{__name__}:{PREFIX}"
    (own,) = {p for p in processors or () if isinstance(p, str) and p.startswith(start)}
    return _tracker(own.rpartition(":")[2])


def __getattr__(name: str) -> type:
    """The class that `tracker_for` named."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"{__name__} has no {name!r}.")
    return _tracker(name)


@functools.lru_cache(maxsize=32)
def _tracker(name: str) -> type:
    known = json.loads(bytes.fromhex(name.removeprefix(PREFIX)))
    context = MixtureContext(config.MoeLoraConfig(r=1, **known["fields"]))

    def read(params: SamplingParams | None) -> Choice | None:
        try:
            choice = choice_of(context, params.extra_args if params is not None else None)
        except TypeError as error:
            # vLLM answers a client with ValueErrors; other errors it takes for its own.
            raise ValueError(str(error)) from error
        if choice is None:
            return None
        decides = choice.override is not None or choice.context is not None
        if decides and known["shares_prefixes"]:
            raise ValueError(
                "This request decides about experts, and with prefix caching its keys and values "
                "would be others' too: start the engine with enable_prefix_caching=False "
                "(--no-enable-prefix-caching)."
            )
        if known["has_graphs"]:
            raise ValueError(
                "This request decides about experts or asks for its routing, which recorded CUDA "
                "graphs do not heed: start the engine with enforce_eager=True (--enforce-eager)."
            )
        return choice

    runner = ValidatorV2 if known["is_v2"] else TrackerV1
    return type(name, (runner,), {"read": staticmethod(read), "__module__": __name__})
