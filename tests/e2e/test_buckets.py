"""Runs whose data, and whose workdir, are in a bucket of an S3 server."""

import fsspec
import numpy as np
import pytest

from paravt_jax.fetched import keep_fetched
from pipelines.datasets import question_rows
from pipelines.needle.world import write_mp4
from pipelines.video import VideoReader
from tests.support.s3 import BUCKET, s3_server


@pytest.fixture(scope="module")
def server():
    with s3_server() as told:
        yield told


@pytest.fixture(scope="module")
def data(server, tmp_path_factory) -> str:
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
