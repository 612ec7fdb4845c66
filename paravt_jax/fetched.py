"""Local copies of files in object stores, for libraries that open files by name.

Videos and images are kept up to a bound in bytes, the least recently used go first; tables and
model folders are fetched whole and stay. Threads and processes may share a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paravt_jax.remote import is_remote, storage_errors, store_of, version_of

FOLDER, BOUND = "PARAVT_FETCHED", "PARAVT_FETCHED_GB"
"""Environment variables that say where copies are and how much: worker processes inherit them."""
DEFAULT = os.path.join("data", "fetched")
ABANDONED = 3600.0
"""Seconds after which nobody writes a part of a file any more."""
PART = ".part"

_fetching: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def keep_fetched(folder: str | os.PathLike, gigabytes: float) -> None:
    """Where this process and those that it starts keep copies, and how many GiB of media."""
    os.environ[FOLDER], os.environ[BOUND] = os.path.abspath(folder), str(gigabytes)


def _folder(kind: str) -> Path:
    return Path(os.environ.get(FOLDER, DEFAULT)).absolute() / kind


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
    """A name by which a library can open a file: its own or, of a remote one, that of a copy,
    which is not dropped before this ends.

    Raises:
      OSError: it cannot be fetched.
    """
    if not is_remote(path):
        yield path
        return
    copy = _media_copy(path)
    with _held(copy, lambda: _fetch(path, copy)):
        yield str(copy)


def _media_copy(url: str) -> Path:
    """Where the copy of this version of a file is; named so that a reader knows it."""
    scheme, _, rest = url.partition("://")
    folder, _, name = rest.rpartition("/")
    digest = hashlib.sha256(_version(url).encode()).hexdigest()[:12]
    return _folder("media") / scheme / folder / f"{digest}-{name}"


@functools.lru_cache(1 << 16)
def _version(url: str) -> str:
    """Asked once: files of a data set do not change while a run reads them."""
    with storage_errors(url):
        return version_of(store_of(url).info(url))


@contextlib.contextmanager
def _held(copy: Path, fetch: Callable[[], None]) -> Iterator[None]:
    """A copy that is there, and stays."""
    while True:
        try:
            file = copy.open("rb")
        except FileNotFoundError:
            with _fetching[copy]:
                if not copy.exists():
                    fetch()
            continue
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:  # else it was dropped just before
                os.utime(copy)
                yield
                return


def _fetch(url: str, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{uuid.uuid4().hex}{PART}")
    try:
        with storage_errors(url):
            store = store_of(url)
            _make_room(store.info(url)["size"])
            store.get_file(url, str(part))
        os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)


def _make_room(size: int) -> None:
    """Drop copies that nobody holds, those that were used longest ago first. What several threads
    fetch at once may exceed the bound by that much."""
    bound = float(os.environ.get(BOUND, 50)) * 2**30
    copies = sorted(_kept(), key=lambda one: one[1].st_mtime)
    total = size + sum(stat.st_size for _, stat in copies)
    for path, stat in copies:
        if total <= bound:
            return
        young = path.name.endswith(PART) and time.time() - stat.st_mtime < ABANDONED
        if not young and _drop(path):
            total -= stat.st_size


def _kept() -> Iterator[tuple[Path, os.stat_result]]:
    for path in _folder("media").rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                yield path, path.stat()


def _drop(path: Path) -> bool:
    """Delete a copy unless it is in use."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


def all_names(name: str) -> bool:
    """Whatever a file is called."""
    return True


@functools.lru_cache
def local_folder(url: str, is_chosen: Callable[[str], bool] = all_names) -> str:
    """A folder with copies of the files below a URL whose names, relative to it, are wanted; of a
    single file, a folder with that one. A folder of this machine is its own copy.

    Raises:
      OSError: it cannot be fetched.
    """
    if not is_remote(url):
        return url
    files = _listed(url)
    chosen = {name: info for name, info in files.items() if is_chosen(name)}
    versions = "".join(f"{name} {version_of(chosen[name])}\n" for name in sorted(chosen))
    digest = hashlib.sha256(f"{url}\n{versions}".encode()).hexdigest()[:16]
    folder = _folder("folders") / f"{os.path.basename(url.rstrip('/'))}-{digest}"
    if not folder.exists():
        _fetch_folder(url, {name: info["name"] for name, info in chosen.items()}, folder)
    return str(folder)


def _listed(url: str) -> dict[str, dict[str, Any]]:
    """What a store says of each file below a URL, or of the one that it names, by names relative
    to the folder."""
    with storage_errors(url):
        files: Any = store_of(url).find(url, detail=True)
    root = url.partition("://")[2].rstrip("/")
    names = {path.lstrip("/"): info for path, info in files.items()}
    if list(names) == [root]:
        root = root.rpartition("/")[0]
    relative = {path.removeprefix(f"{root}/"): info for path, info in names.items()}
    # Keys of a store may hold "..", and must not lead out of our folder.
    return {name: info for name, info in relative.items() if ".." not in name.split("/")}


def _fetch_folder(url: str, names: dict[str, str], folder: Path) -> None:
    """
    Args:
      names: what the store calls each file, by its name in the folder.
    """
    part = folder.with_name(f".{uuid.uuid4().hex}{PART}")
    part.mkdir(parents=True)
    try:
        with storage_errors(url):
            targets = [str(part / name) for name in names]
            for target in targets:
                os.makedirs(os.path.dirname(target), exist_ok=True)
            store_of(url).get(list(names.values()), targets)
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
