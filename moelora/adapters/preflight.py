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

from ..checkpoint.load import ACCESS
from ..injection.targets import features, has_peft_layers
from .folders import xlora_sources
from .reading import Adapter, read_adapter

Sources = Mapping[str, Any] | Iterable[tuple[str, Any]] | str | PathLike[str]
# What Windows keeps for devices: an expert's folder could not have this name there.
RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10)),
}
MAX_NAME = 96
SHOWN = 4
STORABLE = ("F32", "F16", "BF16")


@dataclass
class Entry:
    """One adapter of the set: its description, or None where it cannot be read at all, and what is
    wrong with it.
    """

    name: str
    adapter: Adapter | None
    problems: list[str] = field(default_factory=list)


@dataclass
class Preflight:
    """What `preflight` found: an `Entry` for each adapter, in order."""

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

    def table(self) -> str:
        """A Markdown table: adapter, rank, number of target linears, size, problems."""
        lines = ["| adapter | r | targets | size | problems |", "|---|---|---|---|---|"]
        for entry in self.entries:
            adapter = entry.adapter
            ranks = sorted({t.r for t in adapter.targets.values()}) if adapter is not None else []
            shown = [
                entry.name,
                f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks)),
                str(len(adapter.targets)) if adapter is not None else "",
                f"{adapter.nbytes / 1e6:.2f} MB" if adapter is not None else "",
                "; ".join(entry.problems) or "none",
            ]
            cells = [" ".join(cell.replace("|", "\\|").split()) for cell in shown]
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
                f"{bad} of {len(self.entries)} adapters cannot become experts of {self.base}; nothing was loaded.\n"
                f"{self.table()}"
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

    base: a loaded model, or a folder or hub id, of which only the configuration is read.
    adapters: sources of `read_adapter` by expert name, pairs of name and source, or an X-LoRA
    checkpoint's folder.
    allow_base_mismatch: adapters may name another base; names and shapes of the linears must fit
    all the same.
    auto_class: how the base would be loaded, default by its configuration; kwargs find it:
    revision, subfolder …

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
    """The pairs of name and source that were meant.

    Raises:
        ValueError: there are none. TypeError: something else came.
    """
    if isinstance(adapters, (str, PathLike)):
        adapters = xlora_sources(adapters)
    try:
        items: Any = adapters.items() if isinstance(adapters, Mapping) else adapters
        pairs = [(name, source) for name, source in items]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f'adapters is a {type(adapters).__name__}; expected {{"name": folder, hub id or PeftModel, …}}.'
        ) from error
    if not pairs:
        raise ValueError("There are no adapters: give at least one.")
    return pairs


def misfits(
    adapter: Adapter, model: nn.Module, modules: Mapping[str, nn.Module] | None = None
) -> list[str]:
    """Why this adapter's tensors cannot be experts of `model` (which may be on the meta device); []
    if they can.
    """
    if adapter.problems:
        more = len(adapter.problems) - 2 * SHOWN
        return adapter.problems[: 2 * SHOWN] + ([f"and {more} more like these"] if more > 0 else [])
    modules = dict(model.named_modules()) if modules is None else modules
    parameter = next(model.parameters())
    found: dict[str, list[str]] = {}
    for linear, target in adapter.targets.items():
        size = features(modules[linear]) if linear in modules else None
        if linear not in modules:
            found.setdefault("the base has no module", []).append(linear)
        elif size is None:
            kind = type(modules[linear]).__name__
            found.setdefault(f"only linears can have experts, not {kind}", []).append(linear)
        elif (target.a_shape[1], target.b_shape[0]) != size:
            came = f"{linear} (A {list(target.a_shape)}, B {list(target.b_shape)}"
            wanted = f"expected [{target.r}, {size[0]}] and [{size[1]}, {target.r}])"
            found.setdefault("wrong shapes", []).append(f"{came}; {wanted}")
        for dtype in {target.a_dtype, target.b_dtype} - set(STORABLE):
            if dtype != "F64" or parameter.dtype != torch.float64:
                found.setdefault(f"{dtype} cannot be held exactly; save it in F32", []).append(
                    linear
                )
    problems = [f"{what}: {_some(where)}" for what, where in found.items()]
    if "the base has no module" in found:
        problems[list(found).index("the base has no module")] += _nearest(found, modules)
    return problems + _values(adapter, model)


