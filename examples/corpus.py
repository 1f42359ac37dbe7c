"""Four domains of real text that every machine with Python and torch has, whole files held out.

    python    the standard library's source
    cpp       the C++ headers that torch ships (hand-written ones)
    docs      Python's own language documentation: each topic of `pydoc_data` counts as a file
    licences  the licence texts of the installed packages

Licences repeat each other (a hundred MIT files differ in one line), and so do some sources. So, in
every domain, a file is left out when half of its eight-word runs were in files already taken, and
a held-out block is left out when a fifth of its runs is anywhere in the training files: what is
held out is new text, not a copy with another copyright line.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

SHINGLE_WORDS = 8
MAX_FILE_OVERLAP = 0.5
MAX_BLOCK_OVERLAP = 0.2
MIN_CHARS = 1000
MAX_CHARS = 100_000
MAX_FILES = 48
HELD_OUT_EVERY = 3
SKIPPED_STDLIB = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class TextFile:
    """One whole file: where it came from, and its text."""

    name: str
    text: str


class Blocks(Dataset):
    """Token blocks [num_blocks, block_size] as a dataset for `Trainer`, each with its source.

    `domains` and `sources` name the domain and the file of each block.
    """

    def __init__(self, tokens: torch.Tensor, domains: list[str], sources: list[str]):
        self.tokens = tokens
        self.domains = domains
        self.sources = sources

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.tokens[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def interleave(datasets: list[Blocks]) -> Blocks:
    """Return the blocks of all datasets in turn: one of each, then the second of each, and so on.

    Read in order, each batch of `len(datasets)` rows holds one block of every domain.
    Raises ValueError when the datasets differ in length.
    """
    if len({len(data) for data in datasets}) != 1:
        raise ValueError(f"datasets of equal length expected, got {[len(d) for d in datasets]}")
    rows = [(data, i) for i in range(len(datasets[0])) for data in datasets]
    return Blocks(
        torch.stack([data.tokens[i] for data, i in rows]),
        [data.domains[i] for data, i in rows],
        [data.sources[i] for data, i in rows],
    )


def _read(root: Path, paths: Iterator[Path]) -> Iterator[TextFile]:
    """Yield the readable UTF-8 files of fair size among `paths`, named relative to `root`."""
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if MIN_CHARS <= len(text) <= MAX_CHARS:
            yield TextFile(path.relative_to(root).as_posix(), text)


def _python_files(seed: int) -> Iterator[TextFile]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p for p in root.rglob("*.py") if not SKIPPED_STDLIB & set(p.relative_to(root).parts))
    return _read(root, iter(_shuffled(paths, seed)))


def _cpp_files(seed: int) -> Iterator[TextFile]:
    spec = find_spec("torch")
    root = Path(next(iter(spec.submodule_search_locations or []))) / "include"
    # ATen/ops holds thousands of generated headers that all look alike.
    paths = (p for p in root.rglob("*.h") if "ops" not in p.relative_to(root).parts)
    return _read(root, iter(_shuffled(paths, seed)))


def _docs_files(seed: int) -> Iterator[TextFile]:
    from pydoc_data.topics import topics

    for name in _shuffled(map(Path, topics), seed):
        if MIN_CHARS <= len(topics[str(name)]) <= MAX_CHARS:
            yield TextFile(str(name), topics[str(name)])


def _licence_files(seed: int) -> Iterator[TextFile]:
    root = Path(sysconfig.get_path("purelib"))
    files = root.glob("*.dist-info/**/*")
    paths = (p for p in files if re.match(r"LICEN[CS]E|COPYING", p.name, re.I) and p.is_file())
    # Smallest first, so that single licences are taken before the bundles that quote them all.
    return iter(sorted(_read(root, paths), key=lambda file: (len(file.text), file.name)))


DOMAINS: dict[str, Callable[[int], Iterator[TextFile]]] = {
    "python": _python_files,
    "cpp": _cpp_files,
    "docs": _docs_files,
    "licences": _licence_files,
}


def _rank(name: str, seed: int) -> str:
    """Return a sort key that looks random and is the same on every machine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _shuffled(paths: Iterator[Path], seed: int) -> list[Path]:
    # By the last three parts: the roots above them differ from machine to machine.
    return sorted(paths, key=lambda path: _rank("/".join(path.parts[-3:]), seed))


