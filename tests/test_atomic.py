"""Folders that are replaced: a process that is killed at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from leyden.atomic import remove_unfinished, replacing

KILLED = """
import os, shutil, sys
from pathlib import Path
from leyden.atomic import replacing
moments = int(sys.argv[2])
def counting(function):
    def wrapped(*args, **kwargs):
        global moments
        if moments == 0:
            os._exit(9)  # as a kill: nothing is tidied up
        moments -= 1
        return function(*args, **kwargs)
    return wrapped
os.replace, shutil.rmtree = counting(os.replace), counting(shutil.rmtree)
with replacing(Path(sys.argv[1])) as new:
    new.mkdir()
    (new / "weights").write_text("new")
os._exit(0)
"""


@pytest.mark.parametrize("again", [True, False], ids=["written again", "resumed"])
def test_a_killed_process_loses_neither_folder(tmp_path: Path, again: bool) -> None:
    codes, kept = [], []
    for moment in range(4):
        run = tmp_path / str(moment)
        model = run / "export"
        model.mkdir(parents=True)
        (model / "weights").write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(moment)], check=False, timeout=60)
        codes.append(done.returncode)
        if again:
            with pytest.raises(RuntimeError), replacing(model):
                raise RuntimeError  # something goes wrong: what is there must stay
        remove_unfinished(run)
        kept.append((model / "weights").read_text())
        assert [path.name for path in run.iterdir()] == ["export"]
    assert codes == [9, 9, 9, 0], "before each rename, before the old one is removed, and at the end"
    assert kept == ["old", "old", "new", "new"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as new:
        new.mkdir()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
