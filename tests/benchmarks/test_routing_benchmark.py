"""The routing benchmark: tasks are read or refused, scores are what plain forward passes give, and
it runs whole.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import bench_routing
from benchmarks.routing import bases, selector
from benchmarks.routing.figures import Spread, _row
from benchmarks.routing.scoring import Sheet, TailLogits, score
from benchmarks.routing.settings import Sizes
from benchmarks.routing.tasks import Task, drawn, read_rows, read_tasks
from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.training import PadRouting, Texts

COLOURS, SIDES = ("red", "blue", "green"), ("left", "right")


def task_rows(name: str, count: int) -> list[dict[str, str]]:
    """Rows of a task that no other is like: two with a closed set of answers, one with sums."""
    if name == "sums":
        return [
            {"instruction": f"{i} + {i}?", "output": f"is {2 * i}", "answer": str(2 * i)}
            for i in range(count)
        ]
    answers = COLOURS if name.startswith("colour") else SIDES
    drawn = [answers[i * 7 % len(answers)] for i in range(count)]
    return [
        {"instruction": f"<{name}> thing {i}:", "output": f"the answer is {a}", "answer": a}
        for i, a in enumerate(drawn)
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of three tasks, and one more that is like one of them."""
    for name in ("colour", "side", "sums", "colours"):
        (tmp_path / "tasks" / name).mkdir(parents=True)
        for part, count in (("train", 24), ("test", 12)):
            lines = [json.dumps(row) + "\n" for row in task_rows(name, count)]
            (tmp_path / "tasks" / name / f"{part}.jsonl").write_text(
                "".join(lines), encoding="utf-8"
            )
    return tmp_path / "tasks"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny base and its tokenizer."""
    path = bases.prepare("tiny", 1, tmp_path_factory.mktemp("base"))
    return bases.load(path), bases.load_tokenizer(path)


NAMES = ["colour", "side", "sums"]


def test_it_measures_everything_and_writes_it(folder, tmp_path, capsys):
    words = (
        f"--tasks {folder} --names colour,side,sums --harder colours --base tiny --layers 2 --quick"
    )
    out = tmp_path / "out"
    bench_routing.main([*words.split(), "--output", str(out)])
    results = json.loads((out / "routing_cpu.json").read_text(encoding="utf-8"))
    parts = "machine settings rows targets routing latency replay base harder"
    assert set(parts.split()) <= set(results)
    check_rows(results)
    check_where_prompts_went(results)
    assert len(results["targets"]) == 10
    assert all(isinstance(row["met"], bool) for row in results["targets"])
    ratios = results["latency"][0]["ratios"].values()
    assert all(0 < low <= middle <= high for middle, low, high in ratios)
    for name in ("confusion", "confusion_harder", "base", "replay"):
        assert (out / f"routing_{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (out / "routing_cpu.md").read_text(encoding="utf-8") in printed
    for text in ("| gated, sequence |", "Data: tasks.", "selector, seed 0"):
        assert text in printed


def check_rows(results):
    rows = {row["candidate"]: row for row in results["rows"]}
    assert len(rows) == 1 + 3 + 1 + 1 + 2 + 2
    oracle = rows["each task by its own expert (oracle)"]
    assert all(oracle["loss"][name] == rows[f"expert {name}"]["loss"][name] for name in NAMES)
    for row in rows.values():
        assert all(math.isfinite(loss) for losses in row["loss"].values() for loss in losses)
        assert all(0 <= share <= 1 for shares in row["accuracy"].values() for share in shares)


def check_where_prompts_went(results):
    # Every prompt went somewhere, in every confusion matrix.
    assert all(sum(own.values()) == 12 for own in results["confusion"][0].values())
    assert set(results["harder"][-1]["confusion"][0]) == {*NAMES, "colours"}
    assert all(sum(own.values()) == 5 for own in results["selector"][0].values())
    replays = {(row["added"], row["replay"]) for row in results["replay"]}
    assert replays == {(name, share) for name in NAMES for share in (0, 0.1, 0.5)}
    assert all(row["deleted"] not in row["accuracy_after"] for row in results["replay"])
    assert set(results["base"][0]["kinds"].values()) == {
        "task",
        "a task without an expert",
        "outside, learned",
        "outside, unseen",
    }


def test_without_a_folder_the_corpus_is_the_tasks(tmp_path):
    options = bench_routing.arguments(["--base", "tiny", "--quick"])
    settings = bench_routing.settings_of(options, tmp_path)
    assert settings.names == ["python", "cpp", "docs", "licences"] and not settings.harder
    assert all(
        len(task.test) >= 40 and not task.options and not task.has_answers
        for task in settings.tasks
    )
    # What teaches the gate to leave texts alone is not a task that it has an expert for.
    assert settings.outside_train == ("docs",) and [t.name for t in settings.outside] == [
        "docs",
        "licences",
    ]
    assert options.seeds == 1 and bench_routing.arguments([]).seeds == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2 is empty"),
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is a list; expected an object with instruction, output"),
        ('{"instruction": "a"}', "line 2: 'output' is None"),
        ('{"instruction": " ", "output": "b"}', "line 2: 'instruction' is ' '"),
        (
            '{"instruction": "a", "output": "b", "answer": 3}',
            "line 2: 'answer' is 3; expected text",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_folders_and_names_that_are_wrong_are_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match="has no task law. Its tasks are: colour, colours, side, sums"
    ):
        read_tasks(folder, ["colour", "law"])
    with pytest.raises(ValueError, match="is no folder"):
        read_tasks(tmp_path / "nowhere", ["colour", "side"])
    with pytest.raises(ValueError, match="two different tasks"):
        read_tasks(folder, ["colour"])
    (folder / "side" / "test.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="test.jsonl is empty"):
        read_tasks(folder, ["colour", "side"])
    (folder / "side" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="test.jsonl is missing"):
        read_tasks(folder, ["colour", "side"])
    with pytest.raises(ValueError, match="layers=2 cuts smollm2 or tiny"):
        bases.prepare("some/model", 2, tmp_path)
    with pytest.raises(ValueError, match="seeds=0"):
        bench_routing.arguments(["--seeds", "0"])


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"instruction": "a\u2028b", "output": "c"}\n', encoding="utf-8"
    )
    assert read_rows(tmp_path / "x.jsonl")[0]["instruction"] == "a\u2028b"


def test_options_are_a_closed_set_of_answers():
    colour, sums = (
        Task(n, tuple(task_rows(n, 24)), tuple(task_rows(n, 12))) for n in ("colour", "sums")
    )
    assert colour.options == ("blue", "green", "red") and sums.options == ()
    # An answer that training never shows is outside the set.
    other = {"instruction": "?", "output": "the answer is pink", "answer": "pink"}
    assert Task("colour", colour.train, (*colour.test, other)).options == ()
    assert (
        drawn(colour.train, 5, 0, "a")
        == drawn(colour.train, 5, 0, "a")
        != drawn(colour.train, 5, 1, "a")
    )


def test_a_score_is_the_loss_of_plain_forward_passes(tiny):
    model, tokenizer = tiny
    sheet = Sheet(task_rows("sums", 12), (), tokenizer, has_answers=True)
    scores = score(model, sheet, batch_size=5)
    nats, tokens = 0.0, 0
    for row in sheet.texts.rows:
        count = int((row["labels"] != -100).sum())
        loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        nats, tokens = nats + float(loss) * count, tokens + count
    assert scores.tokens == tokens and scores.answers == 12
    assert scores.nats == pytest.approx(nats, rel=1e-5)


def test_an_exact_answer_is_what_greedy_decoding_writes(tiny):
    model, tokenizer = tiny
    rows, right = task_rows("sums", 6), 0
    prompts = [row["instruction"] for row in rows]
    for number, prompt in enumerate(prompts[:3]):
        # What the model itself would write is right; the other rows stay wrong.
        ids = torch.tensor([tokenizer(prompt + "\n")["input_ids"]])
        generated = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        rows[number] = {"instruction": prompt, "output": "x"}
        target = torch.cat([ids[0, -1:], generated[0, ids.shape[1] :]])
        rows[number]["ids"] = target.tolist()
        right += 1
    sheet = Sheet(
        [{k: v for k, v in row.items() if k != "ids"} for row in rows],
        (),
        tokenizer,
        has_answers=True,
    )
    for number in range(right):
        prompt, target = sheet.texts.prompts()[number], torch.tensor(rows[number]["ids"])
        row = {
            "input_ids": torch.cat([prompt, target]),
            "labels": torch.cat([torch.full_like(prompt, -100), target]),
        }
        # The join after the prompt is part of any target, and not what is asked here.
        row["labels"][len(prompt)] = -100
        sheet.texts.rows[number] = row | {
            "router_mask": torch.arange(len(row["labels"])) < len(prompt)
        }
    assert score(model, sheet).right == right


def test_options_in_one_forward_are_the_options_one_by_one(tiny):
    model, tokenizer = tiny
    rows = [
        {"instruction": f"item {i}?", "output": f"is answer{i % 3}", "answer": f"answer{i % 3}"}
        for i in range(9)
    ]
    options = ("answer0", "answer1", "answer2")
    sheet = Sheet(rows, options, tokenizer, has_answers=True)
    assert sheet.finals is not None and len(sheet.finals[0]) == 3
    fast = score(model, sheet, batch_size=4)
    sheet.finals = None
    assert score(model, sheet, batch_size=4).right == fast.right
    # Words of several tokens have no common stem, and are scored in rows of their own.
    longer = Sheet(task_rows("colour", 6), ("blue", "green", "red"), tokenizer, has_answers=True)
    assert longer.finals is None and 0 <= score(model, longer).right <= 6


def test_leaving_out_logits_changes_no_loss_and_no_gradient(tiny):
    model, tokenizer = tiny
    texts = Texts.of(task_rows("colour", 3), tokenizer)
    pad = PadRouting(pad_token_id=bases.pad_id(tokenizer))
    losses, gradients = [], []
    for collate in (pad, TailLogits(pad, model)):
        batch = collate([texts[i] for i in range(3)])
        batch.pop("router_mask", None)
        loss = model(**batch).loss
        losses.append(float(loss))
        gradients.append(torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0])
    assert batch["labels"].shape[1] == batch["logits_to_keep"] < batch["input_ids"].shape[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_blend_reads_whole_prompts_though_labels_are_cut(tiny, side):
    """Its routers read prompts at token level too, so they are told where those end."""
    base, tokenizer = tiny
    config = MoeLoraConfig(num_experts=3, r=2, router="hybrid", router_aux_loss_coef=0.0)
    model = MoeLoraForCausalLM.from_base(copy.deepcopy(base), config).eval()
    texts = Texts.of(task_rows("colour", 3), tokenizer)
    pad = PadRouting(pad_token_id=bases.pad_id(tokenizer), padding_side=side)
    batches = [collate([texts[i] for i in range(3)]) for collate in (pad, TailLogits(pad, model))]
    assert "router_mask" in batches[1] and "logits_to_keep" in batches[1]
    found = [model(**batch, output_expert_routing=True) for batch in batches]
    assert float(found[1].loss) == pytest.approx(float(found[0].loss), rel=1e-5)
    for one, other in zip(found[0].expert_routing, found[1].expert_routing, strict=True):
        torch.testing.assert_close(other.logits, one.logits)


def test_labels_are_read_up_to_the_end_of_the_line(tiny):
    model, tokenizer = tiny
    assert selector._name("\nboolq\nmore") == "boolq" and selector._name(" \n") == ""
    prompts = Texts.of(task_rows("colour", 5), tokenizer).prompts()
    together = selector.written(model, prompts, tokenizer, batch_size=5)
    assert together == [selector.written(model, [prompt], tokenizer)[0] for prompt in prompts]


def test_targets_are_met_by_the_mean():
    spread = Spread.of([0.98, 1.0, 1.0])
    assert (spread.low, spread.high) == (0.98, 1.0) and spread.text(".2f") == "0.99 (0.98–1.00)"
    assert (
        _row("a", spread, 0.99, least=True)["met"]
        and not _row("a", spread, 0.995, least=True)["met"]
    )
    assert (
        not _row("b", Spread(1.0, 1.0, 1.0), 1.0, strict=True)["met"]
        and _row("b", Spread(1, 1, 1), 1.0)["met"]
    )
    assert Sizes.quick().gate_texts < Sizes().gate_texts == 100


def test_a_template_is_the_words_that_nearly_all_prompts_have(folder):
    (task,) = (task for task in read_tasks(folder, ["sums", "side"]) if task.name == "side")
    assert task.train[3]["instruction"] == "<side> thing 3:"
    bare = task.without_template()
    assert [row["instruction"] for row in bare.train[:2]] == ["0:", "1:"] and bare.test[1]["output"]
    all_alike = Task(
        "a",
        ({"instruction": "same", "output": "x"},) * 3,
        ({"instruction": "same", "output": "x"},),
    )
    assert all_alike.without_template().test[0]["instruction"] == "same"


def test_parts_alone(folder, tmp_path):
    tasks = f"--tasks {folder} --names colour,side,sums --harder colours"
    words = f"{tasks} --base tiny --layers 2 --quick".split()
    results = {}
    for only in ("gates", "harder"):
        bench_routing.main([*words, "--only", only, "--output", str(tmp_path)])
        results[only] = json.loads(
            (tmp_path / f"routing_{only}_cpu.json").read_text(encoding="utf-8")
        )
    kinds = {row["gate"] for row in results["gates"]["routing"]}
    assert {
        "linear, mean of the embeddings",
        "mlp, mean; prompts without their template's words",
    } <= kinds
    over = {row["gate"]: row["mean"] for row in results["harder"]["over_oracle"]}
    assert over["oracle"] == 1 and over["gated, sequence, top 2"] > 0
    assert not (tmp_path / "routing_cpu.json").exists()
