"""A workdir in a bucket: one run at a time, and whole whenever the run is killed."""

import shutil
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from paravt_jax import remote
from train.workdir import lease
from train.workdir.lease import Lease
from train.workdir.mirror import CHECKPOINTS, WHOLE, Mirror

URL = "memory://bucket/runs/one"


class Killed(BaseException):
    """The process is gone: nothing of it is written from here on."""


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setitem(remote.PACKAGES, "memory", "fsspec")
    monkeypatch.setenv(lease.SECONDS, "0.4")
    there = fsspec.filesystem("memory")
    there.store.clear()
    yield there
    there.store.clear()


def names(store) -> set[str]:
    return {path.removeprefix("/bucket/runs/one/") for path in store.find(URL)}


def write(mirror: Mirror, step: int) -> None:
    """What a run has written when it saves a step."""
    (mirror.folder / "config.json").write_text("{}")
    with (mirror.folder / "metrics.jsonl").open("a") as file:
        file.write(f"{step - 1}\n")
    (mirror.folder / "rollouts").mkdir(exist_ok=True)
    (mirror.folder / "rollouts" / f"{step}.jsonl").write_text(str(step))
    folder = mirror.folder / CHECKPOINTS / str(step)
    for part in ("params", "meta"):
        (folder / part).mkdir(parents=True)
        (folder / part / "data").write_text(f"{part} {step}")
        (folder / part / WHOLE).write_text("what Orbax writes on disks, too")
    (folder / WHOLE).write_text("the same")


def test_a_run_is_sent_and_another_one_goes_on_with_it(store):
    mirror = Mirror(URL)
    with mirror.claimed():
        assert not mirror.saved
        write(mirror, 1)
        mirror.begin_checkpoint(1)
        mirror.wait()
        assert mirror.saved and "checkpoints/1/commit_success.txt" in names(store)
        (mirror.folder / "hf").mkdir()
        (mirror.folder / "hf" / "model").write_text("weights")
        (mirror.folder / ".hidden.part").write_text("half")
    assert names(store) == {
        *("config.json", "metrics.jsonl", "rollouts/1.jsonl", "hf/model"),
        *(
            f"checkpoints/1/{part}/{name}"
            for part in ("params", "meta")
            for name in ("data", WHOLE)
        ),
        f"checkpoints/1/{WHOLE}",
    }
    assert not mirror.folder.exists()
    store.pipe_file(f"{URL}/checkpoints/2/params/data", b"half")
    store.pipe_file(f"{URL}/checkpoints/2/params/{WHOLE}", b"that of an item")
    again = Mirror(URL)
    assert [path.name for path in again.folder.iterdir()] == ["config.json"]
    with again.claimed():
        here = {p.relative_to(again.folder).as_posix() for p in again.folder.rglob("*")}
        assert {"metrics.jsonl", "rollouts/1.jsonl", "checkpoints/1/params/data"} <= here
        assert not here & {"hf", "checkpoints/2"}
        (again.folder / "rollouts" / "1.jsonl").unlink()
        write(again, 2)
        (again.folder / CHECKPOINTS / "1").rename(again.folder / "set_aside")
        again.begin_checkpoint(2)
    kept = names(store)
    assert {"checkpoints/2/commit_success.txt", "hf/model", "rollouts/2.jsonl"} <= kept
    assert not {name for name in kept if name.startswith("checkpoints/1")}
    assert "rollouts/1.jsonl" not in kept
    assert store.cat_file(f"{URL}/metrics.jsonl") == b"0\n1\n"


def writes(monkeypatch, most: int | None) -> list[int]:
    """The process dies before its `most`-th write to the store; how many it made."""
    made = [0]
    for name in ("pipe_file", "put_file", "rm_file", "rm"):
        own = getattr(MemoryFileSystem, name)

        def counted(*arguments, own=own, **more):
            if most is not None and made[0] >= most:
                raise Killed
            made[0] += 1
            return own(*arguments, **more)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    return made


def run_on(steps: range) -> None:
    mirror = Mirror(URL)
    with mirror.claimed():
        for step in steps:
            write(mirror, step)
            shutil.rmtree(mirror.folder / CHECKPOINTS / str(step - 2), ignore_errors=True)
            mirror.begin_checkpoint(step)
            mirror.wait()


def test_killed_before_any_write_a_whole_checkpoint_and_all_before_it_are_there(store, monkeypatch):
    monkeypatch.setattr(lease.Lease, "__init__", lambda self, url: None)
    monkeypatch.setattr(lease.Lease, "lost", False, raising=False)
    monkeypatch.setattr(lease.Lease, "release", lambda self: None)
    run_on(range(1, 3))
    before = dict(store.store)
    with monkeypatch.context() as patched:
        made = writes(patched, None)
        run_on(range(3, 4))
    assert made[0] == 14, "three files, four of a checkpoint, its mark, and those of an old one"
    found = set()
    for most in range(made[0]):
        store.store.clear()
        store.store.update(before)
        with monkeypatch.context() as patched:
            writes(patched, most)
            with pytest.raises(Killed):
                run_on(range(3, 4))
        mirror = Mirror(URL)
        with mirror.claimed():
            steps = sorted(int(path.name) for path in (mirror.folder / CHECKPOINTS).iterdir())
            for step in steps:
                for part in ("params", "meta"):
                    data = mirror.folder / CHECKPOINTS / str(step) / part / "data"
                    assert data.read_text() == f"{part} {step}"
            lines = (mirror.folder / "metrics.jsonl").read_text().splitlines()
            assert lines[: steps[-1]] == [str(number) for number in range(steps[-1])]
            found.add(steps[-1])
    assert found == {2, 3}


class Dead(Lease):
    """That of a process that was killed: nobody renews it."""

    def _keep(self) -> None:
        pass


def test_a_lease_is_one_run_s(store, monkeypatch):
    first = Lease(URL)
    with pytest.raises(ValueError, match=r"--workdir memory://.* in use by process \d+ on "):
        Lease(URL)
    first.release()
    naps, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: naps.append(seconds) or sleep(seconds))
    dead = Dead(URL)
    assert not naps, "what was released is taken at once"
    began = time.monotonic()
    third = Lease(URL)
    assert time.monotonic() - began > 0.4, "what was not, when it is not renewed"
    Lease._keep(dead)  # it was only paused
    assert dead.lost and not third.lost
    dead.release()
    assert not third.lost and store.exists(f"{URL}/.lease")
    third.release()
    assert not store.exists(f"{URL}/.lease")


def test_a_run_whose_lease_was_taken_sends_no_more(store):
    mirror = Mirror(URL)
    with pytest.raises(OSError, match="taken over by another run"), mirror.claimed():
        assert mirror._lease is not None
        write(mirror, 1)
        mirror._lease.lost = True
        mirror.begin_checkpoint(1)
        mirror.wait()
    assert not names(store) - {".lease"}
