"""The model card of a checkpoint, and a push to a hub that is a server of this test."""

import base64
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import transformers.utils.hub
from adapters.peft_folders import save_adapter
from bases import causal_base
from checkpoint.stored import load, logits, mixture_on, saved, write_base
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from moelora import MoeLoraForCausalLM
from moelora.checkpoint.card import without_paths
from moelora_cli import app


def test_the_card_says_what_the_checkpoint_is(tmp_path):
    write_base(tmp_path / "its-base")
    for seed, name in enumerate(("one", "other")):
        base = type(causal_base()).from_pretrained(tmp_path / "its-base")
        save_adapter(tmp_path / name, base, seed, r=4 + seed, target_modules=["q_proj"])
    sources = {"math": str(tmp_path / "one"), "code": str(tmp_path / "other")}
    model = MoeLoraForCausalLM.from_adapters(tmp_path / "its-base", sources)
    model.add_expert("law", copy_of="math")
    model.add_expert("new")
    model.save_pretrained(tmp_path / "mixture")
    card = ModelCard.load(tmp_path / "mixture" / "README.md")
    assert card.data.library_name == "moelora" and card.data.pipeline_tag == "text-generation"
    for row in ("math | 4 | one", "code | 5 | other", "law | 4 | a copy of math", "new | 4 | tr"):
        assert f"| {row}" in card.text
    assert "LlamaForCausalLM" in card.text and "base=" in card.text and "top_k" in card.text
    assert str(tmp_path) not in card.content
    # Sources stay with the experts.
    again = load(tmp_path / "mixture")
    again.remove_expert("code")
    again.replace_expert("new", adapter=str(tmp_path / "one"))
    again.save_pretrained(tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert "| new | 4 | one" in card.text and "| code" not in card.text


def test_the_card_tells_of_what_differs_from_row_to_row_and_from_linear_to_linear(tmp_path):
    fields = {"num_experts": 3, "num_shared_experts": 1, "num_experts_per_tok": None}
    patterns = {"rank_pattern": {"q_proj": [5, 3, 1]}}
    model = mixture_on(causal_base(), router="top_p", **fields, **patterns)
    model.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "each token takes at most 2 of the experts, and always expert_2" in text
    for row in ("expert_0 | 3 to 5 |", "expert_1 | 3 |", "expert_2 | 1 to 3 |"):
        assert f"| {row}" in text
    result = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert result.exit_code == 0 and "3 to 5" in result.output


def test_a_base_of_the_hub_is_named_and_one_inside_is_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--someone--tiny"
    base = type(causal_base()).from_pretrained(write_base(cached / "snapshots" / "0123"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    base.config.name_or_path = "someone/tiny"
    model = mixture_on(base)
    model.save_pretrained(tmp_path / "experts")
    card = ModelCard.load(tmp_path / "experts" / "README.md")
    assert card.data.base_model == "someone/tiny" and "base=" not in card.text
    model.save_pretrained(tmp_path / "whole", save_base=True)
    card = ModelCard.load(tmp_path / "whole" / "README.md")
    assert card.data.base_model is None and "in `base-" in card.text and "base=" not in card.text


@pytest.mark.parametrize("name", ["bases/tiny", "../tiny"])
def test_a_relative_folder_that_is_missing_is_no_id(tmp_path, monkeypatch, name):
    """As of a base that was loaded before the process went to work in another folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = causal_base()
    base.config.name_or_path = name
    model = mixture_on(base)
    model.save_pretrained(tmp_path / "experts")
    card = ModelCard.load(tmp_path / "experts" / "README.md")
    assert card.data.base_model is None and "base=" in card.text
    assert name not in card.content and "huggingface.co" not in card.content
    pushed = copy.deepcopy(model.moelora_config)
    without_paths(pushed)
    assert pushed.base_model_name_or_path == (None if name == "../tiny" else name)
    # One who knows better says of which revision it is.
    model.moelora_config.base_model_name_or_path = "someone/tiny"
    model.moelora_config.base_revision = "main"
    model.save_pretrained(tmp_path / "experts")
    card = ModelCard.load(tmp_path / "experts" / "README.md")
    assert card.data.base_model == "someone/tiny" and "base=" not in card.text


def test_a_card_of_ones_own_stays(tmp_path):
    model = saved(tmp_path)
    path = tmp_path / "experts" / "README.md"
    first = path.read_text()
    model.save_pretrained(tmp_path / "experts")
    assert path.read_text() == first
    path.write_text("# Mine\n")
    model.save_pretrained(tmp_path / "experts")
    assert path.read_text() == "# Mine\n"


@pytest.fixture
def hub():
    """A server that takes what the hub's client sends for one repository without a card."""
    files = {}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            address = f"http://localhost:{self.server.server_port}"
            answer = {"url": f"{address}/someone/experts", "name": "someone/experts"}
            if "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular"} for f in asked]
                answer = {"files": [{**mode, "shouldIgnore": False} for mode in modes]}
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    item = json.loads(line)
                    if item["key"] == "file":
                        files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                commit = {"commitUrl": f"{address}/someone/experts/commit/1", "commitOid": "1"}
                answer = {**answer, **commit}
            self.respond(200, answer)

        def do_GET(self):
            self.respond(404, {}, {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def respond(self, status, answer, headers=()):
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("localhost", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}", files
        server.shutdown()


def test_a_push_arrives_whole_and_names_no_path_of_this_machine(tmp_path, monkeypatch, hub):
    address, files = hub
    api = HfApi(endpoint=address, token="hf_none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: api)
    template = ModelCard.from_template(
        transformers.utils.hub.ModelCardData(library_name="transformers"),
        model_description="This is the model card of a 🤗 transformers model that has been pushed "
        "on the Hub. This model card has been automatically generated.",
    )
    monkeypatch.setattr(
        transformers.utils.hub, "create_and_tag_model_card", lambda *a, **k: template
    )
    model = saved(tmp_path)
    model.push_to_hub("someone/experts")
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        (tmp_path / "pushed").mkdir(exist_ok=True)
        (tmp_path / "pushed" / name).write_bytes(content)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "moelora" and "base=" in card.text
    with pytest.raises(ValueError, match="base="):
        load(tmp_path / "pushed")
    again = load(tmp_path / "pushed", base=tmp_path / "its-base")
    assert logits(again).equal(logits(model))
