"""Runs steps as subprocesses under limits of time; whatever ends one is a row, and the rest goes
on. It imports nothing that could die.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.kernels.part import Row, read, write
from benchmarks.kernels.steps import Step

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.1
# Between writes of the results while a step runs.
SAVE_EVERY = 2.0
# For the trace that a process writes when it is told to abort.
LAST_WORDS = 1.0
RESTARTS = 6
# A step that ends by itself so much before its limit is not killed at it.
GRACE = 3.0


@dataclass
class Child:
    """One process of a step: its share of the units, and what it wrote."""

    step: Step
    shard: int
    shards: int
    part: Path
    deadline: float
    process: subprocess.Popen | None = None
    size: int = 0
    started_at: int = 0
    grew: float = 0.0
    restarts: int = 0


@dataclass
class Runner:
    """Runs steps one after the other; `rows` is all that they found, `seconds` how long each took.

    Args:
        out: where steps may leave files of their own.
        work: where their part files lie.
        log: takes what they print.
        deadline: when all must be over, in seconds of the epoch.
        jobs: the most processes at once.
        tiny: Triton's interpreter on small shapes in place of a GPU.
        save: is called when there are new rows.
    """

    out: Path
    work: Path
    log: IO[bytes]
    deadline: float
    jobs: int
    tiny: bool
    save: Callable[[], None]
    parts: list[tuple[str, Path]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    children: list[Child] = field(default_factory=list)
    saved: float = 0.0

    def rows(self) -> list[Row]:
        """Everything that was found so far, in the order of the steps."""
        return [{"step": name, **row} for name, part in self.parts for row in read(part).rows]

    def run(self, steps: Iterable[Step]) -> None:
        """Every step; those for which no time is left say so."""
        for step in steps:
            start = time.time()
            if start > self.deadline:
                self._note(self._new_part(step), {"not run": "no time was left for this step"})
            else:
                self._run_step(step, min(self.deadline, start + step.limit))
            self.seconds[step.name] = round(time.time() - start, 1)
            print(f"{step.name}: {self.seconds[step.name]} s", flush=True)
            self.save()

    def stop(self) -> None:
        """End every process that is still there."""
        for child in self.children:
            self._kill(child)
        self.children.clear()

    def _run_step(self, step: Step, deadline: float) -> None:
        shards = min(step.processes, self.jobs)
        for shard in range(shards):
            child = Child(step, shard, shards, self._new_part(step, shard), deadline)
            self.children.append(child)
            self._start(child)
        while self.children:
            time.sleep(POLL)
            for child in list(self.children):
                if self._is_over(child):
                    self.children.remove(child)
            if time.time() > self.saved + SAVE_EVERY:
                self.save()
                self.saved = time.time()

    def _new_part(self, step: Step, shard: int = 0) -> Path:
        part = self.work / f"{len(self.parts)}-{shard}.jsonl"
        self.parts.append((step.name, part))
        return part

    def _start(self, child: Child) -> None:
        words = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.kernels.step"]
        words += [child.step.name, "--part", str(child.part), "--out", str(self.out)]
        words += ["--deadline", str(child.deadline - GRACE), "--parent", str(os.getpid())]
        words += ["--shard", str(child.shard), "--shards", str(child.shards)]
        words += ["--tiny"] if self.tiny else []
        # A group of its own, so that its compilers end with it.
        child.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(self.tiny),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        child.size = child.part.stat().st_size if child.part.is_file() else 0
        child.started_at = child.size
        child.grew = time.time()

    def _is_over(self, child: Child) -> bool:
        """Whether the child has ended for good; one that died is begun again without what it died
        of.
        """
        assert child.process is not None
        status = child.process.poll()
        now = time.time()
        size = child.part.stat().st_size if child.part.is_file() else 0
        if size != child.size:
            child.size = size
            child.grew = now
        if status == 0:
            return True
        if status is not None:
            return self._after(child, ending_of(status))
        if now > child.deadline:
            return self._after(child, "killed: the step's time was over", again=False)
        # Before its first line it imports, and on a busy machine that lasts.
        if size > child.started_at and now > child.grew + child.step.stall:
            return self._after(child, f"killed: nothing came for {child.step.stall:.0f} s")
        return False

    def _after(self, child: Child, why: str, again: bool = True) -> bool:
        """Write what the child died of; begin it again where there is more to do."""
        self._kill(child)
        record = read(child.part)
        why = f"{why} ({record.last})" if record.last else why
        if record.current is None:
            self._note(child.part, {"case": "the step itself", "failed": why})
            return True
        unit, candidate = record.current
        named = {"candidate": candidate} if candidate else {}
        self._note(child.part, {"case": unit, **named, "failed": why})
        write(child.part, {"died": unit, "candidate": candidate})
        child.restarts += 1
        if not again or child.restarts > RESTARTS:
            return True
        self._start(child)
        return False

    def _note(self, part: Path, row: Row) -> None:
        write(part, {"row": row})

    def _kill(self, child: Child) -> None:
        process = child.process
        assert process is not None
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ending_of(status: int) -> str:
    """How a process ended, in words."""
    if status < 0:
        return f"died: {signal.Signals(-status).name}"
    return f"died: exit status {status}"


def environment(tiny: bool) -> dict[str, str]:
    """The variables of a step: our packages can be imported, and nothing is asked of a network."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    known = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *known])
    if tiny:
        variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return variables
