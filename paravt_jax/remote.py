"""Files in object stores by their URLs, `gs://bucket/...` and `s3://bucket/...`, through fsspec."""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
"""The package that fsspec needs for a scheme; none of them is among the requirements."""
# What stores call the version of a file, the surest first.
VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "updated", "mtime", "created")


def scheme_of(path: str | os.PathLike) -> str:
    """`gs` of `gs://...`; empty for a path of this machine."""
    scheme, separator, _ = os.fspath(path).partition("://")
    return scheme if separator and scheme in PACKAGES else ""


def is_remote(path: str | os.PathLike | None) -> bool:
    """Whether it is a URL of an object store."""
    return path is not None and bool(scheme_of(path))


def store_of(url: str, flag: str = "") -> AbstractFileSystem:
    """The file system of a URL. Not to be kept: fsspec has one for each thread and process.

    Args:
      flag: what named the URL, for messages.

    Raises:
      ValueError: its package is not installed.
    """
    import fsspec.config  # here: it takes a tenth of a second, and few runs need it

    scheme = scheme_of(url)
    # Files come from other hosts and from TensorStore: what was listed once is not believed.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ValueError(
            f"{flag} {url}: {scheme}:// is read and written with {PACKAGES[scheme]}, which is not "
            f"installed: pip install {PACKAGES[scheme]}".lstrip()
        ) from error


def check_url(url: str, flag: str) -> None:
    """Refuse what leads to nothing.

    Raises:
      ValueError: no such file or folder, no right to read it, or a package that is missing.
    """
    store = store_of(url, flag)
    try:
        there = store.exists(url)
    except Exception as error:  # each store has errors of its own
        raise ValueError(f"{flag} {url}: {reason(error)}; check the credentials") from error
    if not there:
        raise ValueError(f"{flag} {url}: no such file or folder; check the URL")


def is_file(path: str) -> bool:
    """Whether a file is there; of a remote one asked once, as those of a data set stay.

    Raises:
      OSError: a store does not answer.
    """
    return _is_remote_file(path) if is_remote(path) else os.path.isfile(path)


@functools.lru_cache(1 << 16)
def _is_remote_file(url: str) -> bool:
    with storage_errors(url):
        return store_of(url).isfile(url)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """What a store raises, each its own kinds of errors, becomes an OSError that names the URL."""
    try:
        yield
    except ValueError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: no such file") from error
    except Exception as error:
        raise OSError(f"{url} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What a store says, in one line."""
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__


def absolute(path: str) -> str:
    """A path from the root, or a URL without `.` and `..` in it."""
    if not is_remote(path):
        return os.path.abspath(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}"


def real(path: str) -> str:
    """What a path leads to: links of this machine resolved."""
    return absolute(path) if is_remote(path) else os.path.realpath(path)


def version_of(info: dict[str, Any]) -> str:
    """What changes when a file does, of what a store says about it."""
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
    return f"{info.get('size')} {version}"
