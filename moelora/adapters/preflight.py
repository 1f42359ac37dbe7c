"""The preflight: everything that is wrong with a set of adapters for one base, in one table, before
anything loads.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ..core.model import MixtureModel
from ..injection.base import ACCESS, check_no_peft
from ..injection.modules import features
from ..validation import expert_name_problem, shown
from .folders import xlora_sources
from .reading import DTYPES, Adapter, read_adapter

Sources = Mapping[str, Any] | Iterable[tuple[str, Any]] | str | PathLike[str]
COLUMNS = ("adapter", "r", "targets", "size", "problems")
SHOWN = 4
ABSENT = "the base has no module"
TRAINED = (
    "all tokens share what it trained beside its linears, whichever experts they choose: train it "
    "without, or put that into the base and save it first; trained weights of the base itself "
    "(modules_to_save)"
)


@dataclass
class Preflight:
    """What `preflight` found: what messages call the base, and the pairs of expert name and
    adapter, whose `problems` are all that is wrong with it for this base.
    """

    base: str
    entries: list[tuple[str, Adapter]]

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, each with the adapter's name before it."""
        return [f"{name}: {problem}" for name, own in self.entries for problem in own.problems]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name."""
        return dict(self.entries)

    def rows(self) -> list[tuple[str, ...]]:
        """What the table says of each adapter: name, ranks, number of linears, size, problems."""
        rows = []
        for name, adapter in self.entries:
            ranks = sorted({target.r for target in adapter.targets.values()})
            span = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
            size = f"{adapter.nbytes / 1e6:.2f} MB"
            problems = "; ".join(adapter.problems) or "none"
            rows.append((name, span, str(len(adapter.targets)), size, problems))
        return rows

    def table(self) -> str:
        """The same as a Markdown table."""
        lines = [COLUMNS, ["---"] * len(COLUMNS)]
        for row in self.rows():
            lines.append([" ".join(cell.replace("|", "\\|").split()) for cell in row])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def raise_if_bad(self) -> None:
        """Raise ValueError with the whole table, unless all is well."""
        bad = sum(bool(adapter.problems) for _, adapter in self.entries)
        if bad:
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
    """Check a set of adapters against a base, of which without weights the configuration is enough;
    reads every tensor once, for NaN and Inf, and keeps none.

    The adapters are sources of `read_adapter` by expert name, pairs of name and source, or the
    folder of an X-LoRA checkpoint. `auto_class` would load the base (None: what its configuration
    says), found by the keywords: revision, subfolder …
    """
    model, name = _skeleton(base, auto_class, kwargs)
    modules = dict(model.named_modules())
    pairs = _pairs(adapters)
    # Also names that differ in case alone: some file systems hold both in one folder.
    folders = Counter(str(who).casefold() for who, _ in pairs)
    entries = []
    for who, source in pairs:
        try:
            adapter = read_adapter(source)
            adapter = replace(adapter, problems=_misfits(adapter, model, modules))
        except (ValueError, TypeError, OSError) as error:
            adapter = Adapter(shown(source), {}, [str(error).rstrip(".")])
        trained_on = str(adapter.config.get("base_model_name_or_path") or "")
        if len({_last(name), _last(trained_on)} - {""}) == 2 and not allow_base_mismatch:
            adapter.problems.append(
                f"it was trained on {trained_on}, not on {name}: pass the right base, or "
                "allow_base_mismatch=True"
            )
        if folders[str(who).casefold()] > 1:
            adapter.problems.append("the name is given twice, perhaps in another case: rename one")
        if problem := expert_name_problem(who):
            adapter.problems.append(problem)
        entries.append((str(who), adapter))
    return Preflight(name or type(model).__name__, entries)


def _pairs(adapters: Sources) -> list[tuple[Any, Any]]:
    """The pairs of expert name and source in any form that `preflight` takes."""
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


def _misfits(
    adapter: Adapter, model: PreTrainedModel, modules: Mapping[str, nn.Module]
) -> list[str]:
    if adapter.problems:
        more = len(adapter.problems) - 2 * SHOWN
        return adapter.problems[: 2 * SHOWN] + ([f"and {more} more like these"] if more > 0 else [])
    floats = set(DTYPES.values())
    double = next(model.parameters()).dtype == torch.float64
    storable = floats if double else floats - {"F64"}
    wrong: dict[str, list[str]] = defaultdict(list)
    for linear, target in adapter.targets.items():
        size = features(modules[linear]) if linear in modules else None
        if linear not in modules:
            wrong[ABSENT].append(linear)
        elif size is None:
            kind = type(modules[linear]).__name__
            wrong[f"only linears can have experts, not {kind}"].append(linear)
        elif (target.a_shape[1], target.b_shape[0]) != size:
            came = f"{linear} (A {list(target.a_shape)}, B {list(target.b_shape)}"
            wanted = f"expected [{target.r}, {size[0]}] and [{size[1]}, {target.r}])"
            wrong["wrong shapes"].append(f"{came}; {wanted}")
        for dtype in target.dtypes - storable:
            wrong[f"{dtype} cannot be held exactly; save it in F32"].append(linear)
        # Of other dtypes torch cannot tell, and they are refused anyway.
        numbers = adapter.factors(linear) if target.dtypes <= floats else ()
        if not all(bool(factor.isfinite().all()) for factor in numbers):
            wrong["contains NaN or Inf"].append(linear)
    # With duplicates: a tied head has two names.
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name in adapter.saved:
        if not _is_own(adapter, name, own.get(name)):
            wrong[TRAINED].append(name)
    problems = [f"{what}: {_some(where)}" for what, where in wrong.items()]
    if ABSENT in wrong:
        near = difflib.get_close_matches(wrong[ABSENT][0], modules, n=2, cutoff=0.3)
        problems[list(wrong).index(ABSENT)] += f" (nearest: {', '.join(near) or 'none'})"
    return problems


def _is_own(adapter: Adapter, name: str, here: Tensor | None) -> bool:
    """Whether a tensor beside A and B has the values of the base's, which is `here`."""
    if here is None:
        return False
    if here.device.type == "meta":
        # Beside an adapted head PEFT saves a copy of the base's; without weights here there is
        # nothing to compare it with but what PEFT trained: modules whose names end like these.
        ends = tuple(map(str, adapter.config.get("modules_to_save") or ()))
        parts = name.split(".")
        return not any(".".join(parts[:i]).endswith(ends) for i in range(1, len(parts)))
    saved = adapter.saved_tensor(name)
    return saved.shape == here.shape and torch.equal(saved.to(here.device, here.dtype), here)


def _last(name: str) -> str:
    """The name without its owner or folders; of a folder in the hub's cache, the repository's."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or [""])[-1].lower()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _skeleton(base: Any, auto_class: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, str]:
    """The base, or its modules without weights, and its name."""
    if isinstance(base, PreTrainedModel):
        check_no_peft(base)
        if isinstance(base, MixtureModel):
            return base, base.moelora_config.base_model_name_or_path or ""
        return base, base.config.name_or_path or ""
    if not isinstance(base, (str, PathLike)):
        raise TypeError(
            f"base is a {type(base).__name__}; expected a hub id, a folder or a PreTrainedModel."
        )
    passed = (*ACCESS, "revision", "subfolder", "trust_remote_code", "gguf_file")
    found_by = {k: kwargs[k] for k in passed if kwargs.get(k) is not None}
    config = AutoConfig.from_pretrained(base, **found_by)
    if auto_class is None:
        auto_class = AutoModelForCausalLM
        if any(n.endswith("ForSequenceClassification") for n in config.architectures or []):
            auto_class = AutoModelForSequenceClassification
    trust = {k: v for k, v in found_by.items() if k == "trust_remote_code"}
    with torch.device("meta"):
        return auto_class.from_config(config, **trust), str(base)
