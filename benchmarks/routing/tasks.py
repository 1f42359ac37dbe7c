"""The tasks that are told apart: read from a folder, or the examples' corpus cut into prompts and
continuations.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from examples.corpus import DOMAINS, Blocks, load_corpus

# A task's answers are a closed set where its training file has no more different ones than this.
MAX_OPTIONS = 10
FIELDS = ("instruction", "output")
Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """One kind of text: rows of instruction, output and perhaps answer, to learn from and to be
    measured on.
    """

    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """The answers of a closed set, or () where there is none or an output does not end with its
        answer.
        """
        rows = self.train + self.test
        if not all(row.get("answer") and row["output"].endswith(row["answer"]) for row in rows):
            return ()
        found = sorted({row["answer"] for row in self.train})
        known = {row["answer"] for row in self.test} <= set(found)
        return tuple(found) if known and 2 <= len(found) <= MAX_OPTIONS else ()

    @property
    def has_answers(self) -> bool:
        """Whether an output can be right or wrong, and not only likely."""
        return all("answer" in row for row in self.test)

    def without_template(self, share: float = 0.9) -> Task:
        """The same task without the words that at least this share of its training prompts have.

        What a template says tells tasks apart at a glance. A prompt that has no other word stays as
        it is.
        """
        prompts = [set(row["instruction"].split()) for row in self.train]
        counts = Counter(word for words in prompts for word in words)
        template = {word for word, count in counts.items() if count >= share * len(prompts)}

        def bare(row: Row) -> Row:
            words = [word for word in row["instruction"].split() if word not in template]
            return {**row, "instruction": " ".join(words) or row["instruction"]}

        return replace(self, train=tuple(map(bare, self.train)), test=tuple(map(bare, self.test)))


def read_tasks(folder: Path, names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each `<folder>/<name>/train.jsonl` and `test.jsonl`.

    Raises:
        ValueError: no such folder or task, or a malformed or empty line, with its file and number.
    """
    if not folder.is_dir():
        raise ValueError(
            f"tasks={str(folder)!r} is no folder; expected one with a folder for each task."
        )
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if unknown := [name for name in names if name not in there]:
        raise ValueError(
            f"{folder} has no task {', '.join(unknown)}. Its tasks are: {', '.join(there)}."
        )
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"names={list(names)}: expected two different tasks at least.")
    return [
        Task(n, read_rows(folder / n / "train.jsonl"), read_rows(folder / n / "test.jsonl"))
        for n in names
    ]


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a file, one JSON object a line.

    Raises:
        ValueError: no such file, no line, or one that is malformed, with its number.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; a task has train.jsonl and test.jsonl.")
    # Not splitlines(), which also breaks lines at characters that may stand inside a JSON string.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError(f"{path} is empty; expected one JSON object a line.")
    return tuple(_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1))


def _row(line: str, place: str) -> Row:
    if not line.strip():
        raise ValueError(f"{place} is empty: remove it, or write a JSON object there.")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error}): {line[:60]!r}.") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{place} is a {type(row).__name__}; expected an object with {', '.join(FIELDS)}."
        )
    for field in (*FIELDS, *(["answer"] if "answer" in row else [])):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"{place}: {field!r} is {row.get(field)!r}; expected text.")
    return {field: row[field] for field in (*FIELDS, "answer") if field in row}


def corpus_tasks(
    tokenizer: PreTrainedTokenizerBase, train: int, test: int, seed: int = 0
) -> list[Task]:
    """The examples' domains as tasks: a block's first three quarters are the prompt, the rest its
    continuation.
    """
    corpus = load_corpus(tokenizer, block_size=64, train_blocks=train, eval_blocks=test, seed=seed)
    return [
        Task(d, _rows(corpus[d][0], tokenizer), _rows(corpus[d][1], tokenizer)) for d in DOMAINS
    ]


def _rows(blocks: Blocks, tokenizer: PreTrainedTokenizerBase) -> tuple[Row, ...]:
    cut = blocks.tokens.shape[1] * 3 // 4
    pairs = [
        (str(tokenizer.decode(ids[:cut])), str(tokenizer.decode(ids[cut:])))
        for ids in blocks.tokens
    ]
    # A run of blanks is a block too, but neither a prompt nor a target.
    return tuple({"instruction": p, "output": t} for p, t in pairs if p.strip() and t.strip())


def drawn(rows: Sequence[Row], count: int, seed: int, part: str) -> list[Row]:
    """`count` of the rows (all, if there are fewer) in an order that `seed` and the name of the
    part draw.
    """
    return random.Random(f"{seed}:{part}").sample(list(rows), min(count, len(rows)))
