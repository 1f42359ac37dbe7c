"""Several processes at one folder: every save succeeds, the last one stays, and it always loads."""

import multiprocessing
import os
import signal
import time

import pytest
from checkpoint.stored import WEIGHTS, contents, load, logits, mixture_on, same, saved, write_base
from core.mixtures import activate

from moelora import MoeLoraForCausalLM
from moelora.checkpoint.atomic import atomic_files, atomic_folder

SAVES = 25
# The models are made once; a forked process has them.
PROCESSES = multiprocessing.get_context("fork")


def _save_often(model, folder, save_base):
    for _ in range(SAVES):
        model.save_pretrained(folder, save_base=save_base)


@pytest.mark.parametrize("save_base", [False, True])
@pytest.mark.parametrize("through_auto", [False, True])
def test_two_save_while_a_third_loads(tmp_path, save_base, through_auto):
    base = write_base(tmp_path / "base")
    folder = tmp_path / "experts"
    # The Auto class reads config.json before anything of ours runs, perhaps of the other model.
    other = mixture_on(base, routing_level="sequence", r=5)
    models = [mixture_on(base), activate(other, seed=7)]
    expected = [logits(model) for model in models]
    loader = load if through_auto else MoeLoraForCausalLM.from_pretrained
    models[0].save_pretrained(folder, save_base=save_base)
    savers = [
        PROCESSES.Process(target=_save_often, args=(model, folder, save_base)) for model in models
    ]
    for saver in savers:
        saver.start()
    loads = 0
    while any(saver.is_alive() for saver in savers):
        found = logits(loader(folder))
        assert any((found == those).all() for those in expected)
        loads += 1
    for saver in savers:
        saver.join(60)
    assert [saver.exitcode for saver in savers] == [0, 0] and loads > 2
    assert {p.name for p in folder.iterdir() if not p.name.startswith("base-")} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "modeling_moelora.py",
        WEIGHTS,
    }
    models[1].save_pretrained(folder, save_base=save_base)
    assert same(load(folder), models[1])


def _write_slowly(folder, started):
    with atomic_files(folder, commit="c") as staging:
        (staging / "c").write_text("slow")
        started.set()
        time.sleep(60)


def test_a_killed_writer_blocks_nobody_and_leaves_nothing(tmp_path):
    model = saved(tmp_path)
    folder = tmp_path / "experts"
    before = contents(folder).keys()
    started = PROCESSES.Event()
    writer = PROCESSES.Process(target=_write_slowly, args=(folder, started))
    writer.start()
    assert started.wait(30)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(30)
    assert contents(folder).keys() > before
    model.save_pretrained(folder)
    assert contents(folder).keys() == before and same(load(folder), model)


def test_a_living_writer_is_waited_for(tmp_path):
    order = PROCESSES.Queue()
    started = PROCESSES.Event()

    def write():
        with atomic_files(tmp_path, commit="b") as staging:
            started.set()
            time.sleep(0.5)
            (staging / "a").write_text("first")
            (staging / "b").write_text("first")
            order.put("first")

    writer = PROCESSES.Process(target=write)
    writer.start()
    assert started.wait(30)
    with atomic_files(tmp_path, commit="b") as staging:
        order.put("second")
        (staging / "b").write_text("second")
    writer.join(30)
    assert [order.get(timeout=5), order.get(timeout=5)] == ["first", "second"]
    assert contents(tmp_path) == {"a": b"first", "b": b"second"}


def test_files_appear_in_order_and_not_at_all_after_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    with atomic_files(folder, commit="b") as staging:
        (staging / "inside").mkdir()
        for name in ("a", "b", "c", "inside/d"):
            (staging / name).write_text("one")
        assert contents(folder).keys() == {
            f"{staging.name}/{n}" for n in ("a", "b", "c", "inside/d")
        } | {".moelora.lock"}
    assert order == ["inside", "a", "c", "b"]
    before = contents(folder)
    with pytest.raises(KeyError), atomic_files(folder, commit="b") as staging:
        (staging / "b").write_text("two")
        raise KeyError
    assert contents(folder) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, there):
    target = tmp_path / "parent" / "adapter"
    if there:
        target.mkdir(parents=True)
        (target / "old").write_text("old")
        with pytest.raises(FileExistsError, match="is there already"), atomic_folder(target):
            pass
    before = contents(tmp_path)
    with pytest.raises(KeyError), atomic_folder(target, replace=True) as staging:
        (staging / "new").write_text("half")
        raise KeyError
    assert contents(tmp_path) == before
    with atomic_folder(target, replace=there) as staging:
        (staging / "new").write_text("whole")
    assert contents(tmp_path) == {"parent/adapter/new": b"whole"}
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("moved_aside", [False, True])
def test_what_a_killed_writer_left_beside_a_folder_is_mended(tmp_path, moved_aside):
    target = tmp_path / "adapter"
    with atomic_folder(target) as staging:
        (staging / "old").write_text("old")

    def write():
        with atomic_folder(target, replace=True) as staging:
            (staging / "new").write_text("half")
            if moved_aside:
                os.rename(target, target.with_name(".moelora-adapter.old"))
            os.kill(os.getpid(), signal.SIGKILL)

    writer = PROCESSES.Process(target=write)
    writer.start()
    writer.join(30)
    assert len(list(tmp_path.iterdir())) > 1
    with pytest.raises(FileExistsError), atomic_folder(target):
        pass
    assert contents(tmp_path) == {"adapter/old": b"old"}
