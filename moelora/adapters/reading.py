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
from safetensors import safe_open
from torch import Tensor

from ..validation import check_integer
from .folders import CONFIG, WEIGHTS, find_folder, inside, read_json
from .patterns import Patterns
from .supported import refused_settings, untargeted

# Of tensors that are not an expert's A or B: what the key holds, and why that is refused.
FOREIGN = (
    (
        ".lora_embedding_",
        "it adapts an embedding, whose rows are looked up before any router has run",
    ),
    (".lora_magnitude_vector", "DoRA's magnitudes are not a delta that can be weighted and added"),
    (".lora_B.bias", "its B has a bias, which an expert does not have"),
    (
        ".trainable_tokens_",
        "it trained token embeddings, which are looked up before any router has run",
    ),
)
# No module of a model has a longer name, and messages show them.
MAX_KEY = 1024
# The shape and dtype (by safetensors' names) of each tensor, by its key.
Header = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Target:
    """One adapted linear: A `[r, d_in]` and B `[d_out, r]` add s·B·A.

    Attributes:
        r: the rank.
        scaling: s.
        a_shape: the shape of A.
        b_shape: the shape of B.
        a_dtype: the dtype of A, by safetensors' name for it.
        b_dtype: the dtype of B, by safetensors' name for it.
    """

    r: int
    scaling: float
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    a_dtype: str
    b_dtype: str


@dataclass
class Adapter:
    """A PEFT LoRA, described; its tensors are read when they are asked for, linear by linear.

    Attributes:
        where: what to call it in messages.
        config: its adapter_config.json.
        targets: its linears by their names in the base.
        saved: tensors of the base itself that lie beside A and B (trained heads, copies of
            embeddings), by their names in the base, with their shapes.
        nbytes: the size of A and B in bytes.
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
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

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
        try:
            return self._read(keys)
        except OSError:
            raise
        except Exception as error:
            # safetensors has no one error for bytes that it cannot make a tensor of.
            raise ValueError(
                f"{self.where}: {', '.join(keys)} cannot be read ({error}): save the adapter again."
            ) from error


def read_adapter(source: Any) -> Adapter:
    """Describe an adapter; only the header of its weights is read.

    Args:
        source: a folder or hub repository as PEFT's `save_pretrained` writes it (`id@revision` for
            a revision), a `PeftModel` with one adapter, a pair (`PeftModel`, adapter name), or an
            `Adapter`, which comes back as it is.

    Raises:
        TypeError: a source of another kind.
        ValueError: nothing there that can be read: no folder, missing or damaged files, links out
            of the folder, pickled weights. What can be read and not used is in the answer's
            `problems`.
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
    names = list(model.peft_config)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ValueError(
            f"The PeftModel has no adapter {name!r}: pass (model, name) with one of: "
            f"{', '.join(names)}."
        )
    return _read_model(model, name)


def _read_folder(folder: Path, root: Path) -> Adapter:
    """Describe the adapter in `folder`; no file may lie outside of `root`."""
    if not (folder / CONFIG).exists() and not (folder / CONFIG).is_symlink():
        raise ValueError(
            f"{folder} holds no {CONFIG}: it is not a PEFT adapter, or not a whole one."
        )
    config = read_json(inside(folder / CONFIG, root))
    adapter = Adapter(str(folder), config, problems=refused_settings(config))
    path = folder / WEIGHTS
    if path.exists() or path.is_symlink():
        header = _open(adapter, inside(path, root))
        _describe(adapter, header, None)
    elif not adapter.problems:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        why = f"holds no {WEIGHTS}"
        if pickles:
            why += (
                f", but {', '.join(pickles)}: pickles can run code when they are read and are "
                "refused. Where you trust it, load it with PEFT and save it with "
                "safe_serialization=True"
            )
        raise ValueError(f"{folder} {why}.")
    return adapter


