"""Data in an object store: what is found, read where it is, copied, and kept within a bound."""

import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from paravt_jax import fetched, remote
from paravt_jax.fetched import keep_fetched, local_file, local_folder
from paravt_jax.remote import absolute, check_url, is_remote, store_of
from pipelines.datasets import question_rows
from pipelines.media import MissingFile, RemoteMedia
from pipelines.needle.world import write_mp4
from pipelines.video import VideoReader
from train import main
from train.config import Config
from train.recipes import get_recipe
from train.workdir.config_file import differences, with_whole_paths

BUCKET = "memory://bucket"


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty store, in the memory of this process."""
    monkeypatch.setitem(remote.PACKAGES, "memory", "fsspec")
    keep_fetched(tmp_path / "fetched", 1.0)
    for known in (fetched._version, fetched.local_folder, remote._is_remote_file):
        known.cache_clear()
    there = fsspec.filesystem("memory")
    there.store.clear()
    yield there
    there.store.clear()


def put(there, name: str, data: bytes = b"x") -> str:
    there.pipe_file(f"{BUCKET}/{name}", data)
    return f"{BUCKET}/{name}"


@pytest.fixture
def videos(store, tmp_path):
    """Two videos and the questions about them."""
    frames = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3)).astype(np.uint8)
    write_mp4(str(tmp_path / "v.mp4"), frames, 10.0)
    for name in ("a", "b"):
        put(store, f"set/videos/{name}.mp4", (tmp_path / "v.mp4").read_bytes())
    lines = "".join(f"videos/{name}.mp4,What?,red,oe\n" for name in ("a", "b"))
    put(store, "set/questions.csv", f"video,question,answer,question_type\n{lines}".encode())
    put(store, "secret.mp4", (tmp_path / "v.mp4").read_bytes())
    return tmp_path / "v.mp4"


@pytest.mark.parametrize("path", ["set", "set/", "set/questions.csv", "./set/../set"])
def test_questions_of_a_bucket_are_those_of_a_folder(videos, path, tmp_path):
    found = question_rows(absolute(f"{BUCKET}/{path}"))
    assert [row.row_id for row in found.rows] == ["questions.csv:2", "questions.csv:3"]
    assert [row.video.path for row in found.rows] == [
        f"{BUCKET}/set/videos/{name}.mp4" for name in ("a", "b")
    ]
    assert {row.video.duration for row in found.rows} == {4.0}
    assert not (tmp_path / "fetched" / "media").exists(), "lengths are read where the videos are"
    there, here = (
        VideoReader().overview(ref, 4)
        for ref in (found.rows[0].video, type(found.rows[0].video)(str(videos), 4.0))
    )
    np.testing.assert_array_equal(there.pixels, here.pixels)
    assert list((tmp_path / "fetched" / "media").rglob("*-a.mp4"))


@pytest.mark.parametrize(
    "written", ["../secret.mp4", f"{BUCKET}/secret.mp4", "/etc/passwd", "file:///etc/passwd", ".."]
)
def test_no_row_leads_out_of_the_root(videos, written):
    media = RemoteMedia(f"{BUCKET}/set")
    with pytest.raises(MissingFile, match="leads out of"):
        media.video(written)
    assert media.buckets["(outside)"].missing == 1
    assert media.video(f"{BUCKET}/set/videos/../videos/a.mp4").duration == 4.0
    with pytest.raises(MissingFile, match="no such file below"):
        media.find("videos/c.mp4")
    (name, bucket), _ = media.buckets.items()
    assert (name, bucket.files) == ("(outside)", 1)


def test_keys_do_not_lead_out_of_a_copied_folder(store):
    for name in ("set/../../evil.csv", "set/good.csv", "set/deep/er.csv", "set/large.bin"):
        put(store, name)
    folder = local_folder(f"{BUCKET}/set", lambda name: name.endswith(".csv"))
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    kept = {path.relative_to(folder).as_posix() for path in files}
    assert kept == {"good.csv", "deep/er.csv"}
    put(store, "set/good.csv", b"changed")
    fetched.local_folder.cache_clear()
    assert Path(local_folder(f"{BUCKET}/set"), "good.csv").read_bytes() == b"changed"


def media_bytes(tmp_path) -> int:
    files = (tmp_path / "fetched" / "media").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def test_copies_keep_to_their_bound_and_those_in_use_stay(store, tmp_path):
    keep_fetched(tmp_path / "fetched", 2500 / 2**30)
    urls = [put(store, f"{number}.mp4", bytes(1000)) for number in range(6)]
    with local_file(urls[0]) as held:
        for url in urls[1:]:
            with local_file(url) as own:
                assert os.path.getsize(own) == 1000
            assert media_bytes(tmp_path) <= 2500
        assert os.path.exists(held), "the oldest one, but somebody reads it"
    with local_file(urls[1]) as again:
        assert os.path.getsize(again) == 1000 and media_bytes(tmp_path) <= 2500


def test_threads_that_want_one_file_fetch_it_once(store, monkeypatch):
    url, fetches = put(store, "a.mp4", bytes(10)), []
    get = type(store).get_file
    monkeypatch.setattr(
        type(store), "get_file", lambda *a, **k: (fetches.append(1), get(*a, **k))[1]
    )

    def read():
        with local_file(url):
            pass

    threads = [threading.Thread(target=read) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert fetches == [1]


def test_a_video_that_has_gone_is_a_bad_row_and_no_half_file_stays(videos, store, tmp_path):
    (row, *_) = question_rows(f"{BUCKET}/set").rows
    store.rm(row.video.path)
    with pytest.raises(ValueError, match=r"video memory://bucket/set/videos/a.mp4: no such file"):
        VideoReader().overview(row.video, 4)
    assert media_bytes(tmp_path) == 0


def test_settings_keep_urls_as_they_are():
    config = get_recipe("needle_rl")
    assert is_remote("gs://bucket/set") and not is_remote("/gs/bucket") and not is_remote(None)
    assert absolute("gs://bucket/a/../b/") == "gs://bucket/b"

    def named(path: str) -> Config:
        from train.settings.override import override

        return with_whole_paths(override(config, [], {"data.path": ("--data", path)}))

    assert named("s3://bucket/a").data.path == "s3://bucket/a"
    assert not differences(named("gs://bucket/a/."), named("gs://bucket/a"))


def test_what_is_missing_is_said_with_its_flag(videos, monkeypatch, capsys):
    def absent(*arguments, **more):
        raise ImportError("Install gcsfs")

    with pytest.raises(ValueError, match=r"--data memory://bucket/nothing: no such file or folder"):
        check_url(f"{BUCKET}/nothing", "--data")
    monkeypatch.setattr(fsspec, "filesystem", absent)
    assert main.main(["--data", "gs://bucket/set"]) == 2
    said = capsys.readouterr().err
    assert "--data gs://bucket/set" in said and "pip install gcsfs" in said
    assert main.main(["--set", "data.fetched_gb=3"]) == 2
    assert "data.fetched_gb" in capsys.readouterr().err
    with pytest.raises(ValueError, match="s3fs"):
        store_of("s3://bucket")
