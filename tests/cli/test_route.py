"""Routing as a service: `route_prompts`, and `moelora route` on real folders, with what goes wrong
in a line.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import VOCAB, causal_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.serving import RoutedPrompt, context_length, load_tokenizer, route_lines, route_prompts
from moelora_cli import app

EXPERTS = ["math", "code", "law"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)
# Word n belongs to expert (n - 8) // 12.
PROMPTS = ["w8 w9 w12", "w21", "w33 w34 w35 w40 w41", "w10 w11 w15 w16 w13 w9"]


def text_of(expert: int, count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8 + 12 * expert, 20 + 12 * expert, (count, 10), generator=generator)
    return [" ".join(f"w{n}" for n in row) for row in words.tolist()]


def tokenizer_of(**fields: Any) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "user": 1, **{f"w{n}": n for n in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **fields)


def mixture(base: str | Any, tokenizer: Any, **fields: Any) -> Any:
    gate = {"router": "descriptor", "routing_level": "sequence", "router_scope": "model", **fields}
    config = MoeLoraConfig(num_experts=3, expert_names=EXPERTS, num_experts_per_tok=1, r=2, **gate)
    torch.manual_seed(0)
    model = MoeLoraForCausalLM.from_base(base, config).eval()
    model.describe_experts({name: text_of(e, 20, 1) for e, name in enumerate(EXPERTS)}, tokenizer)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, its tokenizer beside it, and a mixture in `mixture`."""
    root = tmp_path_factory.mktemp("route")
    causal_base().save_pretrained(root / "base")
    tokenizer = tokenizer_of()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "base")
    mixture(str(root / "base"), tokenizer).save_pretrained(root / "mixture")
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    model = MoeLoraForCausalLM.from_pretrained(str(folder / "mixture"))
    return model, load_tokenizer(model, folder / "mixture")


def run(
    folder: Path, *words: Any, text: str | bytes = "", status: int = 0
) -> tuple[list[Any], str]:
    """The command's lines out, and what it says on standard error."""
    said = [str(word) for word in ("route", "--model", folder / "mixture", *words)]
    result = CliRunner().invoke(app, said, input=text)
    assert result.exit_code == status, result.output
    return [json.loads(line) for line in result.stdout.splitlines()], " ".join(
        result.stderr.split()
    )


def lines_of(*contents: Any) -> str:
    return "".join(json.dumps(content) + "\n" for content in contents)


