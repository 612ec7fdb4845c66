"""How often a run stops to compile, and the folder that keeps what was compiled."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path

import jax

LEAST_SECONDS = 0.2
"""Compilations that take less are not worth a file."""
_CACHE = "jax_compilation_cache_dir"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_PROGRAM = re.compile(r".+-[0-9a-f]{64}-cache")
"""Names that JAX gives to compiled programs."""


def keep_compiled(folder: str | None, gigabytes: float = 0.0) -> str | None:
    """Keep compiled programs for later runs in a folder, which is returned; None keeps none.

    What `JAX_COMPILATION_CACHE_DIR` names comes first, and is left to JAX's own settings. On
    several hosts JAX lets the first of them write, and a file appears whole or not at all, so that
    runs and hosts may share the folder.

    Args:
      gigabytes: the folder is cut down to so much now, see `prune`; 0 keeps all.
    """
    chosen: str | None = getattr(jax.config, _CACHE)
    if chosen or folder is None:
        return chosen
    folder = os.path.abspath(os.path.expanduser(folder))
    if gigabytes and jax.process_index() == 0:
        prune(Path(folder), int(gigabytes * 2**30))
    jax.config.update(_CACHE, folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


def prune(folder: Path, limit: int) -> None:
    """Delete the compiled programs that were longest not used until a folder holds no more than
    `limit` bytes of them. It may be shared: what another process deletes is no matter.

    JAX's own bound, `jax_compilation_cache_max_size`, is not used. It takes a lock at every look-up
    and reads the folder anew at every entry; and one program that was kept without it, or that a
    killed process left half written, keeps it from ever storing another (jax 0.10 and 0.11).
    """
    programs: list[tuple[float, int, Path]] = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            if _PROGRAM.fullmatch(path.name):
                stat = path.stat()
                # A file system may not note when a file is read; then the oldest go first.
                programs.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    excess = sum(size for _, size, _ in programs) - limit
    for _, size, path in sorted(programs):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= size


class Compilations:
    """What this process compiles: what at this moment, and how much since that was last asked."""

    def __init__(self) -> None:
        self._began: dict[int, tuple[str, float]] = {}
        self._seconds: list[float] = []
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)

    def _begin(self, event: str, value: float | int, **details: str | int) -> None:
        if event == _COMPILED:
            name = str(details.get("fun_name", "a program"))
            self._began[threading.get_ident()] = name, time.monotonic()

    def _end(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            self._began.pop(threading.get_ident(), None)
            self._seconds.append(duration_secs)

    def __str__(self) -> str:
        """The programs that are being compiled and for how long; empty if there are none."""
        now = time.monotonic()
        running = [f"{name}, {now - began:.0f} s so far" for name, began in self._began.values()]
        return f"compiling {' and '.join(running)}" if running else ""

    def metrics(self) -> dict[str, float]:
        """Programs compiled since the last call, and seconds that it took."""
        seconds, self._seconds = self._seconds, []
        return {"compile/programs": float(len(seconds)), "time/compile": sum(seconds)}
