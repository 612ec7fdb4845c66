"""Every documented mistake of a user, run through the real command.

A row is a `Mistake`: what was typed, what the one line on stderr must name, the exit code. Rows
stand by area in modules of this package (`flags`, `settings`, `data`, `model`, `resume`, ...), each
with a list `ROWS`; a new module is found by itself. `tests/contracts/test_mistakes.py` runs them
all:

    Mistake("--steps 0", "--steps")
    Mistake("--data q.csv", ("q.csv", "answer"), code=1, files={"q.csv": "video,question\\n"})

Each row runs in an empty folder of its own, in which `files` are written and `prepare` has been
called. In arguments (and in texts of `files`) these words stand for what `world.py` has made:

    {model}      a tiny Qwen3-VL folder with weights (the demo's cold start)
    {videos}     a folder with a.mp4 and b.mp4, 4 seconds each
    {questions}  a good CSV of questions about them
    {chats}      a good JSONL of conversations about them
    {run}        the workdir of an RL run of `{small}`; its checkpoint at step 1 is an empty folder
    {small}      `--set` for a short RL run on the needle world, whose videos are made already
    {own}        `--set` for a short RL run on {questions}, and `--data {questions}`
    {chatting}   all that `paravt_sft` needs for a short run on {chats}
    {here}       the row's own folder

Rows run in forked children of a process that has imported everything (`tests/support/forked.py`),
which saves the four seconds that imports take. Where that would not be the real thing, because an
environment variable is read at import, say `fresh=True`: a process of its own; those rows are few.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SECONDS = 10
"""Processor time after which no user waits for an error message."""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake and what must come of it."""

    arguments: str
    """As typed in a shell after the command."""
    named: str | tuple[str, ...]
    """What the line must name: the flag, the setting or the file, and perhaps the remedy."""
    code: int = 2
    """2: refused at the door, and nothing is written. 1: found while reading or running."""
    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)
    """Name below the row's folder -> content."""
    prepare: Callable[[Path], None] | None = None
    """Does what `files` cannot, in the row's folder."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    devices: int = 1
    door: str = "train/main.py"
    """The command, below the repository's root."""
    fresh: bool = False
    """Run in a process of its own."""
    prefix: str = "error: "
    """How the line begins."""

    def expanded(self, world: Mapping[str, str]) -> list[str]:
        """The arguments, with paths of the world in the place of their names."""
        return shlex.split(expand(self.arguments, world))


def expand(text: str, world: Mapping[str, str]) -> str:
    """The text with what the names in braces stand for."""
    for name, value in world.items():
        text = text.replace("{" + name + "}", value)
    return text


def all_mistakes() -> Iterator[tuple[str, Mistake]]:
    """Every row of every module, with the name of its area."""
    for module in pkgutil.iter_modules(__path__):
        rows = getattr(importlib.import_module(f"{__name__}.{module.name}"), "ROWS", ())
        yield from ((module.name, row) for row in rows)
