"""Users' own functions and classes, by name: how command lines and config.json speak of them.

load("path/to/mine.py:zoom_image")      from a file, wherever it lies
load("some_package.rewards:brevity")    from an importable module
reference(zoom_image)                   "/abs/path/to/mine.py:zoom_image"
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_RUN: dict[str, str] = {}
"""Files that were run, and the sha256 of what was run: a file may change while a process lasts."""


class Own(str):
    """The name of a function or class of the user's own, as a setting keeps it."""


def is_reference(text: str) -> bool:
    """Whether a text has the form that `load` takes."""
    module, _, name = text.rpartition(":")
    return bool(module) and name.isidentifier()


def load(text: str) -> Any:
    """The object that `file.py:name` or `module:name` names. A file is run once per process.

    Raises:
        ValueError: another form, no such file, module or name, or running the file fails.
    """
    place, _, name = text.rpartition(":")
    if not is_reference(text):
        raise ValueError(f"{text!r}: write path/to/file.py:name or module:name")
    module = _from_file(place) if place.endswith(".py") else _imported(place)
    if not hasattr(module, name):
        raise ValueError(f"{text}: {place} has nothing called {name}")
    return getattr(module, name)


def reference(thing: Any) -> str:
    """The text under which `load` finds a function or class again, in another process too.

    Raises:
        ValueError: it does not stand by its name at the top of a module.
    """
    name, module_name = getattr(thing, "__qualname__", ""), getattr(thing, "__module__", None)
    module = sys.modules.get(module_name or "")
    if module is None or getattr(module, name, None) is not thing:
        raise ValueError(
            f"{thing!r} cannot be named in config.json: define it at the top of a module, "
            "under a name of its own"
        )
    file = getattr(module, "__file__", None)
    # Modules of a package keep their dotted name: loaded as a lone file, they could not import
    # their neighbours by a relative import.
    if file is None or "." in module.__name__:
        return f"{module.__name__}:{name}"
    return f"{Path(file).resolve()}:{name}"


def source_of(text: str) -> tuple[str, str] | None:
    """The file that `load` finds a name in, and its sha256; None where there is no such file."""
    place = text.rpartition(":")[0]
    if not place.endswith(".py"):
        place = getattr(sys.modules.get(place), "__file__", None) or ""
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        return None
    # That of what was run: the file may have been edited since.
    return str(file), _RUN.get(str(file)) or hashlib.sha256(file.read_bytes()).hexdigest()


def named(value: str | Callable[..., Any], setting: str) -> str:
    """What a setting keeps of its value: one of our own choices as it is, anything of the user's
    by a name that holds in every folder and process (`Own`).

    Raises:
        ValueError: naming the setting, if nothing can be found by that name.
    """
    try:
        if isinstance(value, str):
            return Own(reference(load(value))) if ":" in value else value
        return Own(reference(value))
    except ValueError as error:
        raise ValueError(f"{setting}={error}") from error


def _from_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    for module in list(sys.modules.values()):
        # Run a second time, its functions would be other objects than those already in use.
        if getattr(module, "__file__", None) == str(file):
            return module
    if str(file.parent) not in sys.path:
        # At the end, so that no file beside it can stand in for a module of ours.
        sys.path.append(str(file.parent))
    return _run(file)


def is_own_file(path: str) -> bool:
    """Whether `load` ran this file: what fails in it is told with its place."""
    return path in _RUN


def _run(file: Path) -> ModuleType:
    _RUN[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{file}{_line(error, file)}: {type(error).__name__}: {error}") from error
    return module


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name}: cannot be imported ({error})") from error


def _line(error: Exception, file: Path) -> str:
    """`:12`, where the file's own code failed; nothing for a file that cannot be parsed."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return f":{lines[-1]}" if lines else ""
