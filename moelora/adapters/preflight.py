"""The preflight: everything that is wrong with a set of adapters for one base, in one table, before
anything loads.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ..injection.base import ACCESS, has_peft_layers
from ..injection.sites import features
from ..validation import expert_name_problem
from .folders import xlora_sources
from .reading import Adapter, read_adapter

Sources = Mapping[str, Any] | Iterable[tuple[str, Any]] | str | PathLike[str]
COLUMNS = ("adapter", "r", "targets", "size", "problems")
SHOWN = 4
STORABLE = ("F32", "F16", "BF16")
NO_MODULE = "the base has no module"


@dataclass
class Entry:
    """One adapter of the set.

    Attributes:
        name: the expert's name.
        adapter: the adapter's description, or None where it cannot be read at all.
        problems: what is wrong with it.
    """

    name: str
    adapter: Adapter | None
    problems: list[str] = field(default_factory=list)


@dataclass
class Preflight:
    """What `preflight` found.

    Attributes:
        base: what to call the base in messages.
        entries: an `Entry` for each adapter, in order.
    """

    base: str
    entries: list[Entry]

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, each with the adapter's name before it."""
        return [f"{entry.name}: {problem}" for entry in self.entries for problem in entry.problems]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters that can be read, by name."""
        return {entry.name: entry.adapter for entry in self.entries if entry.adapter is not None}

    def rows(self) -> list[tuple[str, ...]]:
        """What the table says of each adapter: name, ranks, number of linears, size, problems."""
        rows = []
        for entry in self.entries:
            problems = "; ".join(entry.problems) or "none"
            if entry.adapter is None:
                rows.append((entry.name, "", "", "", problems))
                continue
            targets = entry.adapter.targets
            ranks = sorted({target.r for target in targets.values()})
            span = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
            size = f"{entry.adapter.nbytes / 1e6:.2f} MB"
            rows.append((entry.name, span, str(len(targets)), size, problems))
        return rows

    def table(self) -> str:
        """The same as a Markdown table."""
        lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in self.rows():
            cells = [" ".join(cell.replace("|", "\\|").split()) for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def raise_if_bad(self) -> None:
        """Do nothing where all is well.

        Raises:
            ValueError: with the whole table.
        """
        if not self.ok:
            bad = sum(bool(entry.problems) for entry in self.entries)
            raise ValueError(
                f"{bad} of {len(self.entries)} adapters cannot become experts of {self.base}; "
                f"nothing was loaded.\n{self.table()}"
            )


def preflight(
    base: str | PathLike[str] | PreTrainedModel,
    adapters: Sources,
    *,
    allow_base_mismatch: bool = False,
    auto_class: type | None = None,
    **kwargs: Any,
) -> Preflight:
    """Check a set of adapters against a base; reads every tensor once, for NaN and Inf, and keeps
    none.

    Args:
        base: a loaded model, or a folder or hub id, of which only the configuration is read.
        adapters: sources of `read_adapter` by expert name, pairs of name and source, or the folder
            of an X-LoRA checkpoint.
        allow_base_mismatch: adapters may name another base; names and shapes of the linears must
            fit all the same.
        auto_class: the Auto class that would load the base; None takes what its configuration says.
        **kwargs: what finds the base: revision, subfolder …

    Raises:
        ValueError, TypeError: no adapters at all, or a base of the wrong kind.
        OSError: the base is not there.
    """
    model, name = _skeleton(base, auto_class, kwargs)
    entries = [_entry(who, source) for who, source in named_sources(adapters)]
    modules = dict(model.named_modules())
    for entry in entries:
        if entry.adapter is not None:
            if not allow_base_mismatch:
                entry.problems += _other_base(entry.adapter, name)
            entry.problems += misfits(entry.adapter, model, modules)
    _check_names(entries)
    return Preflight(name or type(model).__name__, entries)


def named_sources(adapters: Sources) -> list[tuple[str, Any]]:
    """The pairs of expert name and source in any form that `preflight` takes.

    Raises:
        ValueError: there are none.
        TypeError: something else came.
    """
    if isinstance(adapters, (str, PathLike)):
        adapters = xlora_sources(adapters)
    try:
        items: Any = adapters.items() if isinstance(adapters, Mapping) else adapters
        pairs = [(name, source) for name, source in items]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"adapters is a {type(adapters).__name__}; "
            'expected {"name": folder, hub id or PeftModel, …}.'
        ) from error
    if not pairs:
        raise ValueError("There are no adapters: give at least one.")
    return pairs


def misfits(
    adapter: Adapter, model: nn.Module, modules: Mapping[str, nn.Module] | None = None
) -> list[str]:
    """Why this adapter's tensors cannot be experts of `model`; empty where they can.

    Args:
        adapter: a described adapter.
        model: the base, which may be on the meta device.
        modules: the base's modules by name, where they are at hand.
    """
    if adapter.problems:
        more = len(adapter.problems) - 2 * SHOWN
        return adapter.problems[: 2 * SHOWN] + ([f"and {more} more like these"] if more > 0 else [])
    modules = dict(model.named_modules()) if modules is None else modules
    double = next(model.parameters()).dtype == torch.float64
    storable = {*STORABLE, "F64"} if double else {*STORABLE}
    wrong: dict[str, list[str]] = {}
    for linear, target in adapter.targets.items():
        size = features(modules[linear]) if linear in modules else None
        if linear not in modules:
            wrong.setdefault(NO_MODULE, []).append(linear)
        elif size is None:
            kind = type(modules[linear]).__name__
            wrong.setdefault(f"only linears can have experts, not {kind}", []).append(linear)
        elif (target.a_shape[1], target.b_shape[0]) != size:
            came = f"{linear} (A {list(target.a_shape)}, B {list(target.b_shape)}"
            wanted = f"expected [{target.r}, {size[0]}] and [{size[1]}, {target.r}])"
            wrong.setdefault("wrong shapes", []).append(f"{came}; {wanted}")
        for dtype in {target.a_dtype, target.b_dtype} - storable:
            wrong.setdefault(f"{dtype} cannot be held exactly; save it in F32", []).append(linear)
    problems = [f"{what}: {_some(where)}" for what, where in wrong.items()]
    if NO_MODULE in wrong:
        problems[list(wrong).index(NO_MODULE)] += _nearest(wrong[NO_MODULE][0], modules)
    try:
        return problems + _not_finite(adapter) + _trained_base(adapter, model)
    except (ValueError, OSError) as error:
        return [*problems, str(error).rstrip(".")]


def _not_finite(adapter: Adapter) -> list[str]:
    """A problem where A or B holds values that are not numbers."""
    bad = []
    for linear, target in adapter.targets.items():
        # Of other dtypes torch cannot tell, and they are refused anyway.
        if {target.a_dtype, target.b_dtype} <= {*STORABLE, "F64"} and not all(
            bool(factor.isfinite().all()) for factor in adapter.factors(linear)
        ):
            bad.append(linear)
    return [f"contains NaN or Inf: {_some(bad)}"] if bad else []


def _trained_base(adapter: Adapter, model: nn.Module) -> list[str]:
    """A problem where the adapter comes with weights of the base that are not the base's own."""
    # With duplicates: a tied head has two names.
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    trained = _trained(adapter)
    changed = []
    for name in adapter.saved:
        here = own.get(name)
        if here is not None and here.device.type == "meta":
            # Beside an adapted head PEFT saves a copy of the base's; without weights here there is
            # nothing to compare it with.
            same = name not in trained
        else:
            same = here is not None and _same(adapter.saved_tensor(name), here)
        if not same:
            changed.append(name)
    if not changed:
        return []
    return [
        "it comes with trained weights of the base itself (modules_to_save): "
        f"{_some(changed)}; all tokens share those, whichever experts they choose: train it "
        "without, or put them into the base and save it first"
    ]


