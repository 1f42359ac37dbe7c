"""Reading PEFT LoRA adapters: a folder, a hub repository or a live `PeftModel`, described before it
is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from ..validation import check_integer, check_number
from .folders import CONFIG, WEIGHTS, find_folder, inside, read_config
from .patterns import Patterns
from .supported import REASONS, refused_settings, untargeted

# Of tensors that are not an expert's A or B: what the key holds, and why that is refused.
FOREIGN = {
    ".lora_embedding_": "it adapts an embedding, whose rows are looked up before any router has "
    "run",
    ".lora_magnitude_vector": REASONS["use_dora"],
    ".lora_B.bias": REASONS["lora_bias"],
    ".trainable_tokens_": REASONS["trainable_token_indices"],
    # Of these, keys that contain another adapter's name are dropped, and X-LoRA's adapters are
    # called as layers are: 0, 1 …
    "base_model.lora_model.": "PEFT saved it out of an X-LoRA model, without the layers whose "
    "number is another adapter's name: use the folder that the X-LoRA model was made from",
}
A_OR_B = re.compile(r"(.*)\.(lora_[AB])\.weight", re.DOTALL)
# No module of a model has a longer name, and messages show them.
MAX_KEY = 1024
# Dtypes by safetensors' names for them.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
ITEM_SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
# The shape and dtype (by safetensors' name) of each tensor, by its key.
Header = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Target:
    """One adapted linear: A `[r, d_in]` and B `[d_out, r]` add scaling·B·A."""

    r: int
    scaling: float
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtypes: frozenset[str]
    nbytes: int


def source_name(source: object) -> str:
    """A repository's id, a folder's name without its path, or what else an adapter is."""
    if not isinstance(source, (str, PathLike)):
        return f"a {type(source).__name__}"
    parts = str(source).replace("\\", "/").rstrip("/").split("/")
    cached = [part for part in parts if part.startswith("models--")]
    if cached:
        # In the hub's cache.
        return "/".join(cached[0].split("--")[1:])
    return str(source) if len(parts) <= 2 and not Path(source).exists() else parts[-1]


@dataclass
class Adapter:
    """A PEFT LoRA, described; its tensors are read when they are asked for, linear by linear.

    Attributes:
        where: what to call it in messages.
        config: its adapter_config.json.
        problems: why it cannot become an expert of any base; empty where nothing speaks against it.
        targets: its linears by their names in the base.
        saved: tensors of the base itself that lie beside A and B (trained heads, copies of
            embeddings), by their names in the base, with their shapes.
    """

    where: str
    config: dict[str, Any]
    problems: list[str]
    targets: dict[str, Target] = field(default_factory=dict)
    saved: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict, repr=False)
    _read: Callable[[list[str]], list[Tensor]] = field(default=lambda keys: [], repr=False)

    @property
    def source(self) -> str:
        """What to call it where no path of this machine may stand."""
        return source_name(self.where)

    @property
    def nbytes(self) -> int:
        """The size of A and B in bytes."""
        return sum(target.nbytes for target in self.targets.values())

    def factors(self, linear: str) -> tuple[Tensor, Tensor]:
        """A `[r, d_in]` and B `[d_out, r]` of one of its linears, as they are stored; ValueError
        where it has problems.
        """
        if self.problems:
            raise ValueError(f"{self.where} cannot be read: {'; '.join(self.problems)}.")
        A, B = self._tensors(f"{linear}.lora_A", f"{linear}.lora_B")
        return A, B

    def saved_tensor(self, name: str) -> Tensor:
        """A tensor of the base itself that lies beside A and B; `name` is one of `saved`."""
        return self._tensors(name)[0]

    def _tensors(self, *names: str) -> list[Tensor]:
        with _reading(self.where):
            return self._read([self._keys[name] for name in names])


@contextmanager
def _reading(where: str | Path) -> Iterator[None]:
    """Make what safetensors says of bytes that it cannot read, with many kinds of errors, one."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{where} is damaged, cut short or not a safetensors file ({error}): copy it again."
        ) from error


