"""A failure in one line: what a command says of it, whoever raised it."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from paravt_jax.plugins import is_own_file

ROOT = Path(__file__).resolve().parents[1]
TRACEBACK = "PARAVT_TRACEBACK"
"""With this variable in the environment, failures keep their traceback."""


def explain(error: BaseException, memory_remedies: Sequence[str] = ()) -> str:
    """What happened, in one line.

    Our own refusals name setting, value and remedy, and the system's name the file: they stand as
    they are. Of anything else the kind is told too, where in our code it happened, and how to see
    more.

    Args:
      memory_remedies: what needs less memory on the devices.
    """
    text = " ".join(str(error).split())
    if _is_own(error) or isinstance(error, OSError):
        return text
    more = f"{_place(error)}; {TRACEBACK}=1 in the environment shows all of it"
    # XLA raises no kind of its own for this: its status stands in the text.
    if "RESOURCE_EXHAUSTED" in text:
        remedies = "".join(f"; {remedy}" for remedy in memory_remedies)
        return f"a device is out of memory ({_first(error)}){remedies} ({more})"
    if isinstance(error, MemoryError):
        return f"this machine is out of memory ({more})"
    return f"{type(error).__name__}: {_first(error)} ({more})"


def complain(
    error: object, prefix: str = "error", remedies: Sequence[str] = (), way_on: str = ""
) -> str:
    """Print one line on stderr, after the traceback where it was asked for; at its end how to go
    on, unless it names a `--workdir` itself. Returns the line."""
    if isinstance(error, BaseException):
        if os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        error = explain(error, remedies)
    line = " ".join(str(error).split())
    if way_on and "--workdir" not in line:
        line = f"{line}; {way_on}"
    # A terminal that is gone must not keep what follows from it: other hosts are to be told.
    with contextlib.suppress(OSError):
        print(f"{prefix}: {line}", file=sys.stderr)
    return f"{prefix}: {line}"


def attempt(
    work: Callable[[], object], prefix: str = "error", memory_remedies: Sequence[str] = ()
) -> int:
    """Do what a command does; returns its exit code: 0, 1 after a line about a failure, 130 after
    Ctrl-C."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads what is printed, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        complain(error, prefix, memory_remedies)
        return 1
    except KeyboardInterrupt:
        complain("interrupted", prefix)
        return 130
    return 0


def _is_own(error: BaseException) -> bool:
    """Whether our code raised it to be read: a ValueError, by a `raise` in a file of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    line = (frames[-1].line or "").strip() if frames else ""
    raised = not frames or (_is_ours(frames[-1].filename) and line.startswith("raise"))
    return isinstance(error, ValueError) and raised


def _is_ours(file: str) -> bool:
    return file.startswith(f"{ROOT}{os.sep}") and "site-packages" not in file


def _place(error: BaseException) -> str:
    """The last line of our code, or of a file that the user brought, on the way to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if _is_ours(f.filename) or is_own_file(f.filename)]
    if not ours:
        return "outside of this project"
    last = ours[-1]
    file = Path(last.filename).relative_to(ROOT) if _is_ours(last.filename) else last.filename
    return f"at {file}:{last.lineno} in {last.name}"


def _first(error: BaseException) -> str:
    """The first line of a message, which may go on for pages."""
    lines = str(error).strip().splitlines() or ["no message"]
    return " ".join(lines[0].split())[:300]
