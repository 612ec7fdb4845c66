"""The folder of a run: one run at a time, files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems that know no locks (buckets that are mounted) say."""


class WorkdirLock:
    """The right to write into a workdir, held by the first host until the process ends.

    The kernel gives it back however the process ends, so there is nothing to clean up.
    """

    def __init__(self, workdir: Path):
        """Raises ValueError if another process holds it."""
        self._workdir, self._path = workdir, workdir / LOCK
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"--workdir {workdir} is in use by {holder}: wait until that run ends, stop it, or "
                "choose another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        self._sign()

    def _sign(self) -> None:
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self._file.flush()

    @property
    def lost(self) -> bool:
        """Whether the folder was deleted, or another one stands in its place."""
        try:
            now = self._path.stat()
        except OSError:
            return True
        mine = os.fstat(self._file.fileno())
        return (now.st_ino, now.st_dev) != (mine.st_ino, mine.st_dev)

    def check(self) -> None:
        """Raises OSError if the folder was deleted."""
        if self.lost:
            raise OSError(lost_message(self._workdir))

    def release(self) -> None:
        """Let others write there."""
        self._file.close()


def lost_message(workdir: os.PathLike) -> str:
    """What to tell when a workdir is gone."""
    return (
        f"--workdir {workdir} was deleted or replaced while the run was writing there; what it "
        "learned is lost: start again, and keep the folder until the run has ended"
    )
