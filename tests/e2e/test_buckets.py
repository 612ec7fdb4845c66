"""Runs whose data, and whose workdir, are in a bucket of an S3 server."""

import json
import signal
import time

import fsspec
import numpy as np
import pytest

from paravt_jax.fetched import keep_fetched
from pipelines.datasets import question_rows
from pipelines.needle.world import write_mp4
from pipelines.video import VideoReader
from tests.support.command import command, environment, metrics, run, saved, server, untimed
from tests.support.s3 import BUCKET, s3_server
from tests.unit.test_checkpoints import TABLE, same, state_of
from train.workdir.checkpoints import Checkpoints
from train.workdir.mirror import Mirror

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as told:
        yield told


@pytest.fixture(scope="module")
def data(bucket, tmp_path_factory) -> str:
    """Questions about two videos."""
    folder, url = tmp_path_factory.mktemp("own"), f"s3://{BUCKET}/set"
    store = fsspec.filesystem("s3")
    frames = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3)).astype(np.uint8)
    for name in ("a", "b"):
        write_mp4(str(folder / f"{name}.mp4"), frames, 10.0)
        store.put_file(str(folder / f"{name}.mp4"), f"{url}/videos/{name}.mp4")
    lines = "".join(f"videos/{name}.mp4,What is seen?,red,oe\n" for name in ("a", "b"))
    store.pipe_file(
        f"{url}/questions.csv", f"video,question,answer,question_type\n{lines}".encode()
    )
    return url


def test_questions_of_a_bucket(data, tmp_path):
    keep_fetched(tmp_path, 1.0)
    rows = question_rows(data).rows
    assert [row.video.path for row in rows] == [f"{data}/videos/{name}.mp4" for name in "ab"]
    assert {row.video.duration for row in rows} == {4.0}
    assert VideoReader().overview(rows[0].video, 4).pixels.shape == (4, 32, 48, 3)
    assert len(list(tmp_path.rglob("*.mp4"))) == 1, "only what is decoded is copied"


SFT = ("--recipe", "needle_sft", "--steps", "3")
SMALL = ("output.checkpoint_every=1", "output.export_hf=false", "evaluation.rows=0")
WORLD = ("data.train_videos=12", "data.held_out_videos=4")


def test_checkpoints_of_a_bucket(bucket, tmp_path):
    url, state = f"s3://{BUCKET}/runs/tiny", state_of(3)
    mirror = Mirror(url)
    with mirror.claimed():
        saved_ones = Checkpoints(mirror.checkpoints, 1, TABLE, mirror=mirror)
        for step in (1, 2):
            saved_ones.save(step, state_of(step), {"prompts": step})
        saved_ones.close()
    there = fsspec.filesystem("s3").ls(f"{url}/checkpoints")
    assert [path.rpartition("/")[2] for path in there] == ["1", "2"], "one more than is to stay"
    mirror = Mirror(url)
    with mirror.claimed():
        saved_ones = Checkpoints(mirror.checkpoints, 1, TABLE, mirror=mirror)
        back, step, position = saved_ones.restore(state)
        assert (step, position) == (2, {"prompts": 2})
        same(back, state_of(2))
        saved_ones.save(3, state)
        saved_ones.close()
    fsspec.filesystem("s3").invalidate_cache()
    there = fsspec.filesystem("s3").ls(f"{url}/checkpoints")
    assert [path.rpartition("/")[2] for path in there] == ["2", "3"]


@pytest.mark.study
def test_a_run_in_a_bucket_is_killed_and_goes_on_as_one_on_a_disk(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("PARAVT_LEASE_SECONDS", "2")
    url, store, cache = f"s3://{BUCKET}/runs/one", fsspec.filesystem("s3"), tmp_path / "cache"
    cache.mkdir()
    here, sets = tmp_path / "here", [*SMALL, *WORLD, f"data.cache_dir={cache}"]
    done = run(command(here, *SFT, sets=sets), cache)
    assert done.returncode == 0, done.stderr[-3000:]

    def there(name: str) -> bool:
        store.invalidate_cache()
        return store.exists(f"{url}/{name}")

    _, door, *rest = command(url, *SFT, sets=sets)
    killed = server().start(door, rest, cache, environment(), together=True)
    while not killed.ended and not there("checkpoints/1/commit_success.txt"):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL
    assert there(".lease"), "it had no time to give it back"
    done = run(command(url, sets=()), cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"everything is in {url}" in done.stdout and f"workdir   {url}" in done.stdout
    store.invalidate_cache()
    back = tmp_path / "back"
    store.get(url, str(back), recursive=True)
    assert [untimed(r) for r in metrics(back)] == [untimed(r) for r in metrics(here)]
    assert saved(back, 3) == saved(here, 3)
    assert not there(".lease") and there("report/index.html")
    assert json.loads((back / "config.json").read_text())["steps"] == 3
