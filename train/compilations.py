"""How often a run stops to compile."""

from __future__ import annotations

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts what this process compiles: `figures` tells of the time since they were last read."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            self._seconds.append(duration_secs)

    @property
    def figures(self) -> dict[str, float]:
        """Programs compiled, and seconds that it took."""
        seconds, self._seconds = self._seconds, []
        return {"compile/programs": float(len(seconds)), "time/compile": sum(seconds)}
