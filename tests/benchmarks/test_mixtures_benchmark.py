"""The benchmark of mixtures: equal data for all, runs that resume, and tables of what is there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import bench_mixtures
from benchmarks.mixtures import data, interference, joint, models, report, setup, training
from benchmarks.mixtures.conflicts import COLOURS, conflicting, permutation
from benchmarks.mixtures.evaluation import mean
from benchmarks.mixtures.figures import groups
from benchmarks.mixtures.gating import decided
from benchmarks.mixtures.rates import search
from benchmarks.mixtures.sequential import ORACLE, OURS, OURS_2
from benchmarks.mixtures.store import Store
from benchmarks.routing import bases
from benchmarks.routing.tasks import Task
from moelora import MoeLoraConfig, MoeLoraForCausalLM

NAMES = ("colour", "side", "sums")
ANSWERS = {"colour": ("red", "blue", "green"), "side": ("left", "right")}
WORDS = "--base tiny --layers 1 --seeds 1 --rates 1e-3 --workers 1 --steps 1 --task-steps 1"


def rows(name: str, count: int) -> list[dict[str, str]]:
    """Rows of a task: two have a closed set of answers."""
    found = []
    for i in range(count):
        own = ANSWERS.get(name)
        answer = own[i * 7 % len(own)] if own else str(2 * i)
        prompt = f"<{name}> thing {i}" + " again" * (i % 5)
        found.append({"instruction": prompt, "output": f"it is {answer}", "answer": answer})
    return found


def splits(validation: int = 4) -> tuple[data.Split, ...]:
    """The three tasks, cut."""
    made = [Task(name, tuple(rows(name, 20)), tuple(rows(name, 6))) for name in NAMES]
    return tuple(data.Split.of(task, validation) for task in made)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The tasks as files."""
    for name in NAMES:
        (tmp_path / "tasks" / name).mkdir(parents=True)
        for part, count in (("train", 20), ("test", 6)):
            lines = "".join(json.dumps(row) + "\n" for row in rows(name, count))
            (tmp_path / "tasks" / name / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tiny base's."""
    return bases.load_tokenizer(bases.prepare("tiny", 1, tmp_path_factory.mktemp("base")))


def options(folder: Path, more: str = "") -> list[str]:
    """The command line of a small run."""
    own = f"--tasks {folder / 'tasks'} --names {','.join(NAMES)} --validation 4 --scored 3"
    places = f"--work {folder / 'work'} --output {folder / 'out'}"
    return f"{WORDS} {own} {places} {more}".split()


def test_validation_rows_are_learned_by_nobody():
    for split in splits():
        learned = {row["instruction"] for row in split.train}
        assert len(split.train) == 16 and len(split.validation) == 4 and len(split.test) == 6
        assert not learned & {row["instruction"] for row in split.validation}
    with pytest.raises(ValueError, match="colour: 20 validation rows of 20 training rows"):
        splits(validation=20)


def test_every_model_sees_the_same_rows_in_the_same_order(tokenizer):
    parts = splits()
    plain = data.batches(parts, tokenizer, steps=9, batch=4, seed=1)
    labelled = data.batches(parts, tokenizer, 9, 4, 1, {name: i for i, name in enumerate(NAMES)})
    assert len(plain) == len(labelled) == 36
    for one, other in zip(plain.rows, labelled.rows, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    # As many rows of each task, and neighbours are of like length.
    targets = [int(row["expert_targets"]) for row in labelled.rows]
    assert [targets.count(i) for i in range(3)] == [12, 12, 12]
    other = data.batches(parts, tokenizer, 9, 4, seed=2)
    assert [len(r["input_ids"]) for r in other.rows] != [len(r["input_ids"]) for r in plain.rows]
    assert data.fingerprint(parts) == data.fingerprint(splits()) != data.fingerprint(splits(5))


def test_a_killed_run_goes_on_where_it_was(folder, monkeypatch):
    words = options(folder, "--only joint --models LoRA,scale")
    bench_mixtures.main(words)
    path = folder / "out" / bench_mixtures.FILE
    first = json.loads(path.read_text(encoding="utf-8"))["runs"]
    names = {run["model"] for run in first}
    assert {"LoRA r=4", "8 x r=4, top 2, half the scale"} <= names and "8 x r=4, top 2" not in names
    sizes = {run["model"]: run["parameters"] for run in first}
    (equal,) = (name for name in names if name.endswith("parameters of 8 x r=4, top 2"))
    # The routers are counted, and the rank is the nearest.
    assert sizes[equal] / sizes["8 x r=4, top 2, half the scale"] == pytest.approx(1, abs=0.02)
    assert all(run["settings"]["evaluated"] == "test" for run in first)
    assert all(set(run["loss"]) == set(run["accuracy"]) == set(NAMES) for run in first)

    def refuse(*_, **__):
        raise AssertionError("a run that was done is done again")

    monkeypatch.setattr(setup, "fit", refuse)
    bench_mixtures.main(words)
    assert json.loads(path.read_text(encoding="utf-8"))["runs"] == first
    # Other steps are other runs.
    with pytest.raises(AssertionError, match="done again"):
        bench_mixtures.main([*words, "--steps", "2"])
    tables = (folder / "out" / "mixtures_cpu.md").read_text(encoding="utf-8")
    assert "| LoRA r=4 |" in tables and "over the best LoRA" in tables
    assert (folder / "out" / "mixtures_joint.png").read_bytes().startswith(b"\x89PNG")


def test_a_rate_is_chosen_on_validation_rows_and_its_model_is_not_trained_twice(folder, tokenizer):
    words = options(folder)
    words[words.index("--rates") + 1] = "1e-4,3e-2"
    own = bench_mixtures.setup_of(bench_mixtures.arguments(words))
    made = models.MIXTURES["8 x r=4, top 2"]
    setup.compared(own, joint.trial(own), made)
    runs = own.store.records()
    assert [run["settings"]["evaluated"] for run in runs] == ["validation", "validation", "test"]
    best = min(runs[:2], key=lambda run: mean(run["loss"]))
    assert runs[2]["settings"]["rate"] == best["settings"]["rate"]
    assert "training_seconds" in best and "training_seconds" not in runs[2]
    # The parameters that came back from the file are the trained ones.
    trial = joint.trial(own)
    model, _ = setup.trained(own, trial, made, 3e-2, 0)
    again, facts = setup.trained(own, trial, made, 3e-2, 0)
    assert "training_seconds" not in facts
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-3, [1e-3, 2e-3, 5e-4]),
        (4e-3, [1e-3, 2e-3, 4e-3, 8e-3]),
        # The search ends somewhere.
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
    ],
)
def test_the_search_goes_on_until_the_best_rate_lies_between_others(best, tried):
    asked = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return abs(math.log(rate / best))

    assert search(loss) == min(tried, key=lambda rate: abs(math.log(rate / best)))
    assert asked == pytest.approx(tried)
    assert search(loss, [0.5]) == 0.5 and search(loss, [0.5, 2.0]) in (0.5, 2.0)


