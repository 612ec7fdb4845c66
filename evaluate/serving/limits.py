"""How much a server takes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

LONGEST_PROMPT = 8192
"""Tokens of a prompt at most, where nobody says how many: caches have room for all rows."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on requests."""

    rows: int = 8
    """Completions that are written at a time; others wait for a free row."""
    queue: int = 64
    """Requests that may wait beside those that are under way."""
    prompt_tokens: int = 0
    """Longest prompt, frames included; 0 leaves that to the model (`LONGEST_PROMPT`)."""
    max_tokens: int = 1024
    """Longest completion."""
    frames: int = 64
    """Most images and frames of a request."""
    body_bytes: int = 64 * 2**20
    """Largest body of a request, and largest medium that is fetched."""
    seconds: float = 600.0
    """Longest that a request may take, the time it waits included."""
    drain_seconds: float = 60.0
    """How long requests under way may go on once the server is told to end."""
    media_root: Path | None = None
    """Where files must lie that requests name; None: they name none."""
    fetch: bool = False
    """Whether images and videos are fetched from http(s) addresses."""

    @property
    def requests(self) -> int:
        """Most requests that are in the server."""
        return self.rows + self.queue
