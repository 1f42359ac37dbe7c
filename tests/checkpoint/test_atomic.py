"""A save that is cut off, anywhere and for any reason, leaves a whole checkpoint, the old or the
new one.
"""

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
from bases import causal_base
from checkpoint.stored import WEIGHTS, contents, load, logits, mixture_on, saved
from transformers import PreTrainedModel

import moelora.checkpoint.load

# What Python reports (sys.audit) before it changes anything on disk.
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
TIDY = {"README.md", "config.json", "generation_config.json", "modeling_moelora.py", WEIGHTS}


def in_child(action) -> int:
    """Run `action` in a fork of this process; its exit status, or minus what signal killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    """What a power cut, the out-of-memory killer or a job's time limit does: no cleanup runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_write(number: int, folder: Path) -> None:
    """Let this process die before its `number`th change below `folder`."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event not in WRITES or not str(args[0]).startswith(str(folder)):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        seen += 1
        if seen == number:
            die()

    sys.addaudithook(hook)


@pytest.mark.parametrize("save_base", [False, True])
def test_a_kill_before_any_write_leaves_the_old_or_the_new_checkpoint(tmp_path, save_base):
    old = mixture_on(causal_base())
    new = mixture_on(causal_base(seed=7), routing_level="sequence")
    pristine = tmp_path / "pristine"
    folder = tmp_path / "experts"
    old.save_pretrained(pristine, save_base=True)
    expected = {"old": logits(old), "new": logits(new)}
    outcomes = []
    for number in range(1, 80):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)

        def save(number=number):
            kill_at_write(number, folder)
            new.save_pretrained(folder, save_base=save_base)

        status = in_child(save)
        given = {} if save_base or not _is_new(folder) else {"base": causal_base(seed=7)}
        found = logits(load(folder, **given))
        outcomes.append(next(name for name, those in expected.items() if (those == found).all()))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        new.save_pretrained(folder, save_base=save_base)
        left = {p.name for p in folder.iterdir() if not p.name.startswith("base-")}
        # The old one's base stays: checkpoints elsewhere may refer to it.
        assert left == TIDY and len(list(folder.glob("base-*"))) == 1 + save_base
    assert outcomes == sorted(outcomes, reverse=True), "once the new one loads, it stays"
    assert outcomes.count("old") > 5 and outcomes.count("new") > 2, outcomes


def test_a_first_save_that_is_killed_leaves_a_whole_checkpoint_or_none(tmp_path):
    model = mixture_on(causal_base())
    folder = tmp_path / "experts"
    whole = []
    for number in range(1, 80):
        shutil.rmtree(folder, ignore_errors=True)

        def save(number=number):
            kill_at_write(number, folder)
            model.save_pretrained(folder)

        status = in_child(save)
        whole.append((folder / WEIGHTS).exists())
        if whole[-1]:
            assert (logits(load(folder, base=causal_base())) == logits(model)).all()
        elif (folder / "config.json").exists():
            with pytest.raises(ValueError, match=f"holds no {WEIGHTS}"):
                load(folder)
        if status == 0:
            break
    assert whole == sorted(whole) and whole.count(True) > 1 and whole.count(False) > 5


def _is_new(folder: Path) -> bool:
    return moelora.checkpoint.load.read(folder / WEIGHTS)[1].routing_level == "sequence"


def _half_a_file(tensors, path, metadata=None):
    whole = safetensors.torch.save(tensors, metadata=metadata)
    Path(path).write_bytes(whole[: len(whole) // 2])
    die()


@pytest.mark.parametrize("stage", ["half of the experts", "half of the base"])
def test_a_kill_in_the_middle_of_a_file_leaves_the_old_checkpoint(tmp_path, monkeypatch, stage):
    old = saved(tmp_path)
    folder = tmp_path / "experts"
    new = mixture_on(causal_base(seed=7))
    before = contents(folder)

    def half_a_base(self, where, **kwargs):
        Path(where).mkdir()
        _half_a_file({"a": logits(old)}, Path(where) / WEIGHTS)

    def save():
        if stage == "half of the base":
            monkeypatch.setattr(PreTrainedModel, "save_pretrained", half_a_base)
        else:
            monkeypatch.setattr(safetensors.torch, "save_file", _half_a_file)
        new.save_pretrained(folder, save_base=True)

    assert in_child(save) == -signal.SIGKILL
    after = contents(folder)
    assert len(after) > len(before), (
        "nothing was left behind: the kill came too early to test anything"
    )
    assert {name: after[name] for name in before} == before
    assert (logits(load(folder)) == logits(old)).all()


@pytest.mark.parametrize("save_base", [False, True])
def test_a_full_disk_is_an_oserror_that_names_the_folder_and_changes_nothing(tmp_path, save_base):
    saved(tmp_path)
    folder = tmp_path / "experts"
    new = mixture_on(causal_base(seed=7), r=64 if not save_base else 1)
    before = contents(folder)

    def save():
        # A real refusal by the kernel: the limit on a file's size, below the experts' or the
        # base's.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(OSError, match=f"checkpoint in {folder} could not be written"):
            new.save_pretrained(folder, save_base=save_base)

    assert in_child(save) == 0
    assert contents(folder) == before


def test_a_folder_that_cannot_be_written_is_an_oserror_that_names_it(tmp_path):
    model = saved(tmp_path)
    a_file = tmp_path / "file"
    a_file.write_text("mine")
    for folder in (a_file, a_file / "below", Path("/proc/moelora")):
        with pytest.raises(OSError, match=f"checkpoint in {folder} could not be written"):
            model.save_pretrained(folder)
    assert a_file.read_text() == "mine"


def test_an_error_of_the_base_while_saving_leaves_folder_and_model_as_they_were(
    tmp_path, monkeypatch
):
    model = saved(tmp_path)
    folder = tmp_path / "experts"
    before = contents(folder)
    expected = logits(model)

    def fail(self, where, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="no"):
        model.save_pretrained(folder, save_base=True)
    assert contents(folder) == before
    assert (logits(model) == expected).all()
