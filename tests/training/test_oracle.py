"""Labels by oracle: the expert with the lowest loss, kept on disk for as long as they are true."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import causal_base
from core.mixtures import activate, causal, classifier
from safetensors.torch import load_file, save_file
from training.tasks import GATE, choices, gate, task, tasks
from transformers import PreTrainedModel

from moelora.training import PadRouting, Texts, oracle_targets, train_gate
from moelora.training import oracle as module


def texts(rows: int = 6) -> Texts:
    return Texts.joined(tasks(rows).values())


@torch.no_grad()
def alone(model: Any, row: dict[str, torch.Tensor]) -> float:
    """A text's loss by the base's own code, unpadded."""
    labels = row["labels"][None]
    return float(PreTrainedModel.loss_function.fget(model)(
        model(row["input_ids"][None]).logits, labels, vocab_size=model.config.vocab_size
    ))  # fmt: skip


def by_hand(model: Any, rows: Texts) -> torch.Tensor:
    """Every text with every expert, and the base alone, one by one."""
    found = []
    for name in model.moelora_config.expert_names:
        with model.use_experts(name):
            found.append([alone(model, row) for row in rows])
    with model.use_experts({name: 0.0}):
        found.append([alone(model, row) for row in rows])
    return torch.tensor(found).T


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "bloom"])
@pytest.mark.parametrize("null_expert", [False, True])
def test_each_text_gets_the_expert_with_the_lowest_loss(name, null_expert):
    fields = {**GATE, "null_expert": null_expert}
    model = causal(name, **fields)
    found, expected = oracle_targets(model, texts(), batch_size=5), by_hand(model, texts())
    if not null_expert:
        expected = expected[:, :-1]
    torch.testing.assert_close(found.losses, expected, rtol=1e-4, atol=1e-5)
    assert found.targets.dtype == torch.int64 and torch.equal(found.targets, expected.argmin(1))
    assert found.choice_names == ["red", "green", "blue", *(["(base)"] if null_expert else [])]
    assert len(found.targets.unique()) > 1


def test_shared_experts_act_beside_every_choice():
    names = ["red", "green", "blue"]
    model = gate(num_shared_experts=1, null_expert=True)
    found = oracle_targets(model, texts(2))
    assert found.choice_names == ["red", "green", "(base)"]
    expected = []
    for weights in ({"red": 1.0, "blue": 1.0}, {"green": 1.0, "blue": 1.0}, {"blue": 1.0}):
        with model.use_experts(weights):
            expected.append([alone(model, row) for row in texts(2)])
    torch.testing.assert_close(found.losses, torch.tensor(expected).T, rtol=1e-4, atol=1e-5)
    assert model.moelora_config.expert_names == names
    with pytest.raises(ValueError, match="no expert 'blue'. The choices are: red, green"):
        train_gate(model, {"blue": texts(2)})


def test_the_base_alone_is_the_base():
    model = gate(null_expert=True)
    found = oracle_targets(model, texts(2)).losses[:, -1]
    base = causal_base()
    torch.testing.assert_close(
        found, torch.tensor([alone(base, row) for row in texts(2)]), rtol=1e-4, atol=1e-5
    )


def test_whole_texts_count_from_their_second_token():
    model = gate()
    whole = Texts([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in texts(2)])
    torch.testing.assert_close(
        oracle_targets(model, whole, batch_size=4).losses,
        by_hand(model, whole)[:, :-1],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_batches_modes_and_routers_change_nothing(level):
    model = gate(lora_dropout=0.5, routing_level=level)
    one = oracle_targets(model.train(), texts(), batch_size=1)
    assert model.training and not model.moelora.overridden
    other = oracle_targets(model.eval(), texts(), batch_size=18)
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(one.losses, oracle_targets(model, texts(), batch_size=1).losses)


def test_ties_go_to_the_lowest_number_and_a_margin_leaves_them_out():
    model = gate(active=False, null_expert=True)
    found = oracle_targets(model, texts(2))
    assert found.targets.tolist() == [0] * 6 and torch.equal(
        found.losses, found.losses[:, :1].expand(-1, 4)
    )
    assert oracle_targets(model, texts(2), margin=1e-6).targets.tolist() == [-100] * 6
    model = gate()
    two = oracle_targets(model, texts()).losses.sort(1).values
    margin = float((two[:, 1] - two[:, 0]).median())
    targets = oracle_targets(model, texts(), margin=margin).targets
    assert torch.equal(targets == -100, two[:, 1] - two[:, 0] < margin) and bool(
        (targets == -100).any()
    )


def learn(model: Any, name: str, own: Texts) -> None:
    """Train one expert on its own texts, and nothing else."""
    factors = model.moelora.factors()
    parameters = [p for factor in factors for p in factor.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    batch = PadRouting()(list(own))
    with model.use_experts(name):
        for _ in range(20):
            optimizer.zero_grad()
            model(
                **{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
            ).loss.backward()
            optimizer.step()


def test_a_gate_trained_on_its_labels_routes_as_it_says():
    # Targets long enough that a text's loss is its task's, on texts that no expert has seen too.
    model, names = gate(), GATE["expert_names"]
    known, held_out = ({n: task(i, seed=s, target=10) for i, n in enumerate(names)} for s in (0, 1))
    for name, own in known.items():
        learn(model, name, own)
    found = oracle_targets(model, Texts.joined(known.values()))
    assert found.targets.tolist() == [i for i in range(3) for _ in range(24)]
    train_gate(model, Texts.joined(known.values()).labelled(found.targets), epochs=20)
    for own in held_out.values():
        says = [found.choice_names[i] for i in oracle_targets(model, own).targets]
        agrees = [a == b for a, b in zip(choices(model, own), says)]
        assert sum(agrees) >= 0.95 * len(agrees)


def counting(monkeypatch) -> list[int]:
    """How often losses are computed."""
    asked: list[int] = []
    whole = module._losses

    def losses(*args):
        asked.append(1)
        return whole(*args)

    monkeypatch.setattr(module, "_losses", losses)
    return asked


def test_a_cache_is_taken_again_whatever_the_gate_does(tmp_path, monkeypatch):
    asked, cache = counting(monkeypatch), tmp_path / "folder" / "oracle.safetensors"
    model = gate()
    first = oracle_targets(model, texts(), cache=cache)
    train_gate(model, texts().labelled(first.targets), epochs=1)
    model.freeze_experts("red")
    again = oracle_targets(gate(), texts().labelled(0), cache=str(cache), batch_size=3)
    frozen = oracle_targets(model, texts(), cache=cache, margin=0.01)
    assert asked == [1] and [p.name for p in cache.parent.iterdir()] == [cache.name]
    assert torch.equal(first.losses, again.losses) and torch.equal(first.losses, frozen.losses)
    assert torch.equal(first.targets, again.targets)


def changed_text(model: Any, rows: Texts) -> None:
    rows.rows[3]["input_ids"][-1] += 1


def changed_labels(model: Any, rows: Texts) -> None:
    rows.rows[3]["labels"][-1] = -100


def fewer_texts(model: Any, rows: Texts) -> None:
    rows.rows.pop()


@torch.no_grad()
def changed_expert(model: Any, rows: Texts) -> None:
    next(iter(model.moelora.expert(0).values())).A[0, 0] += 1


@torch.no_grad()
def changed_base(model: Any, rows: Texts) -> None:
    model.model.layers[1].mlp.up_proj.weight[7, 5] += 1


def scaled_expert(model: Any, rows: Texts) -> None:
    model.moelora.config.lora_alpha = 7


def other_names(model: Any, rows: Texts) -> None:
    model.moelora.config.expert_names = ["red", "blue", "green"]


def other_activation(model: Any, rows: Texts) -> None:
    model.moelora.config.expert_activation = "relu"
    for site in model.moelora.sites.values():
        site.activation = "relu"


CHANGES = [
    other_activation,
    changed_text,
    changed_labels,
    fewer_texts,
    changed_expert,
    changed_base,
    scaled_expert,
    other_names,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_stale_cache_is_computed_anew(change, tmp_path, monkeypatch):
    asked, cache = counting(monkeypatch), tmp_path / "oracle"
    model, rows = gate(), Texts(copy.deepcopy(texts().rows))
    oracle_targets(model, rows, cache=cache)
    change(model, rows)
    found = oracle_targets(model, rows, cache=cache)
    assert len(asked) == 2 and torch.equal(found.losses, oracle_targets(model, rows).losses)
    oracle_targets(model, rows, cache=cache)
    assert len(asked) == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def without_key(path: Path) -> None:
    save_file(load_file(path), path)


def other_tensors(path: Path) -> None:
    save_file({"else": torch.ones(2)}, path, metadata={"key": "none"})


@pytest.mark.parametrize(
    "damage", [cut, flipped, emptied, without_key, other_tensors], ids=lambda d: d.__name__
)
def test_a_damaged_cache_is_computed_anew(damage, tmp_path, monkeypatch):
    asked, cache = counting(monkeypatch), tmp_path / "oracle"
    first = oracle_targets(gate(), texts(), cache=cache)
    damage(cache)
    again = oracle_targets(gate(), texts(), cache=cache)
    assert len(asked) == 2 and torch.equal(first.losses, again.losses)
    oracle_targets(gate(), texts(), cache=cache)
    assert len(asked) == 2


def test_bad_input(tmp_path):
    model = gate()
    short = {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}
    with pytest.raises(ValueError, match="Row 2 has no target token"):
        oracle_targets(model, Texts([*task(0, 2), short]))
    for options, message in (({"batch_size": 0}, "batch_size=0"), ({"margin": -1.0}, "margin")):
        with pytest.raises(ValueError, match=message):
            oracle_targets(model, texts(2), **options)
    with pytest.raises(ValueError, match="no texts"):
        oracle_targets(model, Texts([]))
    with pytest.raises(TypeError, match="expected Texts"):
        oracle_targets(model, ["some text"])
    with pytest.raises(ValueError, match="is a folder"):
        oracle_targets(model, texts(2), cache=tmp_path)
    with pytest.raises(TypeError, match="classifier"):
        oracle_targets(classifier(), texts(2))
    activate(model, std=float("nan"))
    with pytest.raises(ValueError, match="loss with 'red' is nan on row 0"):
        oracle_targets(model, texts(2), cache=tmp_path / "oracle")
    assert not (tmp_path / "oracle").exists()