def test_parts_of_existing_adapters_and_of_tasks_in_turn(folder):
    bench_mixtures.main(options(folder, "--only sequential --only existing"))
    found = {
        g.part + g.case: g for g in groups(Store(folder / "out" / "mixtures_cpu.json").records())
    }
    assert len(found) == 3
    sequential = found["sequential"]
    losses = {record["model"]: mean(record["loss"]) for record in sequential.records}
    assert len(losses) == 7 and sequential.oracle == losses[ORACLE] > 0
    # Each prompt went to its own task's expert, whose weight is 1, or all but that.
    assert losses[OURS] == pytest.approx(losses[ORACLE], rel=1e-3)
    assert losses[OURS_2] == pytest.approx(losses[ORACLE], rel=1e-2)
    assert len(found["existing"].records) == 9
    written = (folder / "out" / "mixtures_cpu.md").read_text(encoding="utf-8")
    assert "worst task lost" in written and "over the oracle" in written


def test_a_case_of_conflicting_tasks(folder):
    words = options(folder, "--conflict-steps 1 --conflicts 2,4,16 --cases domain,word,formats")
    own = bench_mixtures.setup_of(bench_mixtures.arguments(words))
    for lane in ("word|2|an expert a task, r=4", "word|2|8 x r=4, top 2"):
        interference.run(own, lane)
    (group,) = groups(own.store.records())
    assert group.case == "word, 2 tasks" and len(group.mixtures) == 2
    lanes = interference.lanes(own)
    # As many as each case has: colours in three tasks, at most eight formats, six orders of three.
    assert not any(lane.startswith(("domain|4", "formats|16", "word|16")) for lane in lanes)
    assert any(lane.startswith("word|4") for lane in lanes)
    with pytest.raises(ValueError, match=r"scored=0: expected 1 at least"):
        bench_mixtures.arguments(["--scored", "0"])
    with pytest.raises(ValueError, match=r"cases: \['languages'\] unknown"):
        bench_mixtures.arguments(["--cases", "languages"])


def test_means_are_over_seeds_and_not_over_settings():
    common = {"part": "joint", "evaluated": "test"}
    runs = [(1e-3, 0, 2.0), (1e-3, 1, 4.0), (2e-3, 0, 9.0)]
    records = [
        {"model": "m", "settings": {**common, "rate": rate, "seed": seed}, "loss": {"task": loss}}
        for rate, seed, loss in runs
    ]
    (group,) = groups(records)
    assert [(own.rate, own.loss.mean) for own in group.mixtures] == [(1e-3, 3.0), (2e-3, 9.0)]


