"""How often a run stops to compile, and the folder that keeps what was compiled."""

from __future__ import annotations

import os

import jax

LEAST_SECONDS = 0.2
"""Compilations that take less are not worth a file."""
_CACHE = "jax_compilation_cache_dir"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def keep_compiled(folder: str | None) -> str | None:
    """Keep compiled programs for later runs in a folder, which is returned; None keeps none.

    What `JAX_COMPILATION_CACHE_DIR` names comes first. On several hosts JAX lets the first of them
    write, and a file appears whole or not at all, so that runs and hosts may share the folder.
    """
    given: str | None = getattr(jax.config, _CACHE)
    if given or folder is None:
        return given
    folder = os.path.abspath(os.path.expanduser(folder))
    jax.config.update(_CACHE, folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


class Compilations:
    """Counts what this process compiles: `metrics` tells of the time since they were last read."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            self._seconds.append(duration_secs)

    @property
    def metrics(self) -> dict[str, float]:
        """Programs compiled, and seconds that it took."""
        seconds, self._seconds = self._seconds, []
        return {"compile/programs": float(len(seconds)), "time/compile": sum(seconds)}
