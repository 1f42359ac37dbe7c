"""The model classes, with every public method: what it takes, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from . import rooms
from .config import MoeLoraConfig
from .core.expert_init import begin_experts
from .core.forward import compute_device
from .core.inputs import ROUTING_ONLY
from .core.overrides import Experts, overriding
from .core.report import RoutingReport
from .pool_modeling import PoolModel
from .routers import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Folder = str | PathLike[str]
Names = str | Iterable[str]


class MoeLoraModel(PoolModel):
    """What every model with a mixture inside can do, whatever its base."""

    config_class = MoeLoraConfig

    @classmethod
    def from_base(
        cls, base: Folder | PreTrainedModel, config: MoeLoraConfig | None = None, **kwargs: Any
    ) -> Any:
        """Put a new mixture into a base; until the first step its logits stay the same bits.

        Args:
            base: a hub id, a folder, or a loaded model, which is changed in place (`unload()` gives
                it back).
            config: of the mixture; by default `MoeLoraConfig()`.
            kwargs: for the base's `from_pretrained`: dtype, device_map, quantization_config …

        Raises:
            ValueError, TypeError: a base of the wrong kind, or no module to adapt.
        """
        config = MoeLoraConfig() if config is None else config
        if not isinstance(config, MoeLoraConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a MoeLoraConfig.")
        config = config.without_base()
        config.validate()
        model, _ = rooms.base.base_for(cls, base, config, kwargs)
        return rooms.inject.put_into(model, config, cls, then=begin_experts)

    @classmethod
    def from_adapters(
        cls,
        base: Folder | PreTrainedModel,
        adapters: Any,
        config: MoeLoraConfig | None = None,
        *,
        allow_base_mismatch: bool = False,
        router_init: str = "random",
        texts: Mapping[str, Any] | None = None,
        tokenizer: Callable[..., Any] | None = None,
        split: str | None = None,
        noise: float | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put trained PEFT LoRA adapters into their base as experts; all train unless they are
        frozen.

        Args:
            base: as in `from_base`.
            adapters: by expert name a folder, hub id or `PeftModel`; or an X-LoRA checkpoint's
            folder.
            config: the routing; ranks, scalings, names and targets come from the adapters.
            allow_base_mismatch: take adapters that name another base.
            router_init: where the routers begin: "random", "arrow" or "prototype" (see
                `moelora.training.router_init.initialise`).
            texts: for "prototype": by expert's name a few of its texts.
            tokenizer: for texts that are strings.
            split: make the `config.num_experts` experts of one adapter, passed alone: "copy" or
                "svd" (see `moelora.adapters.splitting.split_adapter`).
            noise, seed: of split="copy".
            kwargs: for the base's `from_pretrained`.

        Raises:
            ValueError: an adapter that does not fit, with all that is wrong in a table.
        """
        kwargs |= {"router_init": router_init, "texts": texts, "tokenizer": tokenizer}
        kwargs |= {"split": split, "noise": noise, "seed": seed}
        kwargs["allow_base_mismatch"] = allow_base_mismatch
        return rooms.composing.from_adapters(cls, base, adapters, config, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Folder, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a folder (or hub repository) written by `save_pretrained`: the base, then the
        experts.

        Args:
            pretrained_model_name_or_path: the folder or repository.
            kwargs: `base`, a folder, id or loaded model to use instead of the one that the
                checkpoint names (an Auto class deep-copies a loaded one first, which quanto's
                weights refuse); `resident_experts`, to offload the experts into the checkpoint's
                file (see `offload_experts`), so that at no time all are in memory;
                `allow_base_mismatch`, to take a base with other weights than
                those the experts were trained on; num_experts_per_tok and what else leaves the
                tensors' meaning alone, instead of what was saved; `output_loading_info`; all others
                go to the base's `from_pretrained` (its quantization_config is else what it was).

        Raises:
            ValueError: no such checkpoint, a damaged or newer one, or another base, with what
            differs.
        """
        return rooms.load.load(cls, pretrained_model_name_or_path, **kwargs)

    def unload(self) -> PreTrainedModel:
        """Take the mixture out, in place; returns the base as it was before."""
        return rooms.inject.unload(self)

    @torch.no_grad()
    def route(self, **inputs: Any) -> RoutingReport:
        """Report which experts the routers choose, and how surely.

        With router_scope="model" the forward pass stops once its router has read.

        Args:
            inputs: of forward: input_ids, attention_mask …
        """
        return RoutingReport.of(self.moelora, self.routing_only(**inputs), inputs)

    def routing_only(self, **inputs: Any) -> tuple[Routing, ...]:
        """The same forward pass as `route`, with gradients: one `Routing` a router, no losses
        attached.

        Args:
            inputs: of forward.
        """
        return self(**inputs, output_expert_routing=ROUTING_ONLY).expert_routing

    @contextmanager
    def use_experts(self, experts: Experts | None = None, *, ban: Names | None = None):
        """Inside, every token uses these experts, or the routers choose among fewer.

        It holds for the calls of this thread or asyncio task, and for what it starts with
        `asyncio.to_thread`; a `threading.Thread` started inside does not see it (hand it
        `expert_weights`, or run it by `contextvars.copy_context().run`). Contexts nest: bans add
        up, inner experts replace outer ones.

        Args:
            experts: a name, names (weight 1 each), or names with weights.
            ban: names that may not be chosen; without `experts` the routers choose among the rest,
                and where fewer than num_experts_per_tok remain, among those.

        Raises:
            ValueError, TypeError: an unknown name, no expert left, an expert that is both used and
                banned, weights that are not finite, or neither experts nor ban.
        """
        with overriding(self.moelora, experts, ban, compute_device(self)):
            yield self

    def describe_experts(
        self, texts: Mapping[str, Any], tokenizer: Callable[..., Any] | None = None
    ) -> None:
        """Set what router="descriptor" knows of these experts, from a few texts of each.

        The other experts' descriptors keep their bits. The first description also fits the
        projection to its texts: name all experts in it. Later ones leave the projection as it is,
        so a newcomer (`add_expert`) is chosen from then on without training.

        Args:
            texts: by expert's name ("(base)" too, with `null_expert`) a list of strings, a file's
                path, rows with a "text", or tensors of token ids.
            tokenizer: for texts that are strings.

        Raises:
            ValueError: another router, an unknown expert, no text, no tokenizer for strings.
        """
        rooms.router_init.describe_experts(self, texts, tokenizer)

    def export_expert(
        self,
        name: str,
        folder: Folder,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write one expert as a LoRA folder that `PeftModel.from_pretrained` loads to its logits.

        Its A, B and trained head keep their bits. The folder is there as a whole or not at all.

        Args:
            name: of the expert.
            folder: where to write.
            dtype: what A and B are cast to.
            overwrite: replace a folder that holds an adapter.

        Raises:
            ValueError, TypeError: no such expert, one without any rank or with NaN, no such dtype.
            FileExistsError, OSError: the folder is not empty, or cannot be written.
        """
        rooms.export.export_expert(self, name, folder, dtype=dtype, overwrite=overwrite)

    def export_merged(
        self,
        weights: Mapping[str, float],
        folder: Folder,
        *,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        recipe: str = "linear",
        overwrite: bool = False,
        **options: Any,
    ) -> rooms.export.MergeReport:
        """Write a fixed mixture of experts as one LoRA folder for PEFT.

        Args:
            weights: by expert's name, as `use_experts` takes them.
            folder: where to write.
            rank: None writes what the recipe makes, by concatenation along rank; else the best
                approximation of this rank.
            dtype: what A and B are cast to.
            recipe: one of `moelora.adapters.merging.RECIPES`; those whose ΔW does not have a low
                rank (ties, dare_linear, dare_ties, breadcrumbs) need `rank`.
            overwrite, options: replace an adapter; what the recipe takes (density, seed …).

        Raises:
            ValueError, TypeError: as `export_expert`; an unknown recipe or option, a wrong rank.
            FileExistsError, OSError: as `export_expert`.
        """
        how = {"rank": rank, "recipe": recipe, "dtype": dtype, "overwrite": overwrite}
        return rooms.export.export_merged(self, weights, folder, **how, **options)

    def merge_and_unload(
        self, weights: Mapping[str, float], *, recipe: str = "linear", **options: Any
    ) -> PreTrainedModel:
        """Merge a fixed mixture into the base's weights, in place, and return the plain base.

        Sums are in float64 and cast once. Nothing is changed where one linear fails.

        Args:
            weights, recipe, options: as in `export_merged`.

        Raises:
            ValueError, TypeError: as `export_merged`; a quantised, offloaded or tied linear.
        """
        rooms.export.merge_into_base(self, weights, recipe, options)
        return self.unload()

    def save_pretrained(
        self,
        save_directory: Folder,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_base: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write experts, routers, config and card, with `save_base` the base too: all or nothing.

        Args:
            save_directory: the folder.
            is_main_process: False writes nothing.
            state_dict: the model's tensors, where someone else has gathered them.
            save_base: write the base too, in a folder of its own inside.
            kwargs: max_shard_size … for the base; for_hub=True names no folder of this machine.

        Raises:
            OSError: the folder cannot be written; the checkpoint that was there is left as it was.
            ValueError, TypeError: another model in the folder, NaN, an unknown keyword.
        """
        if is_main_process:
            rooms.save.save(
                self, save_directory, state_dict=state_dict, save_base=save_base, **kwargs
            )

    def _upload_modified_files(self, working_dir: Folder, *args: Any, **kwargs: Any) -> Any:
        rooms.save.prepare_upload(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load tensors; missing keys of the base are forgiven, missing keys of the mixture never.

        Args:
            state_dict, strict, assign: as in torch; a factor's rows may be one tensor.

        Raises:
            RuntimeError: a key of the mixture is missing, too many, or of the wrong shape.
        """
        return rooms.state.load_state_dict(self, state_dict, strict, assign)


class MoeLoraForCausalLM(MoeLoraModel):
    """A causal language model with a mixture inside; also an instance of its base's class.

    `forward` and `generate` take what the base's take, and seven inputs of ours, which
    `help(model.forward)` describes with what the output gains: router_mask, expert_routing,
    expert_targets, output_expert_routing, expert_weights, banned_experts and router_context.
    """

    auto_class = AutoModelForCausalLM


class MoeLoraForSequenceClassification(MoeLoraModel):
    """A sequence classifier with a mixture of LoRA experts inside; its head trains too.

    See `MoeLoraForCausalLM`.
    """

    auto_class = AutoModelForSequenceClassification
    is_classifier = True
