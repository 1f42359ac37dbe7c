"""Reading PEFT LoRA adapters: a folder, a hub repository or a live `PeftModel`, described before it
is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .folders import CONFIG, WEIGHTS, find_folder, inside, read_json
from .supported import unnamed, unsupported

# Of tensors that are no expert's A or B: what the key holds, and why that is refused.
FOREIGN = (
    (
        ".lora_embedding_",
        "it adapts an embedding, whose rows are looked up before any router has run",
    ),
    (".lora_magnitude_vector", "DoRA's magnitudes are not a delta that can be weighted and added"),
    (".lora_B.bias", "its B has a bias, which an expert has not"),
    (
        ".trainable_tokens_",
        "it trained token embeddings, which are looked up before any router has run",
    ),
)


@dataclass(frozen=True)
class Target:
    """One adapted linear: A `[r, d_in]` and B `[d_out, r]` add s·B·A; dtypes by safetensors' names."""

    r: int
    scaling: float
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    a_dtype: str
    b_dtype: str


@dataclass
class Adapter:
    """A PEFT LoRA, described; its tensors are read when they are asked for, linear by linear.

    where: what to call it in messages. config: its adapter_config.json. base, revision: what it was
    trained on.
    targets: its linears by their names in the base. saved: tensors of the base itself that lie
    beside (trained heads, copies of embeddings), by their names in the base, with their shapes.
    nbytes: the size of A and B.
    problems: why it cannot become an expert of any base; empty where nothing speaks against it.
    """

    where: str
    config: dict[str, Any]
    targets: dict[str, Target] = field(default_factory=dict)
    saved: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    _keys: dict[str, str] = field(default_factory=dict, repr=False)
    _read: Callable[[list[str]], list[Tensor]] | None = field(default=None, repr=False)

    @property
    def base(self) -> str | None:
        """The id or folder of the base that it was trained on, where it says so."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def revision(self) -> str | None:
        """The revision of that base, where it says so."""
        return self.config.get("revision") or None

    def factors(self, linear: str) -> tuple[Tensor, Tensor]:
        """A `[r, d_in]` and B `[d_out, r]` of the base's linear of this name, as they are stored.

        Raises:
            ValueError: the adapter has problems, or does not adapt this linear.
        """
        if self.problems:
            raise ValueError(f"{self.where} cannot be read: {'; '.join(self.problems)}.")
        if linear not in self.targets:
            raise ValueError(
                f"{self.where} does not adapt {linear!r}; it adapts {', '.join(self.targets)}."
            )
        A, B = self._tensors([self._keys[f"{linear}.lora_A"], self._keys[f"{linear}.lora_B"]])
        return A, B

    def saved_tensor(self, name: str) -> Tensor:
        """A tensor of the base itself that lies beside A and B; `name` is one of `saved`."""
        return self._tensors([self._keys[name]])[0]

    def _tensors(self, keys: list[str]) -> list[Tensor]:
        assert self._read is not None
        return self._read(keys)


def read_adapter(source: Any) -> Adapter:
    """Describe an adapter; only the header of its weights is read.

    source: a folder or hub repository as PEFT's `save_pretrained` writes it (`id@revision` for a
    revision), a `PeftModel` with one adapter, a pair (`PeftModel`, adapter name), or an `Adapter`,
    which comes back as it is.

    Raises:
        TypeError: a source of another kind.
        ValueError: nothing there that can be read: no folder, missing or damaged files, links out
        of the folder,
            pickled weights. What can be read and not used is in the answer's `problems`.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, PathLike)):
        return _read_folder(*find_folder(source))
    pair = isinstance(source, tuple) and len(source) == 2
    model, name = source if pair else (source, None)  # type: ignore[misc]
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"An adapter came as a {type(source).__name__}; expected a folder, a hub id, a PeftModel or a pair "
            "(PeftModel, adapter name)."
        )
    names = list(model.peft_config)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ValueError(
            f"The PeftModel has no adapter {name!r}: pass (model, name) with one of: {', '.join(names)}."
        )
    return _read_model(model, name)


def _read_folder(folder: Path, root: Path) -> Adapter:
    """Describe the adapter in `folder`; no file may lie outside of `root`."""
    if not (folder / CONFIG).exists() and not (folder / CONFIG).is_symlink():
        raise ValueError(f"{folder} holds no {CONFIG}: it is no PEFT adapter, or not a whole one.")
    config = read_json(inside(folder / CONFIG, root))
    adapter = Adapter(str(folder), config, problems=unsupported(config))
    path = folder / WEIGHTS
    if not path.exists() and not path.is_symlink():
        if adapter.problems:
            return adapter
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        why = f"holds no {WEIGHTS}"
        if pickles:
            why += (
                f", but {', '.join(pickles)}: pickles can run code when they are read and are refused. Where "
                "you trust it, load it with PEFT and save it with safe_serialization=True"
            )
        raise ValueError(f"{folder} {why}.")
    path = inside(path, root)

    try:
        # Opening checks the header against the file's size; nothing is allocated for the tensors.
        file = safe_open(path, framework="pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - a file is no dict
        header = {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, cut short or no safetensors file ({error}): copy or save it again."
        ) from error
    # Kept open: to open it anew for every linear would parse the header each time.
    adapter._read = lambda keys: [file.get_tensor(key) for key in keys]
    _describe(adapter, header, None)
    return adapter


def _read_model(model: PeftModel, name: str) -> Adapter:
    """Describe a live adapter; its tensors are the model's own."""
    config = model.peft_config[name].to_dict()
    config["peft_type"] = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    adapter = Adapter(
        f"{type(model).__name__} adapter {name!r}", config, problems=unsupported(config)
    )
    if adapter.problems:
        return adapter
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float64: "F64",
    }
    header = {k: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for k, t in tensors.items()}
    layers = dict(model.get_base_model().named_modules())
    adapter._read = lambda keys: [tensors[key].detach() for key in keys]
    # A live layer's own scaling is what its forward multiplies with, whatever the configuration
    # says.
    _describe(adapter, header, lambda linear: layers[linear].scaling[name])  # type: ignore[index,union-attr]
    return adapter


