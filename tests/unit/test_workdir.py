"""One run per workdir, and files that are whole or not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.workdir.files import write_atomically
from train.workdir.lock import WorkdirLock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
sys.path[0] = {root!r}
from pathlib import Path
from train.workdir.lock import WorkdirLock
lock = WorkdirLock(Path({workdir!r}))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_workdir_is_one_run_s_until_its_process_ends_however_that_is(tmp_path):
    workdir = tmp_path / "run"
    code = HOLD.format(root=str(ROOT), workdir=str(workdir))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        held = f"in use by process {other.pid} on .*another --workdir"
        with pytest.raises(ValueError, match=held):
            WorkdirLock(workdir)
        other.kill()
    lock = WorkdirLock(workdir)
    assert f"process {os.getpid()} on" in (workdir / ".lock").read_text()
    lock.check()
    lock.release()
    WorkdirLock(workdir).release()


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_workdir_that_is_gone_is_noticed(tmp_path, replaced):
    lock = WorkdirLock(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    if replaced:
        WorkdirLock(tmp_path / "run").release()
    with pytest.raises(OSError, match="was deleted or replaced"):
        lock.check()
    lock.release()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, 100_000 * "new" + "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new")
    assert path.read_text() == "new"