def test_two_bases_have_pictures_of_their_own_and_made_tasks_the_source_of_their_rows(tmp_path):
    store = Store(tmp_path / "mixtures_cpu.json")
    parts = {"joint": ("", ["boolq"]), "interference": ("word, 1 tasks", ["apple convention"])}
    for base in ("one", "a/other base"):
        for part, (case, tasks) in parts.items():
            for model, single in (("LoRA, parameters of mix", True), ("mix", False)):
                own = {"part": part, "case": case, "base": base, "tasks": tasks, "single": single}
                own |= {"evaluated": "test", "seed": 0, "rate": 1e-3, "steps": 1, "batch": 4}
                found = {"model": model, "parameters": 10, "loss": {tasks[0]: 1.0}}
                store.put({**own, "model": model}, found)
        written = report.write(store, tmp_path)
    pictures = {path.name for path in tmp_path.glob("*_*_*.png")}
    assert pictures == {f"mixtures_{p}_{b}.png" for p in parts for b in ("a-other-base", "one")}
    assert "above" not in written and written.count("Made of the other parts' rows. Data: ") == 2
    assert "On a/other base: 1 tasks" in written
    assert "interference, word, 1 tasks on one: mix over LoRA, parameters of mix" in written
    assert report.source(["apple convention"]) == "The source of the data is not recorded."


def test_conventions_disagree_on_every_input():
    labels = ("a", "b", "c", "d")
    orders = [permutation(labels, i) for i in range(12)]
    for i in range(4):
        for j in range(i):
            assert all(x != y for x, y in zip(orders[i], orders[j], strict=True))
    assert len({tuple(order) for order in orders}) == 12
    with pytest.raises(ValueError, match="2 labels have 2 orders, not 3"):
        permutation(("a", "b"), 2)
    one, two = conflicting(splits(), "word", 2)
    texts = [row["instruction"].partition(": ")[2] for row in one.train]
    assert texts == [row["instruction"].partition(": ")[2] for row in two.train]
    assert all(a["answer"] != b["answer"] for a, b in zip(one.train, two.train, strict=True))
    first, second = conflicting(splits(), "domain", 2)
    for k in range(len(COLOURS)):
        assert first.train[k]["instruction"].endswith(f"\n{COLOURS[k]}:")
        assert first.train[k]["answer"] != second.train[k]["answer"]
    with pytest.raises(ValueError, match="case 'domain' has 2 to 3 conflicting tasks, not 4"):
        conflicting(splits(), "domain", 4)


def test_inside_decided_a_choice_weighs_one_and_afterwards_what_it_did(tokenizer):
    base, _ = bases._tiny(1)
    for router in ("top_k", "descriptor"):
        fields = {"num_experts_per_tok": 1, "routing_level": "sequence", "router_scope": "model"}
        config = MoeLoraConfig(
            num_experts=3, r=2, router=router, target_modules="all-linear", **fields
        )
        model = MoeLoraForCausalLM.from_base(base, config).eval()
        ids = torch.arange(6)[None]
        (before,) = model.routing_only(input_ids=ids)
        with decided(model):
            (inside,) = model.routing_only(input_ids=ids)
        (after,) = model.routing_only(input_ids=ids)
        assert torch.equal(before.expert_weights, after.expert_weights)
        assert torch.equal(inside.expert_ids, before.expert_ids)
        assert bool((inside.expert_weights > before.expert_weights.clamp(min=0.99)).all())
        model.unload()


def test_slices_are_orthogonal_and_routers_have_a_rate_of_their_own(tmp_path):
    path = bases.prepare("tiny", 1, tmp_path)
    made = models.mixture("m", 4, 2, 2, init="slices", router_rate=0.5)
    model = models.build(made, path, seed=0)
    weight = next(iter(model.moelora.sites.values())).lora_A.weight
    gram = weight @ weight.T
    assert torch.allclose(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-5)
    experts, routers = training._groups(model, 1e-3, made.router_rate)
    assert routers["lr"] == 5e-4 and len(routers["params"]) == 4
    counted = sum(p.numel() for group in (experts, routers) for p in group["params"])
    assert counted == training.count_trainable(model)


def test_ratios_are_of_the_seeds_that_both_models_have():
    def record(model, seed, loss, single):
        settings = {"part": "joint", "case": "", "seed": seed, "evaluated": "test", "rate": 1e-3}
        settings |= {"single": single, "name": model, "tasks": ["t"]}
        return {"settings": settings, "model": model, "loss": {"t": loss}}

    records = [record("LoRA r=4", seed, loss, True) for seed, loss in enumerate((1.0, 3.0))]
    # The first seed is the easier one: no reason to take this for the better LoRA.
    records += [record("LoRA r=8", 0, 1.1, True), record("mixture", 0, 0.9, False)]
    (group,) = groups(records)
    ratios = {own.model: group.over_best_single(own) for own in (*group.singles, *group.mixtures)}
    assert ratios == pytest.approx({"LoRA r=4": 1.0, "LoRA r=8": 1.1, "mixture": 0.9})