def test_one_answer_a_line_in_order(folder, loaded):
    model, tokenizer = loaded
    rows = [(e, text) for e in range(3) for text in text_of(e, 5, 7)]
    rows = [
        rows[i] for i in torch.randperm(15, generator=torch.Generator().manual_seed(0)).tolist()
    ]
    text = lines_of(*({"prompt": text, "id": i} for i, (_, text) in enumerate(rows)))
    found, _ = run(folder, "--batch-size", 4, text=text)
    assert [answer["id"] for answer in found] == list(range(15))
    assert [answer["expert"] for answer in found] == [EXPERTS[e] for e, _ in rows]
    for answer, (_, prompt) in zip(found, rows):
        probabilities = answer["probabilities"]
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert next(iter(probabilities)) == answer["expert"] and set(probabilities) == set(EXPERTS)
        alone = model.route(**tokenizer(prompt, return_tensors="pt")).probabilities[0].tolist()
        assert [probabilities[name] for name in EXPERTS] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, {"routing_level": "token", "router_scope": "site"}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side, fields):
    # GPT-2 counts positions from the first column, so padding on the left would move them.
    tokenizer = tokenizer_of(padding_side=side)
    model = mixture(causal_base(name), tokenizer, **fields)
    alone = [route_prompts(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    for size in (2, 16):
        together = route_prompts(model, tokenizer, PROMPTS, batch_size=size)
        for one, other in zip(alone, together, strict=True):
            assert one.expert == other.expert
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_all_forms_of_a_line(folder):
    prompt = "w8 w9 w12"
    messages = [{"role": "user", "content": prompt}]
    in_template = f"user {prompt} w3"
    found, _ = run(
        folder,
        text=lines_of(prompt, {"prompt": prompt}, {"instruction": prompt, "output": "w60"})
        + lines_of({"messages": messages}, {"prompt": messages}, {"prompt": in_template}),
    )
    assert found[0] == found[1] == found[2] and found[3] == found[4] == found[5] != found[0]
    assert found[0]["expert"] == "math" and "id" not in found[0]


def test_a_field_of_ones_own_and_the_most_probable_alone(folder):
    row = {"prompt": "w8", "question": "w33 w34", "id": {"shard": 1}}
    found, _ = run(folder, "--field", "question", "--top", 1, text=lines_of(row))
    assert found[0]["expert"] == "law" and list(found[0]["probabilities"]) == ["law"]
    assert found[0]["id"] == {"shard": 1}


BAD = [
    ("", "It is empty"),
    ("{oops", "not valid JSON (Expecting property name"),
    ("[" * 100_000, "nested too deeply"),
    ("[1]", "It is a list; expected a JSON object or string"),
    ('{"text": "w8"}', 'no field "prompt" or "instruction" or "messages"; its fields are: text'),
    ('{"prompt": "  "}', "The prompt is empty"),
    ('{"prompt": null}', "The prompt is a NoneType"),
    ('{"prompt": ["w8"]}', "The prompt is a list; expected a text, or messages"),
    ('{"messages": []}', "The messages are empty"),
    ('{"messages": [{"role": "user", "content": ""}]}', "The messages are empty"),
    ('{"messages": [{"role": "user"}]}', 'A message has "role" and "content"; this one has role'),
    (json.dumps({"prompt": "w8 " * 129}), "The prompt has 129 tokens, and the context holds 128"),
    ('"\\ud800"', "surrogates not allowed"),
]


def test_a_bad_line_is_an_error_in_its_place_and_nothing_is_lost(folder):
    good = lines_of({"prompt": PROMPTS[0], "id": "x"})
    text = good + "".join(f"{bad}\n{good}" for bad, _ in BAD)
    found, said = run(folder, "--batch-size", 3, text=text, status=1)
    assert len(found) == 1 + 2 * len(BAD)
    assert all(answer["expert"] == "math" and answer["id"] == "x" for answer in found[::2])
    for i, (_, message) in enumerate(BAD):
        error = found[1 + 2 * i]["error"]
        assert error.startswith(f"line {2 + 2 * i}: ") and message in error and error in said
    assert f"{len(BAD)} of {len(found)} lines could not be routed" in said


def test_bytes_that_are_no_text_and_marks_at_the_beginning(folder):
    found, _ = run(folder, text=b'\xef\xbb\xbf"w8"\r\n\xff\xfe\n"w21"', status=1)
    assert ["expert" in answer for answer in found] == [True, False, True]
    assert "line 2: 'utf-8'" in found[1]["error"]


def test_an_error_keeps_its_id_and_no_lines_are_no_answers(folder):
    found, _ = run(folder, text=lines_of({"id": 3, "prompt": ""}), status=1)
    assert found == [{"id": 3, "error": "line 1: The prompt is empty."}]
    assert run(folder, text="") == ([], "")


def test_files_in_and_out(folder, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines_of(*PROMPTS))
    assert run(folder, "--input", source, "--output", target) == ([], "")
    first = target.read_text()
    assert [json.loads(line)["expert"] for line in first.splitlines()] == [
        "math",
        "code",
        "law",
        "math",
    ]
    _, said = run(folder, "-i", source, "-o", target, status=1)
    assert "exists" in said and target.read_text() == first
    run(folder, "-i", source, "-o", target, "--overwrite")
    _, said = run(folder, "-i", source, "-o", source, "--overwrite", status=1)
    assert "is the input too" in said and source.read_text() == lines_of(*PROMPTS)
    assert "nowhere" in run(folder, "-i", tmp_path / "nowhere", status=1)[1]


def test_answers_come_batch_by_batch(loaded):
    read = []

    def lines():
        for prompt in PROMPTS * 2:
            read.append(prompt)
            yield json.dumps(prompt)

    counts = [(len(answers), len(read)) for answers in route_lines(*loaded, lines(), batch_size=3)]
    assert counts == [(3, 3), (3, 6), (2, 8)]


def test_a_pipe_is_answered_while_it_is_open_and_may_close_early(folder):
    words = [sys.executable, "-m", "moelora", "route", "--model", str(folder / "mixture")]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [*words, "--batch-size", "2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        for prompts, experts in (PROMPTS[:2], ["math", "code"]), (PROMPTS[2:], ["law", "math"]):
            process.stdin.write(lines_of(*prompts).encode())
            process.stdin.flush()
            found = [json.loads(process.stdout.readline())["expert"] for _ in prompts]
            assert found == experts
        process.stdout.close()
        process.stdin.write(lines_of(*PROMPTS[:2]).encode())
        process.stdin.close()
        process.wait(60)
        said = process.stderr.read()
        assert b"Traceback" not in said and b"BrokenPipe" not in said


def test_the_base_is_a_name_too():
    tokenizer = tokenizer_of()
    model = mixture(causal_base(), tokenizer, null_expert=True)
    model.describe_experts({"(base)": ["w50 w51 w52 w53 w54", "w54 w55 w52 w50"]}, tokenizer)
    routed = route_prompts(model, tokenizer, ["w51 w53 w54"])[0]
    assert routed.expert == "(base)" and set(routed.probabilities) == {*EXPERTS, "(base)"}


def test_from_python(loaded):
    model, tokenizer = loaded
    model.train()
    found = route_prompts(
        model, tokenizer, (p for p in [*PROMPTS, [{"role": "user", "content": "w21"}]]), 2
    )
    assert model.training and all(isinstance(routed, RoutedPrompt) for routed in found)
    assert [routed.expert for routed in found[:4]] == ["math", "code", "law", "math"]
    assert sum(found[0].probabilities.values()) == pytest.approx(1.0, abs=1e-6)
    assert route_prompts(model, tokenizer, []) == []
    model.eval()


def test_mistakes_from_python_are_named(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=r"prompts\[1\]: The prompt is empty"):
        route_prompts(model, tokenizer, ["w8", ""])
    with pytest.raises(TypeError, match=r"prompts\[0\]: The prompt is a int"):
        route_prompts(model, tokenizer, [3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size=0"):
        route_prompts(model, tokenizer, ["w8"], batch_size=0)
    with pytest.raises(ValueError, match="top=0"):
        list(route_lines(model, tokenizer, io.BytesIO(b'"w8"'), top=0))
    plain = tokenizer_of()
    with pytest.raises(ValueError, match="no chat template"):
        route_prompts(model, plain, [[{"role": "user", "content": "w8"}]])
    plain.chat_template = "{{ raise_exception('only one role') }}"
    with pytest.raises(ValueError, match="refuses the messages: only one role"):
        route_prompts(model, plain, [[{"role": "user", "content": "w8"}]])


def test_the_context_is_the_shorter_of_the_base_s_and_the_tokenizer_s(loaded):
    model, _ = loaded
    assert context_length(model, tokenizer_of()) == 128
    assert context_length(model, tokenizer_of(model_max_length=20)) == 20


def test_where_the_tokenizer_is(folder, tmp_path):
    causal_base().save_pretrained(tmp_path / "base")
    tokenizer = tokenizer_of()
    model = mixture(str(tmp_path / "base"), tokenizer)
    model.save_pretrained(tmp_path / "mixture")
    _, said = run(tmp_path, text='"w8"\n', status=1)
    assert "There is no tokenizer in" in said and "save_pretrained" in said
    assert run(tmp_path, "--base", folder / "base", text='"w8"\n')[0][0]["expert"] == "math"
    tokenizer.save_pretrained(tmp_path / "mixture")
    assert run(tmp_path, text='"w8"\n')[0][0]["expert"] == "math"


def test_help_has_an_example_and_no_model_is_a_message(tmp_path):
    help_ = CliRunner().invoke(app, ["route", "--help"])
    assert help_.exit_code == 0 and "moelora route --model mixture" in help_.stdout
    assert "mixture" in run(tmp_path, text='"w8"\n', status=1)[1]
