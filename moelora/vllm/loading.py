"""Loading a checkpoint into vLLM's model: its tensors cut for this process, its base checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..checkpoint.load import CHANGEABLE
from ..checkpoint.reading import read
from ..checkpoint.state import differing_values, sample_of
from ..core.mixture import LayerExperts, Mixture
from .attach import Attached
from .config import BASE, MoeLoraConfig
from .linears import Place

BASE_PREFIX = "base."
# How many rows of a linear are compared, to see that vLLM has them in the same order.
COMPARED_ROWS = 16


@dataclass(frozen=True)
class Checkpoint:
    """What the header of a checkpoint says.

    Args:
        folder: where it is.
        config: the mixture's configuration.
        base_print: the fingerprint of its base.
        tensors: its tensors; empty where they come another way.
    """

    folder: str
    config: MoeLoraConfig
    base_print: dict[str, Any]
    tensors: dict[str, Tensor]


def open_checkpoint(
    given: MoeLoraConfig, folder: str, revision: str | None, keep: bool = False
) -> Checkpoint:
    """Read and check a checkpoint's file.

    Args:
        given: what config.json says, perhaps with `hf_overrides`.
        folder: where it is, or its id.
        revision: of a repository.
        keep: keep the tensors.

    Raises:
        ValueError: the file is damaged, or its config.json belongs to another one.
    """
    path = cached_file(folder, SAFE_WEIGHTS_NAME, revision=revision)
    tensors, saved, base_print = read(Path(str(path)))
    differing = [name for name in saved.field_names() if differs(name, saved, given)]
    if fixed := sorted(set(differing) - set(CHANGEABLE)):
        raise ValueError(
            f"{folder}: config.json and {SAFE_WEIGHTS_NAME} say different things of "
            f"{', '.join(fixed)}: save the mixture again."
        )
    return Checkpoint(folder, given, base_print, tensors if keep else {})


def differs(name: str, one: Any, other: Any) -> bool:
    """Whether two configurations have different values of a field.

    Args:
        name: of the field.
        one, other: the configurations.
    """
    return getattr(one, name) != getattr(other, name)


class Loading:
    """One loading of weights.

    Args:
        base: vLLM's model of the base.
        attached: the mixture inside of it.
        checkpoint: what the weights belong to.
        any_base: whether the base may be another one.
    """

    def __init__(self, base: nn.Module, attached: Attached, checkpoint: Checkpoint, any_base: bool):
        self.base = base
        self.attached = attached
        self.checkpoint = checkpoint
        self.any_base = any_base
        self.sample: dict[str, list[float]] = {}
        self.dtypes: dict[str, str] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights; returns the names of all parameters that have values now."""
        own: dict[str, Tensor] = {}
        # The checkpoint comes first, then the base.
        stream = iter(weights)
        first = self._read_own(stream, own)
        saved = {key: tensor for key, tensor in own.items() if not Mixture.owns(key)}
        done: set[str] = set()
        if first is not None or saved:
            loaded = self.base.load_weights(self._base_weights(first, stream, saved))  # type: ignore
            done = {f"{BASE_PREFIX}{name}" for name in loaded or ()}
        if first is not None:
            self._check_base()
            self._check_order()
        self._fill({key: tensor for key, tensor in own.items() if Mixture.owns(key)})
        return done | {name for name, _, _ in self._own()}

    def replace(self, folder: str) -> Checkpoint:
        """Take over another checkpoint of the same mixture; returns it."""
        before = self.checkpoint
        given = type(before.config).from_pretrained(folder)
        given.__dict__[BASE] = before.config.base()
        opened = open_checkpoint(given, folder, None, keep=True)
        places = ("base_model_name_or_path", "base_folder", "base_subfolder", "base_revision")
        loose = {*places, "expert_sources", "base_config", "experts_per_layer", *_ONLY_TRAINING}
        fields = sorted(set(given.field_names()) - loose)
        if changed := [name for name in fields if differs(name, before.config, opened.config)]:
            raise ValueError(
                f"{folder} is another mixture than the one that is served ({before.folder}): "
                f"{', '.join(changed)} differ. Start an engine for it."
            )
        if opened.base_print != before.base_print:
            raise ValueError(
                f"{folder} belongs to another base than the one that is served "
                f"({before.folder}): start an engine for it."
            )
        tensors = opened.tensors
        self._check_fit({key: tensor for key, tensor in tensors.items() if Mixture.owns(key)})
        self.load(tensors.items())
        return Checkpoint(folder, before.config, opened.base_print, {})

    def _read_own(
        self, stream: Iterator[tuple[str, Tensor]], own: dict[str, Tensor]
    ) -> tuple[str, Tensor] | None:
        """Put what is the checkpoint's into `own`; returns the first that is the base's."""
        for key, tensor in stream:
            if key.startswith(BASE_PREFIX):
                return key, tensor
            own[key] = tensor
        return None

    def _base_weights(
        self,
        first: tuple[str, Tensor] | None,
        stream: Iterator[tuple[str, Tensor]],
        saved: dict[str, Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        """The base's weights, with those that the mixture has trained in their places."""
        left = dict(saved)
        for key, tensor in _chained(first, stream):
            name = key.removeprefix(BASE_PREFIX)
            self._note(name, tensor)
            own = left.pop(name, None)
            if own is not None and name.removesuffix(".weight") in self.rows:
                self._note(name, own)
            yield name, tensor if own is None else own
        yield from left.items()

    def _note(self, name: str, tensor: Tensor) -> None:
        """Keep what shows later that this is the right base, in vLLM's places."""
        if name in self.checkpoint.base_print["sample"] and tensor.is_floating_point():
            self.sample[name] = sample_of(tensor)
            self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        place = self.attached.places.get(name.removesuffix(".weight"))
        if place is not None and tensor.dim() == 2 and tensor.is_floating_point():
            self.rows[name.removesuffix(".weight")] = _some_rows(tensor, place)

    def _check_base(self) -> None:
        """Raise ValueError where the base is not the one that the experts were trained on."""
        if self.any_base:
            return
        known = self.checkpoint.base_print
        common = {name: known["sample"][name] for name in self.sample}
        found = {"sample": self.sample, "dtypes": self.dtypes}
        differing = differing_values({**known, "sample": common}, found)
        if known["sample"] and not common:
            differing = ["none of its weights has a name that is known"]
        if differing:
            where, _ = self.checkpoint.config.where_base()
            raise ValueError(
                f"The base at {where} is not the one that {self.checkpoint.folder} was trained on: "
                f"{'; '.join(differing)}. Put the right one there, or set "
                'additional_config={"moelora": {"allow_base_mismatch": true}} to serve the experts '
                "on this one all the same."
            )

    def _check_order(self) -> None:
        """Raise ValueError where vLLM has a linear's outputs in another order than the experts, or
        where that cannot be seen and is not sure.
        """
        for name, place in self.attached.places.items():
            held = getattr(place.layer, "weight", None)
            rows = self.rows.pop(name, [])
            is_plain = isinstance(held, Tensor) and held.dim() == 2 and held.is_floating_point()
            if is_plain and rows:
                part = held[place.columns][_spread(place).to(held.device)]
                same = any(torch.equal(part, own.to(part)) for own in rows)
            else:
                # Quantised: what vLLM knows to be packed is in a known order.
                same = not place.is_fused
            if not same:
                raise ValueError(
                    f"vLLM does not have the outputs of {name} in the order that transformers has, "
                    "so its experts would be added in wrong places: serve this mixture with "
                    'additional_config={"moelora": {"transformers_backend": true}}.'
                )

    def _own(self) -> Iterator[tuple[str, str, Tensor]]:
        """The mixture's tensors: their names in the model, their keys in a checkpoint, and they."""
        for name, module in self.base.named_modules():
            if isinstance(module, LayerExperts):
                for own, tensor in module.state_dict(keep_vars=True).items():
                    yield f"{BASE_PREFIX}{name}.{own}", f"{name}.{own}", tensor
        state = self.attached.mixture.state_dict(prefix="moelora.", keep_vars=True)
        yield from ((key, key, tensor) for key, tensor in state.items())

    def _check_fit(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of all tensors; ValueError where they are not the mixture's."""
        parts = {}
        held = {key: tensor for _, key, tensor in self._own()}
        wrong = [f"{key} is missing" for key in held if key not in tensors]
        for key, tensor in tensors.items():
            cut = self.attached.cuts.get(key)
            parts[key] = tensor if cut is None else tensor[:, cut]
            if key not in held:
                wrong.append(f"{key} is unknown")
            elif parts[key].shape != held[key].shape:
                wrong.append(f"{key} is {list(tensor.shape)}, expected {list(held[key].shape)}")
        if wrong:
            raise ValueError(
                f"{self.checkpoint.folder} does not fit: {'; '.join(wrong[:6])} ({len(wrong)} in "
                "all)."
            )
        return parts

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        parts = self._check_fit(tensors)
        for _, key, tensor in self._own():
            tensor.detach().copy_(parts[key])


# What only training reads.
_ONLY_TRAINING = (
    *("lora_dropout", "expert_dropout", "expert_init", "router_prefix_tokens"),
    *("router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef"),
    *("router_aux_loss_window", "expert_target_loss_coef"),
)


def _chained(
    first: tuple[str, Tensor] | None, rest: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    if first is not None:
        yield first
    yield from rest


def _spread(place: Place) -> Tensor:
    """The outputs that are compared, as numbers among this process's."""
    width = place.columns.stop - place.columns.start
    return torch.linspace(0, width - 1, COMPARED_ROWS).long().unique()


def _some_rows(weight: Tensor, place: Place) -> list[Tensor]:
    """The compared outputs' rows of a linear's weight as a checkpoint has it, `[d_out, d_in]` or
    the other way round, cut for this process.
    """
    outputs = _spread(place) + (place.outputs.start or 0)
    rows = []
    for whole in (weight, weight.T):
        if len(whole) > int(outputs[-1]):
            rows.append(whole[outputs][:, place.inputs].clone())
    return rows
