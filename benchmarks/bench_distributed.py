"""Two processes against one on CPU: the time of a DDP step at one global batch, in turns, and the
peak memory of an FSDP2 process against one that holds everything.

python -m benchmarks.bench_distributed
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.candidates import Candidate, build, load_base
from benchmarks.harness import cpu_parser, in_turns, save_and_print

WORLD = 2
FEW = Candidate("E=8 r=16 K=2", "mixture", r=16, experts=8, top_k=2)
MANY = Candidate("E=256 r=8 K=2", "mixture", r=8, experts=256, top_k=2)
DDP = "DDP, 2 processes of 1 thread"
ALONE = "1 process of 1 thread"
THREADED = "1 process of 2 threads"
TIME_TARGET = 0.75
SHARDED = "FSDP2 by layer, 2 processes"
WHOLE = "unsharded"
MEMORY_TARGET = 0.6


@dataclass(frozen=True)
class Job:
    """What one process of a team is to do.

    Attributes:
        candidate: what it trains.
        engine: "ddp", "fsdp2" or none.
        rank, world: of its group.
        store: the URL at which its processes meet.
        threads: that torch uses.
        base, layers, batch, length: of the model and of this process's part of a step's tokens.
    """

    candidate: Candidate
    engine: str | None
    rank: int
    world: int
    store: str
    threads: int
    base: str
    layers: int
    batch: int
    length: int


@dataclass
class Team:
    """The processes of one candidate, which wait while others take their turn."""

    processes: list[Any] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)
    replies: list[list[dict[str, float]]] = field(default_factory=list)
    folder: TemporaryDirectory[str] = field(default_factory=TemporaryDirectory)

    def step(self) -> None:
        """Have every process make one step, and note what each says of it."""
        for pipe in self.pipes:
            pipe.send("step")
        self.replies.append([pipe.recv() for pipe in self.pipes])

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send("end")
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def team(
    candidate: Candidate, engine: str | None, threads: int, layers: int, batch: int, settings: Any
) -> Team:
    """Processes that are ready to train `candidate`.

    Args:
        candidate: the mixture.
        engine: of two processes, or None for one process.
        threads: of each.
        layers: of the base.
        batch: rows of each process in a step.
        settings: the command line's.
    """
    # One process imports everything, and all others are its forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.candidates"])
    made = Team()
    store = f"file://{made.folder.name}/store"
    world = 1 if engine is None else WORLD
    model = (settings.base, layers, batch, settings.length)
    for rank in range(world):
        ours, theirs = context.Pipe()
        job = Job(candidate, engine, rank, world, store, threads, *model)
        process = context.Process(target=work, args=(theirs, job), daemon=True)
        process.start()
        # The process's end is closed with it, so that its death is an error here.
        theirs.close()
        made.processes.append(process)
        made.pipes.append(ours)
    for pipe in made.pipes:
        pipe.recv()
    return made


def work(pipe: Connection, job: Job) -> None:
    """A process of a team: say "ready", then make a step whenever told to."""
    torch.set_num_threads(job.threads)
    if job.world > 1:
        dist.init_process_group("gloo", job.store, rank=job.rank, world_size=job.world)
    before = _status_mib("VmRSS")
    step = training_step(job)
    # From here on, so that making the model is not counted; what it freed goes back first.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.process_time()
        step()
        peak = _status_mib("VmHWM")
        spent = time.process_time() - start
        pipe.send({"cpu": spent, "peak": peak, "own": peak - before})
    if job.world > 1:
        dist.destroy_process_group()


def training_step(job: Job) -> Callable[[], None]:
    """A step of AdamW on this process's random tokens: forward, backward, update."""
    model: Any = build(job.candidate, load_base(job.base, job.layers)).train()
    vocabulary = model.config.vocab_size
    if job.engine == "fsdp2":
        mesh = init_device_mesh("cpu", (job.world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif job.engine == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    draw = torch.Generator().manual_seed(job.rank)
    ids = torch.randint(0, vocabulary, (job.batch, job.length), generator=draw)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _status_mib(line: str) -> float:
    """A line of Linux's account of this process, in MiB."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.partition(f"{line}:")[2].split()[0]) / 1024


def measure_time(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step of the same tokens, and how many of each process's own work."""
    teams = {
        ALONE: team(FEW, None, 1, settings.layers, settings.batch, settings),
        THREADED: team(FEW, None, 2, settings.layers, settings.batch, settings),
        DDP: team(FEW, "ddp", 1, settings.layers, settings.batch // WORLD, settings),
    }
    timings = in_turns({name: own.step for name, own in teams.items()}, settings.rounds)
    cpu = {
        name: [max(r["cpu"] for r in each) for each in own.replies[1:]]
        for name, own in teams.items()
    }
    for own in teams.values():
        own.close()
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "seconds a step": timings.median(name),
            "CPU seconds of a process": statistics.median(cpu[name]),
        }
        for name in teams
    ]
    for over, target in ((ALONE, TIME_TARGET), (THREADED, None)):
        ratio, low, high = timings.ratio(DDP, over)
        row = {"what": f"time: {DDP} / {over}", "ratio": ratio, "min": low, "max": high}
        rows.append(row if target is None else row | {"target": target})
    shares = [a / b for a, b in zip(cpu[DDP], cpu[ALONE], strict=True)]
    work_row = {"what": f"work of a process: {DDP} / {ALONE}", "ratio": statistics.median(shares)}
    return [*rows, work_row | {"min": min(shares), "max": max(shares)}]


def measure_memory(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """The peak of a process that trains many experts on a row a step, whole and beyond what it had
    before it made the model.
    """
    peaks = {}
    for name, engine in ((WHOLE, None), (SHARDED, "fsdp2")):
        own = team(MANY, engine, 1, settings.memory_layers, 1, settings)
        for _ in range(2):
            own.step()
        own.close()
        peaks[name] = own.replies[-1]
    rows: list[dict[str, Any]] = []
    for key, what in (("own", "model's own peak"), ("peak", "whole process's peak")):
        values = {name: max(reply[key] for reply in each) for name, each in peaks.items()}
        rows += [{"what": f"{what}: {name}", "MiB": value} for name, value in values.items()]
        ratio = values[SHARDED] / values[WHOLE]
        row = {"what": f"{what}: {SHARDED} / {WHOLE}", "ratio": ratio}
        rows.append(row | {"target": MEMORY_TARGET} if key == "own" else row)
    return rows


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    # Memory is about the experts: of all layers, since what two gathered ones take is constant.
    parser = cpu_parser(__doc__, rounds=7, batch=8, length=128, memory_layers=30)
    parser.add_argument("--only", choices=["time", "memory"], help="measure one of them")
    settings = parser.parse_args(words)
    rows: list[dict[str, Any]] = []
    if settings.only != "memory":
        rows += measure_time(settings)
    if settings.only != "time":
        rows += measure_memory(settings)
    save_and_print("distributed_cpu", settings, rows)


if __name__ == "__main__":
    main()