def _open(adapter: Adapter, path: Path) -> Header:
    """The header of a weights' file, which `adapter` then reads its tensors from."""
    try:
        # Opening checks the header against the file's size; nothing is allocated for the tensors.
        file = safe_open(path, framework="pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - a file is not a dict
        header = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        if any(len(key) > MAX_KEY for key in header):
            raise ValueError(f"the name of a tensor has more than {MAX_KEY} letters")
    except OSError:
        raise
    except Exception as error:
        # A SafetensorError, or for some damaged headers whatever their reader stumbles on.
        raise ValueError(
            f"{path} is damaged, cut short or not a safetensors file ({error}): copy or save it "
            "again."
        ) from error
    # Kept open: to open it anew for every linear would parse the header each time.
    adapter._read = lambda keys: [file.get_tensor(key) for key in keys]
    return header


def _read_model(model: PeftModel, name: str) -> Adapter:
    """Describe a live adapter; its tensors are the model's own."""
    config = model.peft_config[name].to_dict()
    config["peft_type"] = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    adapter = Adapter(
        f"{type(model).__name__} adapter {name!r}", config, problems=refused_settings(config)
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


def _describe(adapter: Adapter, header: Header, scaling_of: Callable[[str], float] | None) -> None:
    """Fill in the targets and what lies beside them, and note what is wrong.

    Args:
        adapter: the adapter to describe.
        header: the shape and dtype of each of its tensors.
        scaling_of: a live layer's own scaling; None takes the configuration's.
    """
    if any(key.startswith("base_model.lora_model.") for key in header):
        # Keys that contain another adapter's name are dropped, and X-LoRA's adapters are called as
        # layers are: 0, 1 …
        adapter.problems.append(
            "PEFT saved it out of an X-LoRA model, without the layers whose number is another "
            "adapter's name: use the folder that the X-LoRA model was made from"
        )
        return
    pairs = _sorted_keys(adapter, header)
    patterns = Patterns(len(pairs))
    for linear, keys in pairs.items():
        missing = sorted({"lora_A", "lora_B"} - set(keys))
        if missing:
            adapter.problems.append(f"{linear}.{missing[0]} is missing")
            continue
        a, a_dtype = header[keys["lora_A"]]
        b, b_dtype = header[keys["lora_B"]]
        wrong = _wrong_pair(linear, a, b)
        rank, scaling = (0, 0.0) if wrong else _expected(adapter, linear, patterns)
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
    if not pairs and not adapter.problems:
        adapter.problems.append("it has no lora_A and lora_B tensors: there is nothing in it")
    try:
        left_out = untargeted(adapter.config, adapter.targets, patterns)
    except Exception as error:
        # Whatever a broken configuration holds.
        adapter.problems.append(f"PEFT cannot read its target modules ({error})")
    else:
        adapter.problems += [f"its target_modules leaves out {linear}" for linear in left_out[:4]]


def _sorted_keys(adapter: Adapter, header: Header) -> dict[str, dict[str, str]]:
    """The keys of each linear's lora_A and lora_B; the others go to `saved` or `problems`."""
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
        linear, separator, rest = name.rpartition(f".{part}.")
        if separator and rest == "weight":
            return linear, part
    return name, None


def _wrong_pair(linear: str, a: tuple[int, ...], b: tuple[int, ...]) -> str | None:
    shapes = f"{linear} has an A of shape {list(a)} and a B of shape {list(b)}"
    if len(a) != 2 or len(b) != 2:
        return f"{shapes}: only linears can have experts"
    if a[0] != b[1] or not a[0]:
        return f"{shapes}, which do not fit together"
    return None


def _expected(adapter: Adapter, linear: str, patterns: Patterns) -> tuple[int, float]:
    """A linear's rank and scaling by the configuration; (0, 0) where that is broken."""
    config = adapter.config

    def setting(name: str, by_pattern: str) -> Any:
        values = config.get(by_pattern) or {}
        return values.get(patterns.first(values, linear), config.get(name, 8))

    try:
        rank = setting("r", "rank_pattern")
        check_integer("r", rank, 1)
        norm = math.sqrt(rank) if config.get("use_rslora") else rank
        return rank, float(setting("lora_alpha", "alpha_pattern") / norm)
    except Exception as error:
        # Whatever a broken configuration holds: wrong types, zero, a pattern that is not a regular
        # expression.
        note = f"its r, lora_alpha and their patterns give no rank and scaling ({error})"
        if note not in adapter.problems:
            adapter.problems.append(note)
        return 0, 0.0


def _bytes(dtype: str) -> int:
    return max(1, int("".join(c for c in dtype.partition("_")[0] if c.isdigit()) or 8) // 8)
