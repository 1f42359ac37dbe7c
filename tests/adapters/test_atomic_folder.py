"""Folders that are replaced as a whole: what a killed writer leaves, and writers at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moelora.adapters.atomic_folder import replaced_at_once

ROOT = Path(__file__).resolve().parents[2]
# Writes a file into the new folder, says so, and waits to be killed.
WRITER = """
import sys, time
from pathlib import Path
from moelora.adapters.atomic_folder import replaced_at_once
with replaced_at_once(Path(sys.argv[1])) as new:
    (new / "file").write_text("half")
    print("here", flush=True)
    time.sleep(120)
"""


def write(folder: Path, text: str) -> None:
    with replaced_at_once(folder) as new:
        (new / "file").write_text(text)


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p.name != folder.name)


def test_a_writer_leaves_nothing_but_the_folder(tmp_path):
    folder = tmp_path / "out"
    for text in ("one", "two"):
        write(folder, text)
        assert (folder / "file").read_text() == text and not hidden(folder)
    with pytest.raises(OSError, match="disk"), replaced_at_once(folder) as new:
        (new / "file").write_text("three")
        raise OSError("the disk is gone")
    assert (folder / "file").read_text() == "two" and not hidden(folder)


def test_a_living_writer_is_left_alone_and_a_killed_one_s_traces_go_with_the_next(tmp_path):
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, env=environment
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"here\n"
        others = hidden(folder)
        write(folder, "one")
        assert others and hidden(folder) == others
        writer.kill()
        writer.wait()
    assert hidden(folder) == others
    write(folder, "two")
    assert (folder / "file").read_text() == "two" and not hidden(folder)


def test_a_writer_killed_between_its_renames_gives_the_old_folder_back(tmp_path):
    folder = tmp_path / "out"
    write(folder, "old")
    (tmp_path / ".out-0123abcd").mkdir()
    (tmp_path / ".out-0123abcd.lock").touch()
    os.rename(folder, tmp_path / ".out-0123abcd-old")
    with pytest.raises(ValueError), replaced_at_once(folder):
        assert (folder / "file").read_text() == "old"
        raise ValueError
    assert (folder / "file").read_text() == "old" and not hidden(folder)


def test_foreign_names_are_left_alone(tmp_path):
    for name in (".out-notes", ".out-0123abcd", ".outer-0123abcd.lock", "out-0123abcd.lock"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "out"
    before = hidden(folder)
    write(folder, "one")
    assert hidden(folder) == before
    odd = tmp_path / "[o]*?"
    write(odd, "two")
    assert (odd / "file").read_text() == "two"


def test_the_modes_are_those_of_new_files(tmp_path):
    write(tmp_path / "out", "x")
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out" / "file").stat().st_mode == mode
