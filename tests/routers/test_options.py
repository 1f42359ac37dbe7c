"""A router's own settings: declared by its class, checked, saved and loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import torch
from bases import causal_base
from core.mixtures import causal, tokens

from moelora import ROUTERS, MoeLoraConfig, MoeLoraForCausalLM, Router, register_router
from moelora.routers import MlpRouter, TopKRouter, changed_options


class WideRouter(TopKRouter):
    """Scores over a temperature, with settings of every type."""

    @dataclass(frozen=True)
    class Options:
        width: int = 8
        temperature: float = 1.0
        kind: Literal["plain", "odd"] = "plain"
        sign: bool = False
        names: list[str] = field(default_factory=list)
        limit: float | None = None

        def __post_init__(self):
            if self.temperature <= 0:
                raise ValueError(
                    f"router_options['temperature']={self.temperature} is not positive."
                )

    options: Options
    changeable_options: ClassVar[frozenset[str]] = frozenset({"temperature"})

    def score(self, x):
        return super().score(x) / self.options.temperature


@pytest.fixture
def wide():
    register_router("test_wide")(WideRouter)
    yield {"router": "test_wide"}
    del ROUTERS["test_wide"]


def test_defaults_are_filled_in_and_values_reach_the_router(wide):
    config = MoeLoraConfig(**wide, router_options={"temperature": 2, "names": ["a"]})
    assert config.router_options == {
        "width": 8,
        "temperature": 2.0,
        "kind": "plain",
        "sign": False,
        "names": ["a"],
        "limit": None,
    }
    assert isinstance(config.router_options["temperature"], float)
    router = ROUTERS["test_wide"](config, 4)
    assert (router.options.temperature, router.options.names) == (2.0, ["a"])
    assert MoeLoraConfig().router_options == MoeLoraConfig(router_options={}).router_options == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widht": 3}, ValueError, "WideRouter has no option.*widht.*width, temperature, kind"),
        ({3: 3}, ValueError, "no option"),
        ([("width", 3)], TypeError, "expected a dict"),
        ("width", TypeError, "expected a dict"),
        ({"width": "3"}, TypeError, r"router_options\['width'\]='3' is a str; expected int"),
        ({"width": True}, TypeError, "is a bool; expected int"),
        ({"width": 2.5}, TypeError, "is a float; expected int"),
        ({"width": None}, TypeError, "is a NoneType; expected int"),
        ({"width": 10**5000}, ValueError, "cannot be saved as JSON"),
        ({"temperature": "hot"}, TypeError, "expected float"),
        ({"temperature": 10**400}, TypeError, "expected float"),
        ({"temperature": -1.0}, ValueError, "is not positive"),
        ({"temperature": math.nan}, ValueError, "cannot be saved as JSON"),
        ({"limit": math.inf}, ValueError, "cannot be saved as JSON"),
        ({"limit": "x"}, TypeError, r"expected float \| None"),
        ({"kind": "even"}, TypeError, "expected.*plain.*odd"),
        ({"sign": 1}, TypeError, "is a int; expected bool"),
        ({"names": ("a",)}, TypeError, r"expected list\[str\]"),
        ({"names": [1]}, TypeError, r"expected list\[str\]"),
        ({"names": torch.zeros(2)}, TypeError, r"expected list\[str\]"),
    ],
)
def test_every_mistake_is_named(wide, options, error, message):
    with pytest.raises(error, match=message):
        MoeLoraConfig(**wide, router_options=options)


def test_options_of_another_router_are_refused_and_ranges_are_checked():
    with pytest.raises(ValueError, match="TopKRouter has no option.*Its options are: none"):
        MoeLoraConfig(router_options={"hidden_size": 3})
    for router in ("mlp", "descriptor"):
        for wrong, error in ((0, "at least 1"), (10**9, "too large")):
            with pytest.raises(ValueError, match=f"hidden_size.*{error}"):
                MoeLoraConfig(router=router, router_options={"hidden_size": wrong})
    with pytest.raises(ValueError, match="no field.*router_hidden_size"):
        MoeLoraConfig(router_hidden_size=3)
    deep: Any = {}
    for _ in range(50):
        deep = {"hidden_size": deep}
    with pytest.raises(ValueError, match="nested deeper"):
        MoeLoraConfig(router="mlp", router_options=deep)


def test_they_survive_json_and_a_checkpoint(wide, tmp_path):
    options = {"temperature": 0.5, "kind": "odd", "names": ["x"]}
    model = causal(**wide, router_options=options)
    config = model.moelora_config
    assert MoeLoraConfig.from_dict(json.loads(json.dumps(config.own_fields()))).router_options == (
        config.router_options
    )
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base()).eval()
    assert again.moelora_config.router_options == config.router_options
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert all(
        router.options == WideRouter.Options(**config.router_options)
        for router in again.moelora.routers.values()
    )


def test_at_loading_only_what_the_class_allows_may_change(wide, tmp_path):
    model = causal(**wide, router_options={"temperature": 0.5, "width": 3})
    model.save_pretrained(tmp_path)

    def loaded(**options):
        return MoeLoraForCausalLM.from_pretrained(
            tmp_path, base=causal_base(), router_options=options
        )

    changed = loaded(temperature=4.0).moelora_config.router_options
    assert (changed["temperature"], changed["width"]) == (4.0, 3)
    assert loaded(width=3).moelora_config.router_options == model.moelora_config.router_options
    with pytest.raises(
        ValueError, match="width cannot be changed.*width=3.*These can: temperature"
    ):
        loaded(width=4)
    with pytest.raises(ValueError, match="no option"):
        loaded(widht=4)
    with pytest.raises(ValueError, match="hidden_size cannot be changed.*These can: none"):
        changed_options("mlp", {"hidden_size": 8}, {"hidden_size": 9})


def test_a_class_is_checked_when_it_is_registered():
    def refused(error, match, **namespace):
        with pytest.raises(error, match=match):
            register_router("test_wrong")(type("Wrong", (TopKRouter,), namespace))
        assert "test_wrong" not in ROUTERS

    @dataclass
    class NoDefault:
        width: int

    @dataclass
    class WrongDefault:
        width: int = "8"  # type: ignore[assignment]

    @dataclass
    class NotJson:
        shape: tuple = (1, 2)

    refused(TypeError, "is not a dataclass", Options=dict)
    refused(TypeError, "width has no default", Options=NoDefault)
    refused(TypeError, "expected int", Options=WrongDefault)
    refused(ValueError, "cannot be saved as JSON", Options=NotJson)
    refused(ValueError, "changeable_options names depth", changeable_options=frozenset({"depth"}))
    with pytest.raises(TypeError, match="takes a subclass of Router"):
        register_router("test_wrong")(dict)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mlp' is taken"):
        register_router("mlp")(TopKRouter)
    register_router("mlp")(MlpRouter)


def test_a_config_that_is_not_a_router_s_own_keeps_the_defaults():
    assert MlpRouter(MoeLoraConfig(num_experts=3), 4).options == MlpRouter.Options(hidden_size=64)
    assert Router.Options() == TopKRouter.Options()
