"""Why a row cannot be used: faults that are counted by name, and told in one line each."""

from __future__ import annotations

MALFORMED = "malformed row"
FIELD = "wrong field"
ANSWER = "answer that nobody can give"
CONTROL = "control token"
LONG_PROMPT = "long prompt"
REPEATED = "row_id used twice"
VIDEOS = "too many videos"
MISSING = "missing file"
UNREADABLE = "unreadable video"
SUBTITLES = "unreadable subtitles"

LONGEST = 400
"""Characters of a reason that are told; a hostile row is not printed whole."""


class Unusable(ValueError):
    """A row cannot be used.

    Args:
        kind: name of the fault, by which it is counted.
        reason: what is wrong with this row, and what to do.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple:
        return type(self), (self.kind, *self.args)


def one_line(text: str) -> str:
    """A text as one short line that any terminal can print; of a long one, its head and its end."""
    line = " ".join(text.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 150]} ... {line[-145:]}"
    return "".join(letter if letter.isprintable() else "?" for letter in line)