def read_adapter(source: Any) -> Adapter:
    """Describe an adapter; only the header of its weights is read.

    The source is a folder or hub repository as PEFT's `save_pretrained` writes it (`id@revision`
    for a revision), a `PeftModel` with one adapter, a pair (`PeftModel`, adapter name), or an
    `Adapter`, which comes back as it is. What can be read and not used is in the answer's
    `problems`; where nothing can be read it is a ValueError or TypeError.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, PathLike)):
        return _read_folder(*find_folder(source))
    pair = isinstance(source, tuple) and len(source) == 2
    model, name = source if pair else (source, None)  # type: ignore[misc]
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"An adapter came as a {type(source).__name__}; expected a folder, a hub id, a "
            "PeftModel or a pair (PeftModel, adapter name)."
        )
    if name is None and len(model.peft_config) == 1:
        (name,) = model.peft_config
    if name not in model.peft_config:
        raise ValueError(
            f"The PeftModel has no adapter {name!r}: pass (model, name) with one of: "
            f"{', '.join(model.peft_config)}."
        )
    return _read_model(model, name)


def _read_folder(folder: Path, root: Path) -> Adapter:
    config = read_config(folder, root)
    adapter = Adapter(str(folder), config, refused_settings(config))
    if os.path.lexists(folder / WEIGHTS):
        path = inside(folder / WEIGHTS, root)
        with _reading(path):
            # Opening checks the header against the file's size; no tensor is allocated.
            file = safe_open(path, framework="pt")
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - a file is not a dict
            header = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
            if any(len(key) > MAX_KEY for key in header):
                raise ValueError(f"the name of a tensor has more than {MAX_KEY} letters")
        # Kept open: to open it anew for every linear would parse the header each time.
        adapter._read = lambda keys: [file.get_tensor(key) for key in keys]
        _describe(adapter, header)
    elif not adapter.problems:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise ValueError(
            f"{folder} holds no {WEIGHTS}, but {', '.join(pickles) or 'no other weights'}: pickles "
            "can run code when they are read and are refused. Where you trust them, load them with "
            "PEFT and save them with safe_serialization=True."
        )
    return adapter


def _read_model(model: PeftModel, name: str) -> Adapter:
    config = model.peft_config[name].to_dict()
    adapter = Adapter(f"{type(model).__name__} adapter {name!r}", config, refused_settings(config))
    if adapter.problems:
        return adapter
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    header = {k: (tuple(t.shape), DTYPES.get(t.dtype, str(t.dtype))) for k, t in tensors.items()}
    adapter._read = lambda keys: [tensors[key].detach() for key in keys]
    _describe(adapter, header)
    for linear, target in adapter.targets.items():
        # What the layer's forward multiplies with, whatever the configuration says.
        layer: Any = model.get_base_model().get_submodule(linear)
        adapter.targets[linear] = replace(target, scaling=float(layer.scaling[name]))
    return adapter


def _describe(adapter: Adapter, header: Header) -> None:
    """Fill in the targets and what lies beside them, and note what is wrong."""
    problems = adapter.problems
    linears: dict[str, None] = {}
    for key, (shape, _) in header.items():
        name = key.removeprefix("base_model.model.")
        foreign = [why for part, why in FOREIGN.items() if part in key]
        if foreign:
            problems.append(f"{name}: {foreign[0]}")
        elif factor := A_OR_B.fullmatch(name):
            linears[factor[1]] = None
            adapter._keys[f"{factor[1]}.{factor[2]}"] = key
        else:
            name = name.replace(".base_layer.", ".")
            adapter.saved[name] = shape
            adapter._keys[name] = key
    patterns = Patterns(len(linears))
    for linear in linears:
        try:
            adapter.targets[linear] = _target(adapter, linear, header, patterns)
        except ValueError as problem:
            if str(problem) not in problems:
                problems.append(str(problem))
    if not linears and not problems:
        problems.append("it has no lora_A and lora_B tensors: there is nothing in it")
    try:
        left_out = untargeted(adapter.config, adapter.targets, patterns)
        problems += [f"its target_modules leaves out {linear}" for linear in left_out[:4]]
    except Exception as error:
        # Whatever a broken configuration holds.
        problems.append(f"PEFT cannot read its target modules ({error})")


def _target(adapter: Adapter, linear: str, header: Header, patterns: Patterns) -> Target:
    """The description of one linear; ValueError says what is wrong with it."""
    names = [f"{linear}.lora_A", f"{linear}.lora_B"]
    if missing := [name for name in names if name not in adapter._keys]:
        raise ValueError(f"{missing[0]} is missing")
    (a, a_dtype), (b, b_dtype) = (header[adapter._keys[name]] for name in names)
    shapes = f"{linear} has an A of shape {list(a)} and a B of shape {list(b)}"
    if len(a) != 2 or len(b) != 2:
        raise ValueError(f"{shapes}: only linears can have experts")
    if a[0] != b[1] or not a[0]:
        raise ValueError(f"{shapes}, which do not fit together")
    config = adapter.config
    try:
        rank, alpha = (
            values.get(patterns.first(values, linear), config.get(name, 8))
            for name, values in (
                ("r", config.get("rank_pattern") or {}),
                ("lora_alpha", config.get("alpha_pattern") or {}),
            )
        )
        check_integer("r", rank, 1)
        scaling = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        check_number("scaling", scaling, -math.inf, math.inf)
    except Exception as error:
        # Wrong types, zero, a pattern that is not a regular expression …
        raise ValueError(
            f"its r, lora_alpha and their patterns give no rank and scaling ({error})"
        ) from error
    if rank != a[0]:
        raise ValueError(f"{linear} has rank {a[0]} in the file and {rank} by its {CONFIG}")
    nbytes = math.prod(a) * ITEM_SIZES.get(a_dtype, 1) + math.prod(b) * ITEM_SIZES.get(b_dtype, 1)
    return Target(rank, scaling, a, b, frozenset((a_dtype, b_dtype)), nbytes)
