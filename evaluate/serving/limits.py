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
    grammar_states: int = 1024
    """Room for the grammars of calls that must be made: each state takes 2 bytes for each token of
    the vocabulary, 0.3 GB in all for that of Qwen3-VL. 0: none can be asked for."""
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
    fetch_hosts: frozenset[str] = frozenset()
    """The only hosts that are asked then, wherever they are; empty: all at public addresses."""

    @property
    def requests(self) -> int:
        """Most requests that are in the server."""
        return self.rows + self.queue
