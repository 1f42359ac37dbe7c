"""What vLLM reads of a checkpoint before a model is there: configuration and tokenizer, both by way
of the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from .. import config
from ..checkpoint.load import CHANGEABLE
from ..modeling import MoeLoraForCausalLM

# What vLLM finds the model by.
ARCHITECTURE = "MoeLoraForCausalLM"
BASE = "_config_of_base"


class MoeLoraConfig(config.MoeLoraConfig):
    """A mixture's configuration as vLLM reads it: what is not the mixture's own is its base's.

    It has its parent's name, by which transformers' Auto classes tell what belongs together.
    """

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.sites is not None:
            self.architectures = [ARCHITECTURE]

    def where_base(self) -> tuple[str, dict[str, Any]]:
        """The folder or id of the base, and the keywords `revision` and `subfolder`.

        Raises:
            ValueError: the checkpoint names none.
        """
        folder = self._name_or_path
        if self.base_folder is not None:
            if Path(folder).is_dir():
                return str(Path(folder, self.base_folder)), {}
            return folder, {"subfolder": self.base_folder}
        if not self.base_model_name_or_path:
            raise ValueError(
                f"{folder} names no base: it was saved from a model that was made in memory. Save "
                "it again with save_pretrained(…, save_base=True)."
            )
        keywords = {"revision": self.base_revision, "subfolder": self.base_subfolder}
        return self.base_model_name_or_path, {k: v for k, v in keywords.items() if v}

    def base(self) -> PreTrainedConfig:
        """The base's own configuration, read once."""
        if BASE not in self.__dict__:
            where, keywords = self.where_base()
            self.__dict__[BASE] = AutoConfig.from_pretrained(where, **keywords)
            self.dtype = self.__dict__[BASE].dtype
        return self.__dict__[BASE]

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's text configuration: vLLM asks it for layers, heads and sizes.

        Args:
            args, kwargs: as transformers' takes them.
        """
        if self.sites is None:
            return super().get_text_config(*args, **kwargs)
        return self.base().get_text_config(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only what a configuration of this kind does not have; private names are nobody's else.
        base = None if name.startswith("_") else self.__dict__.get(BASE)
        if base is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}.")
        return getattr(base, name)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Change fields, as `hf_overrides` does: what is not a mixture's field is the base's.

        Args:
            config_dict: the new values by name.

        Raises:
            ValueError: a field of the mixture that cannot change after training.
        """
        own = {name: value for name, value in config_dict.items() if name in self.field_names()}
        if fixed := sorted(set(own) - set(CHANGEABLE)):
            raise ValueError(
                f"hf_overrides changes {', '.join(fixed)}, and {self._name_or_path} was trained "
                f"with what it says. Of the mixture's fields these can change: "
                f"{', '.join(CHANGEABLE)}."
            )
        others = {name: value for name, value in config_dict.items() if name not in own}
        architectures = others.pop("architectures", None)
        super().update(own)
        if architectures is not None:
            self.architectures = architectures
        if others:
            self.base().update(others)
        if own:
            self.validate()

    def to_dict(self) -> dict[str, Any]:
        """As transformers'; the base's own configuration is a field of it already."""
        fields = super().to_dict()
        fields.pop(BASE, None)
        return fields


class TokenizerOfBase:
    """The tokenizer of a checkpoint that holds none: its base's."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        """Load it.

        Args:
            name: the checkpoint's folder.
            args, kwargs: as `AutoTokenizer.from_pretrained` takes them.
        """
        if (Path(name) / "tokenizer_config.json").is_file():
            # It is here: let nobody come back to this class.
            kwargs.pop("config", None)
            base = AutoConfig.from_pretrained(name).base()
            return AutoTokenizer.from_pretrained(name, *args, config=base, **kwargs)
        kwargs.pop("config", None)
        where, keywords = AutoConfig.from_pretrained(name).where_base()
        return AutoTokenizer.from_pretrained(where, *args, **{**kwargs, **keywords})


# The class that transformers' own Auto classes load a checkpoint with.
assert MoeLoraForCausalLM.config_class.__name__ == MoeLoraConfig.__name__