def shingles(text: str) -> set[int]:
    """Return the hashes of all runs of eight words, letters and digits alone, in lower case."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(last)}


def overlap(runs: set[int], others: set[int]) -> float:
    """Return the share of `runs` that is in `others` too."""
    return len(runs & others) / len(runs)


def select_files(domain: str, seed: int) -> tuple[list[TextFile], list[TextFile]]:
    """Return the domain's training files and held-out files: no file twice, none a near-copy.

    Raises RuntimeError when the machine has fewer than three different files of that domain.
    """
    kept: list[TextFile] = []
    seen: set[int] = set()
    for file in DOMAINS[domain](seed):
        runs = shingles(file.text)
        if overlap(runs, seen) <= MAX_FILE_OVERLAP:
            kept.append(file)
            seen |= runs
        if len(kept) == MAX_FILES:
            break
    if len(kept) < HELD_OUT_EVERY:
        raise RuntimeError(
            f"domain {domain!r} has {len(kept)} different files on this machine; "
            f"at least {HELD_OUT_EVERY} expected"
        )
    # By content: the names of licence files hold the packages' versions.
    kept.sort(key=lambda file: _rank(file.text, seed))
    held_out = kept[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [file for file in kept if file not in held_out], held_out


def _blocks_of(
    file: TextFile, tokenizer: PreTrainedTokenizerBase, block_size: int, known: set[int]
) -> Iterator[torch.Tensor]:
    """Yield the file's blocks [block_size] in a mixed order, without those that `known` holds."""
    ids = torch.tensor(tokenizer(file.text, verbose=False)["input_ids"])
    blocks = list(ids.split(block_size))
    if len(blocks[-1]) < block_size:
        blocks.pop()
    # Mixed, since the tops of files (imports, copyright) are the part in which they are alike.
    for i in sorted(range(len(blocks)), key=lambda i: _rank(f"{file.name}:{i}", block_size)):
        if overlap(shingles(tokenizer.decode(blocks[i])), known) <= MAX_BLOCK_OVERLAP:
            yield blocks[i]


def take_blocks(
    files: list[TextFile],
    domain: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_blocks: int,
    known: set[int],
) -> Blocks:
    """Return `num_blocks` blocks: one of each file in turn, then a second one of each, and so on.

    Blocks that repeat the runs in `known` are left out. Raises RuntimeError when the files hold
    fewer blocks.
    """
    streams = [(_blocks_of(file, tokenizer, block_size, known), file.name) for file in files]
    tokens: list[torch.Tensor] = []
    sources: list[str] = []
    while streams and len(tokens) < num_blocks:
        stream, name = streams.pop(0)
        block = next(stream, None)
        if block is not None:
            tokens.append(block)
            sources.append(name)
            streams.append((stream, name))
    if len(tokens) < num_blocks:
        raise RuntimeError(
            f"domain {domain!r} holds {len(tokens)} blocks of {block_size} tokens in "
            f"{len(files)} files; {num_blocks} asked for; remedy: fewer or shorter blocks"
        )
    return Blocks(torch.stack(tokens), [domain] * num_blocks, sources)


def load_corpus(
    tokenizer: PreTrainedTokenizerBase,
    block_size: int = 64,
    train_blocks: int = 48,
    eval_blocks: int = 12,
    seed: int = 0,
) -> dict[str, tuple[Blocks, Blocks]]:
    """Return, for each domain, `train_blocks` training and `eval_blocks` held-out token blocks.

    Raises RuntimeError when the machine has too little text of a domain.
    """
    corpus = {}
    for domain in DOMAINS:
        train, held_out = select_files(domain, seed)
        known = set().union(*(shingles(file.text) for file in train))
        sizes = (tokenizer, block_size)
        corpus[domain] = (
            take_blocks(train, domain, *sizes, train_blocks, known=set()),
            take_blocks(held_out, domain, *sizes, eval_blocks, known=known),
        )
    return corpus