def _describe(
    adapter: Adapter,
    header: Mapping[str, tuple[tuple[int, ...], str]],
    scaling_of: Callable[[str], float] | None,
) -> None:
    """Fill in the targets and what lies beside them, from each tensor's shape and dtype; note what
    is wrong.
    """
    if any(key.startswith("base_model.lora_model.") for key in header):
        # Keys that contain another adapter's name are dropped, and X-LoRA's adapters are called as
        # layers are: 0, 1 …
        adapter.problems.append(
            "PEFT saved it out of an X-LoRA model, without the layers whose number is another adapter's name: "
            "use the folder that the X-LoRA model was made from"
        )
        return
    pairs = _sorted_keys(adapter, header)
    for linear, keys in pairs.items():
        missing = sorted({"lora_A", "lora_B"} - set(keys))
        if missing:
            adapter.problems.append(f"{linear}.{missing[0]} is missing")
            continue
        (a, a_dtype), (b, b_dtype) = header[keys["lora_A"]], header[keys["lora_B"]]
        wrong = _wrong_pair(linear, a, b)
        rank, scaling = (0, 0.0) if wrong else _expected(adapter, linear)
        if not wrong and rank != a[0]:
            wrong = f"{linear} has rank {a[0]} in the file and {rank} by its {CONFIG}"
        if wrong:
            adapter.problems.append(wrong)
            continue
        own = scaling if scaling_of is None else float(scaling_of(linear))
        if not math.isfinite(own):
            adapter.problems.append(f"{linear} has scaling {own}")
        adapter.targets[linear] = Target(a[0], own, a, b, a_dtype, b_dtype)
        adapter.nbytes += sum(math.prod(s) * _bytes(d) for s, d in ((a, a_dtype), (b, b_dtype)))
    try:
        left_out = unnamed(adapter.config, adapter.targets)
    except Exception as error:
        # Whatever a broken configuration holds.
        adapter.problems.append(f"PEFT cannot read its target modules ({error})")
    else:
        adapter.problems += [f"its target_modules leaves out {linear}" for linear in left_out[:4]]
    if not pairs and not adapter.problems:
        adapter.problems.append("it has no lora_A and lora_B tensors: there is nothing in it")


def _sorted_keys(
    adapter: Adapter, header: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, dict[str, str]]:
    """The keys of each linear's lora_A and lora_B; what else there is goes to `saved` or
    `problems`.
    """
    pairs: dict[str, dict[str, str]] = {}
    for key in header:
        name = key.removeprefix("base_model.model.")
        reason = next((why for part, why in FOREIGN if part in key), None)
        linear, part = _part_of(name)
        if reason is not None:
            adapter.problems.append(f"{name}: {reason}")
        elif part is not None:
            pairs.setdefault(linear, {})[part] = key
            adapter._keys[f"{linear}.{part}"] = key
        else:
            adapter.saved[name.replace(".base_layer.", ".")] = header[key][0]
            adapter._keys[name.replace(".base_layer.", ".")] = key
    return pairs


def _part_of(name: str) -> tuple[str, str | None]:
    """The linear and "lora_A" or "lora_B" of a tensor's name, or (name, None)."""
    for part in ("lora_A", "lora_B"):
        linear, found, rest = name.rpartition(f".{part}.")
        if found and rest == "weight":
            return linear, part
    return name, None


def _wrong_pair(linear: str, a: tuple[int, ...], b: tuple[int, ...]) -> str | None:
    if len(a) != 2 or len(b) != 2:
        return f"{linear} has an A of shape {list(a)} and a B of shape {list(b)}: only linears can have experts"
    if a[0] != b[1] or not a[0]:
        return f"{linear} has an A of shape {list(a)} and a B of shape {list(b)}, which do not fit together"
    return None


def _expected(adapter: Adapter, linear: str) -> tuple[int, float]:
    """Rank and scaling of a linear by the configuration, matched as PEFT matches its patterns; (0,
    0) if broken.
    """
    config = adapter.config
    try:
        values = []
        for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = config.get(name) or {}
            values.append(
                patterns.get(get_pattern_key(list(patterns), linear), config.get(default, 8))
            )
        rank, alpha = values
        return int(rank), float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    except Exception as error:
        # Whatever a broken configuration holds: wrong types, zero, a pattern that is no regular
        # expression.
        note = f"its r, lora_alpha and their patterns give no rank and scaling ({error})"
        if note not in adapter.problems:
            adapter.problems.append(note)
        return 0, 0.0


def _bytes(dtype: str) -> int:
    return max(1, int("".join(c for c in dtype.partition("_")[0] if c.isdigit()) or 8) // 8)