def _trained(adapter: Adapter) -> list[str]:
    """Which of the tensors beside A and B the adapter says it trained; PEFT compares the ends of
    modules' names.
    """
    ends = tuple(map(str, adapter.config.get("modules_to_save") or ()))
    trained = []
    for name in adapter.saved:
        parts = name.split(".")
        if any(".".join(parts[:i]).endswith(ends) for i in range(1, len(parts))):
            trained.append(name)
    return trained


def _same(saved: torch.Tensor, here: torch.Tensor) -> bool:
    return saved.shape == here.shape and torch.equal(
        saved.to(here.device, here.dtype), here.detach()
    )


def _entry(name: Any, source: Any) -> Entry:
    problem = expert_name_problem(name)
    problems = [] if problem is None else [problem]
    try:
        return Entry(str(name), read_adapter(source), problems)
    except (ValueError, TypeError, OSError) as error:
        return Entry(str(name), None, [*problems, str(error).rstrip(".")])


def _check_names(entries: list[Entry]) -> None:
    # Also names that differ in case alone: some file systems hold both in one folder.
    by_folder: dict[str, list[Entry]] = {}
    for entry in entries:
        by_folder.setdefault(entry.name.casefold(), []).append(entry)
    for alike in by_folder.values():
        if len(alike) > 1:
            names = ", ".join(entry.name for entry in alike)
            for entry in alike:
                entry.problems.append(f"the name is given twice ({names}): rename one")


def _other_base(adapter: Adapter, name: str) -> list[str]:
    """A base by another name, unless one of the names is unknown."""
    if not name or not adapter.base or name == adapter.base or _last(name) == _last(adapter.base):
        return []
    return [
        f"it was trained on {adapter.base}, not on {name}: pass the right base, or "
        "allow_base_mismatch=True"
    ]


def _last(name: str) -> str:
    """The name without its owner or folders; of a folder in the hub's cache, the repository's."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else "").lower()


def _nearest(name: str, modules: Mapping[str, nn.Module]) -> str:
    near = difflib.get_close_matches(name, modules, n=2, cutoff=0.3)
    return f" (nearest: {', '.join(near)})" if near else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _skeleton(base: Any, auto_class: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, str]:
    """The base, or its modules without weights, and its name."""
    if isinstance(base, PreTrainedModel):
        if has_peft_layers(base):
            raise ValueError(
                f"This {type(base).__name__} has PEFT adapters inside, which changes its modules: "
                "unload them first."
            )
        return base, base.config.name_or_path or ""
    if not isinstance(base, (str, PathLike)):
        raise TypeError(
            f"base is a {type(base).__name__}; expected a hub id, a folder or a PreTrainedModel."
        )
    passed = (*ACCESS, "revision", "subfolder", "trust_remote_code", "gguf_file")
    found_by = {k: kwargs[k] for k in passed if kwargs.get(k) is not None}
    config = AutoConfig.from_pretrained(base, **found_by)
    if auto_class is None:
        classifier = any(
            n.endswith("ForSequenceClassification") for n in config.architectures or []
        )
        auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    trust = {k: v for k, v in found_by.items() if k == "trust_remote_code"}
    with torch.device("meta"):
        return auto_class.from_config(config, **trust), str(
            Path(base) if Path(base).is_dir() else base
        )
