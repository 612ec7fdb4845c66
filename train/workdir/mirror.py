"""A workdir in a bucket: the run works in a folder of this host, which is sent there.

Buckets can neither append to a file nor rename a folder. So at every checkpoint all files that
changed are sent, then the checkpoint, and last the mark that it is whole: whenever the run is
killed, the bucket holds a checkpoint and all that was written before it (docs/adr/0038).
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from paravt_jax.remote import storage_errors, store_of
from train.workdir.config_file import FILE
from train.workdir.lease import NAME as LEASE
from train.workdir.lease import Lease
from train.workdir.lock import LOCK

CHECKPOINTS, WHOLE = "checkpoints", "commit_success.txt"
"""Their folder, and the file of each that is sent last. Orbax has the name, and writes one on disks
too, at no certain moment, and one into each item."""
OF_ORBAX = "gs://"
MADE_ANEW = ("tensorboard/", "hf/", "best/", "adapter/", "report/")
"""Folders that a continued run writes and never reads, so that they are not fetched."""
LARGE = 1 << 26
"""Bytes from which a file is sent in parts: weights."""
POLL = 0.05
"""Seconds between looks whether Orbax has given a checkpoint its name."""


class Mirror:
    """A URL and the folder that stands for it while a run lasts.

    Of several hosts each holds a part of a checkpoint: Orbax writes those into the bucket itself,
    and the first host sends all other files before it does.
    """

    def __init__(self, url: str):
        """Nothing but the settings is there at first.

        Raises:
          ValueError: a package that is missing.
          OSError: the store does not answer.
        """
        self.url, self._store = url.rstrip("/"), store_of(url, "--workdir")
        folder = tempfile.mkdtemp(prefix="paravt-workdir-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.folder = Path(folder) / self.url.rpartition("/")[2]
        self.folder.mkdir()
        self._sent: dict[str, tuple[int, int]] = {}
        """Time and size of each file as it was sent or fetched."""
        self._sender, self._ending = ThreadPoolExecutor(1), threading.Event()
        self._sending: Future[None] = Future()
        self._sending.set_result(None)
        self._lease: Lease | None = None
        self._shared = False
        self.saved = False
        """Whether the bucket is known to hold a checkpoint."""
        self._fetch([name for name in self._names() if name == FILE])

    def share(self) -> None:
        """The run has several hosts.

        Raises:
          ValueError: Orbax does not write to this kind of store.
        """
        if not self.url.startswith(OF_ORBAX):
            raise ValueError(
                f"--workdir {self.url}: Orbax writes checkpoints of several hosts to gs:// and to "
                "folders that all of them mount; give one of those"
            )
        self._shared = True

    @property
    def checkpoints(self) -> Path | epath.Path:
        """Where Orbax reads and writes them."""
        place = epath.Path(self.url) if self._shared else self.folder
        return place / CHECKPOINTS

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within it the run is this process's alone; at its end all is sent.

        Raises:
          ValueError: another run is there.
          OSError: the store does not answer.
        """
        self._lease = Lease(self.url)
        try:
            names = wanted(self._names())
            steps = [name for name in names if name.startswith(f"{CHECKPOINTS}/")]
            self.saved = bool(steps)
            self._fetch([name for name in names if not self._shared or name not in steps])
            yield
        except BaseException:
            self._stop_sending()
            with contextlib.suppress(OSError):  # why the run ends is told already
                self.send()
            raise
        else:
            self._stop_sending()
            self.send()
        finally:
            self._lease.release()
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _stop_sending(self) -> None:
        """No checkpoint any more but the one that is on its way."""
        self._ending.set()
        self._sender.shutdown()

    def send(self) -> None:
        """Send files that have changed, checkpoints left out, and delete those that have gone.

        Raises:
          OSError: the store does not answer, or another run is there.
        """
        self._check()
        here = dict(self._here())
        with storage_errors(self.url):
            for name in {name for name, stamp in here.items() if self._sent.get(name) != stamp}:
                self._put(name, large=here[name][1] > LARGE)
                self._sent[name] = here[name]
            for name in set(self._sent) - set(here):
                self._delete(name)
                del self._sent[name]

    def _put(self, name: str, large: bool) -> None:
        path, url = self.folder / name, f"{self.url}/{name}"
        if large:
            self._store.put_file(str(path), url)
        else:  # at once: it may become longer meanwhile
            with contextlib.suppress(FileNotFoundError):
                self._store.pipe_file(url, path.read_bytes())

    def named(self, text: str) -> str:
        """The URL in place of the folder that stands for it."""
        return text.replace(str(self.folder), self.url)

    def named_in(self, error: Exception) -> Exception:
        """The same in what an error says."""
        error.args = tuple(
            self.named(part) if isinstance(part, str) else part for part in error.args
        )
        return error

    def begin_checkpoint(self, step: int) -> None:
        """Send a checkpoint as soon as it is written here; one at a time. Of several hosts: send
        all else before it is written."""
        self.wait()
        if self._shared:
            self.saved = True
            return self.send()
        self._sending = self._sender.submit(self._send_checkpoint, step)

    def failure(self) -> OSError | None:
        """Why no checkpoint can be sent, as far as that is known."""
        if self._lease is not None and self._lease.lost:
            return OSError(f"--workdir {self.url} was deleted, or taken over by another run")
        error = self._sending.exception() if self._sending.done() else None
        return error if isinstance(error, OSError) else None

    def wait(self) -> None:
        """Wait for what is being sent.

        Raises:
          OSError: it could not be sent.
        """
        self._sending.result()

    def _send_checkpoint(self, step: int) -> None:
        folder = self.folder / CHECKPOINTS / str(step)
        while not folder.exists():  # Orbax gives it its name when it is whole
            if self._ending.wait(POLL):
                return
        self.send()
        mark = folder / WHOLE
        files = [path for path in folder.rglob("*") if path.is_file() and path != mark]
        there = f"{self.url}/{CHECKPOINTS}/{step}"
        with storage_errors(self.url):
            self._store.put(
                list(map(str, files)),
                [f"{there}/{path.relative_to(folder).as_posix()}" for path in files],
            )
            self._check()
            self._store.pipe_file(f"{there}/{WHOLE}", mark.read_bytes() if mark.exists() else b"")
            self.saved = True
            self._prune()

    def _prune(self) -> None:
        """Delete checkpoints that are no longer here, the mark that they are whole first."""
        here = {path.name for path in (self.folder / CHECKPOINTS).iterdir()}
        there = {name.split("/")[1] for name in self._names() if name.startswith(f"{CHECKPOINTS}/")}
        for step in there - here:
            self._delete(f"{CHECKPOINTS}/{step}/{WHOLE}")
            self._store.rm(f"{self.url}/{CHECKPOINTS}/{step}", recursive=True)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.rm_file(f"{self.url}/{name}")

    def _check(self) -> None:
        if (error := self.failure()) is not None:
            raise error

    def _here(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Files of the folder that are sent one by one."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith((f"{CHECKPOINTS}/", ".")) or "/." in name:
                continue  # sent otherwise, or not whole
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.is_file():
                    yield name, (stat.st_mtime_ns, stat.st_size)

    def _names(self) -> list[str]:
        """All that the bucket holds, by names below the workdir."""
        with storage_errors(self.url):
            self._store.invalidate_cache()
            paths: Any = self._store.find(self.url)
        root = self.url.partition("://")[2] + "/"
        return [path.lstrip("/").removeprefix(root) for path in paths]

    def _fetch(self, names: list[str]) -> None:
        targets = [self.folder / name for name in names]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        with storage_errors(self.url):
            if names:
                self._store.get([f"{self.url}/{n}" for n in names], list(map(str, targets)))
        for name, target in zip(names, targets, strict=True):
            if not name.startswith(f"{CHECKPOINTS}/"):
                stat = target.stat()
                self._sent[name] = stat.st_mtime_ns, stat.st_size


def wanted(names: list[str]) -> list[str]:
    """What a run that goes on needs: checkpoints only if they are whole."""
    steps = [name for name in names if name.startswith(f"{CHECKPOINTS}/")]
    whole = {name.split("/")[1] for name in steps if name.split("/")[2:] == [WHOLE]}
    complete = [name for name in steps if name.split("/")[1] in whole]
    others = (LEASE, LOCK, FILE, *MADE_ANEW, f"{CHECKPOINTS}/")
    return complete + [name for name in names if not name.startswith(others)]