def _values(adapter: Adapter, model: nn.Module) -> list[str]:
    """What only the tensors themselves tell: values that are no numbers, base tensors that were
    trained.
    """
    # With duplicates: a tied head has two names.
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    bad = [
        n for n in adapter.targets if not all(bool(t.isfinite().all()) for t in adapter.factors(n))
    ]
    changed = []
    for name in adapter.saved:
        here = own.get(name)
        # Beside an adapted head PEFT saves a copy of the base's; without weights here there is
        # nothing to compare.
        if here is not None and here.device.type == "meta" and name not in _trained(adapter):
            continue
        if (
            here is None
            or here.device.type == "meta"
            or not _same(adapter.saved_tensor(name), here)
        ):
            changed.append(name)
    found = [f"contains NaN or Inf: {_some(bad)}"] if bad else []
    if changed:
        found.append(
            f"it comes with trained weights of the base itself (modules_to_save): {_some(changed)}; all tokens share "
            "those, whichever experts they choose: train it without, or put them into the base and save it first"
        )
    return found


def _trained(adapter: Adapter) -> list[str]:
    """Which of the tensors beside A and B the adapter says it trained; PEFT compares the ends of
    modules' names.
    """
    ends = tuple(adapter.config.get("modules_to_save") or ())
    found = []
    for name in adapter.saved:
        parts = name.split(".")
        if any(".".join(parts[:i]).endswith(ends) for i in range(1, len(parts))):
            found.append(name)
    return found


def _same(saved: torch.Tensor, here: torch.Tensor) -> bool:
    return saved.shape == here.shape and torch.equal(
        saved.to(here.device, here.dtype), here.detach()
    )


def _entry(name: Any, source: Any) -> Entry:
    problem = name_problem(name)
    problems = [] if problem is None else [problem]
    try:
        return Entry(str(name), read_adapter(source), problems)
    except (ValueError, TypeError, OSError) as error:
        return Entry(str(name), None, [*problems, str(error).rstrip(".")])


def name_problem(name: Any) -> str | None:
    """Why an expert cannot have this name, which also names the folder that it is exported to; None
    if it can.
    """
    if not isinstance(name, str):
        return f"the name {name!r} is a {type(name).__name__}; expected a string"
    reason = None
    if not name.strip() or len(name) > MAX_NAME:
        reason = f"has {len(name)} letters; expected 1 to {MAX_NAME}"
    elif name != name.strip() or name[0] == "." or name[-1] == ".":
        reason = "begins or ends with a dot or a space"
    elif any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        reason = "holds a separator or a character that no folder may have"
    elif name.partition(".")[0].lower() in RESERVED:
        reason = "is reserved by an operating system"
    return None if reason is None else f"the name {name!r} {reason}: it must be fit for a folder"


def _check_names(entries: list[Entry]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        # Also names that differ in case alone: some file systems hold both in one folder.
        other = seen.setdefault(entry.name.casefold(), entry.name)
        if any(e is not entry and e.name.casefold() == entry.name.casefold() for e in entries):
            entry.problems.append(f"the name is given twice ({other}, {entry.name}): rename one")


def _other_base(adapter: Adapter, name: str) -> list[str]:
    """A base by another name, unless one of the names is unknown."""
    if not name or not adapter.base or name == adapter.base or _last(name) == _last(adapter.base):
        return []
    return [
        f"it was trained on {adapter.base}, not on {name}: pass the right base, or allow_base_mismatch=True"
    ]


def _last(name: str) -> str:
    """The name without its owner or folders; of a folder in the hub's cache, the repository's."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else "").lower()


def _nearest(found: Mapping[str, list[str]], modules: Mapping[str, nn.Module]) -> str:
    near = difflib.get_close_matches(found["the base has no module"][0], modules, n=2, cutoff=0.3)
    return f" (nearest: {', '.join(near)})" if near else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _skeleton(base: Any, auto_class: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, str]:
    """The base, or its modules without weights, and its name."""
    if isinstance(base, PreTrainedModel):
        if has_peft_layers(base):
            raise ValueError(
                f"This {type(base).__name__} has PEFT adapters inside, which changes its modules: unload them first."
            )
        return base, base.config._name_or_path or ""
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
