"""How a benchmark is run and scored, read from a TOML file that anybody can copy and change.

    protocol = load("paravt")                       # or load("my/protocol.toml")
    rules = protocol.rules("videomme", Kind.CHOICE, "agentic")
    shown = rules.video.indices(info.frames, fps)
    messages = rules.messages(sample, Seen(shown, info.frames, fps))
    verdict = scoring.score(rules, sample, text)

A file holds tables of settings, the later of which overrule the earlier:

    [all]                  every question
    [all.mcq]              those of one kind: mcq, open, grounding
    [mode.agentic]         one mode; [mode.agentic.grounding] one kind in it
    [task.lvbench]         one task; [task.mmvu_val.open] one kind of it
    [task.lvbench.mode.agentic]

Each may hold the sections `prompt`, `video`, `subtitles`, `decoding`, `agent` and `scoring`. With
`extends = "lmms-eval"`, or a path, a file holds only what differs from another one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from evaluate.benchmarks.captions import Seen, SubtitleRules, interleaved
from evaluate.benchmarks.frames import FrameRules
from evaluate.benchmarks.rules import (
    AgentRules,
    DecodingRules,
    PromptRules,
    ScoringRules,
)
from evaluate.benchmarks.sample import Kind, Sample
from paravt_jax.settings import Refused, any_of, describe_choices, hints_of, plain_type

SHIPPED = Path(__file__).parent / "protocols"
MODES = ("direct", "reasoning", "agentic", "sequential")
OWN = "own"
"""The task whose rules hold for files of one's own."""
_HEAD = ("about", "source", "extends", "modes", "not_reproducible", "all", "mode", "task")
_NAME = re.compile(r"\{(\w+)\}")

T = TypeVar("T")
Table = dict[str, Any]


class Span(NamedTuple):
    """Frames `start` to `stop` of those that the protocol shows, `stop` not included."""

    start: int
    stop: int


Part = str | Span


@dataclasses.dataclass(frozen=True)
class Messages:
    """A system text, then one user turn of words and frames in their order."""

    system: str
    """May be empty: then there is no such message."""
    parts: tuple[Part, ...]
    tools: bool = False
    """Whether the chat template describes the tools. Not where the system text does."""
    own_words: bool = False
    """Whether the agent's own system text, with which it was trained, stands before `system`."""

    @property
    def text(self) -> str:
        """The words of the user turn."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a protocol says about one kind of question of one task in one mode."""

    protocol: str
    task: str
    kind: Kind
    mode: str
    prompt: PromptRules
    video: FrameRules
    subtitles: SubtitleRules
    decoding: DecodingRules
    agent: AgentRules
    scoring: ScoringRules

    def messages(self, sample: Sample, seen: Seen) -> Messages:
        """What is put to the model.

        Args:
            seen: the frames shown, from `video.indices`.

        Raises:
            ValueError: subtitles cannot be read.
        """
        frames = len(seen.indices)
        words = self._words(sample, seen)
        parts: list[Part] = []
        for piece in re.split(
            r"(\{video\}|\{interleaved\})", self.prompt.user + self.prompt.suffix
        ):
            if piece == "{video}":
                parts.append(Span(0, frames))
            elif piece == "{interleaved}":
                parts += _woven(interleaved(sample, self.video.frames, frames))
            else:
                parts.append(filled(piece, words))
        shown = [part for part in parts if part and part != Span(0, 0)]
        prompt = self.prompt
        return Messages(prompt.system, _joined(shown), prompt.tools, prompt.own_words)

    def _words(self, sample: Sample, seen: Seen) -> dict[str, str]:
        prompt = self.prompt
        lettered = {letter: sample.choice(letter) for letter in sample.letters}
        options = [
            filled(prompt.option, {"letter": letter, "option": text, "text": lettered[letter]})
            for letter, text in zip(sample.letters, sample.options, strict=True)
        ]
        return lettered | {
            "question": sample.question,
            "stem": sample.stem,
            "options": "\n".join(options),
            "instruction": prompt.instruction,
            "subtitles": self.subtitles.text(sample, seen),
            "video_name": Path(sample.video).name,
        }


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A protocol as its file says."""

    name: str
    file: str
    about: str
    source: str
    modes: tuple[str, ...]
    """Modes that it knows; the first is the default."""
    not_reproducible: tuple[str, ...]
    """What its harness draws without a seed, and we with one."""
    tables: Mapping[str, Any]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that it knows, without those of one's own files."""
        return tuple(task for task in self.tables["task"] if task != OWN)

    def rules(self, task: str, kind: Kind, mode: str = "") -> Rules:
        """What it says about a kind of question of a task.

        Args:
            task: its name, or `own` for a file of one's own.
            mode: one of its modes; empty for the first.

        Raises:
            ValueError: it does not know the task or the mode.
        """
        mode = mode or self.modes[0]
        if mode not in self.modes:
            raise ValueError(f"--mode {mode}: {self.name} knows {any_of(self.modes)}; choose one")
        if task not in self.tables["task"]:
            raise ValueError(
                f"--benchmarks {task}: the protocol {self.name} has no such task; choose "
                f"{any_of(self.tasks)}, or write [task.{task}] into a copy of {self.file}"
            )
        return self._resolved(task, kind, mode)

    def _resolved(self, task: str, kind: Kind, mode: str) -> Rules:
        own, modes = self.tables["task"][task], self.tables["mode"]
        layers = [self.tables["all"], modes.get(mode, {}), own, own.get("mode", {}).get(mode, {})]
        merged: Table = {}
        for layer in layers:
            merged = _merge(_merge(merged, _sections(layer)), _sections(layer.get(kind, {})))
        sections = {
            name: _section(cls, merged.get(name, {}), name, f"{self.file}: [task.{task}], {kind}")
            for name, cls in SECTIONS.items()
        }
        return Rules(self.name, task, kind, mode, **sections)


SECTIONS: dict[str, type] = {
    "prompt": PromptRules,
    "video": FrameRules,
    "subtitles": SubtitleRules,
    "decoding": DecodingRules,
    "agent": AgentRules,
    "scoring": ScoringRules,
}


def names() -> list[str]:
    """The protocols that come with this project."""
    return sorted(str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.toml"))


def load(name: str) -> Protocol:
    """A protocol by its name, or from a file.

    Raises:
        ValueError: there is none, or it says what cannot be; the message names the file, what is
            wrong in it, and what to write instead.
    """
    path = Path(name).resolve() if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    if not path.is_file():
        raise ValueError(
            f"--protocol {name}: choose {any_of(names())}, or give a file that ends in .toml"
        )
    tables = _read(path, ())
    modes = tuple(tables.get("modes", ["direct"]))
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"{path}: modes = {list(modes)}: list some of {any_of(MODES)}")
    protocol = Protocol(
        _own_name(path, tables),
        str(path),
        tables.get("about", ""),
        tables.get("source", ""),
        modes,
        tuple(tables.get("not_reproducible", [])),
        {"all": {}, "mode": {}, "task": {}} | tables,
    )
    for task, mode, kind in _combinations(protocol):
        protocol.rules(task, kind, mode)
    return protocol


def _own_name(path: Path, tables: Table) -> str:
    """What a file is called in reports: a changed copy not as what it was copied from."""
    if SHIPPED in path.parents:
        return str(path.relative_to(SHIPPED).with_suffix(""))
    if path.stem in names() and tables != _read(SHIPPED / path.name, ()):
        raise ValueError(
            f"--protocol {path}: {path.stem} is a protocol of this project, and this file says "
            "something else; give it a name of its own, as the name stands in every row of a report"
        )
    return path.stem


def _combinations(protocol: Protocol) -> Iterable[tuple[str, str, Kind]]:
    for task in protocol.tables["task"]:
        for mode in protocol.modes:
            yield from ((task, mode, kind) for kind in Kind)


def _read(path: Path, extending: tuple[Path, ...]) -> Table:
    """A file's tables upon those of the one that it extends."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no protocol can be read ({error}); mend the file") from error
    _check_names(path, tables)
    base = tables.pop("extends", "")
    if not base:
        return tables
    below = path.parent / base if base.endswith(".toml") else SHIPPED / f"{base}.toml"
    if below in extending or not below.is_file():
        why = "extends itself" if below in extending else "is not there"
        raise ValueError(f"{path}: extends = {base!r}: {below} {why}; name {any_of(names())}")
    return _merge(_read(below, (*extending, path)), tables)


def _check_names(path: Path, tables: Table) -> None:
    """Refuse what would be read by nobody: a typing mistake would change nothing, silently."""
    _known(path, "", tables, _HEAD)
    _layer(path, "all", tables.get("all", {}), ())
    _known(path, "mode", tables.get("mode", {}), MODES)
    for mode, layer in tables.get("mode", {}).items():
        _layer(path, f"mode.{mode}", layer, ())
    for task, layer in _table(path, "task", tables.get("task", {})).items():
        _layer(path, f"task.{task}", layer, ("mode",))
        _known(path, f"task.{task}.mode", layer.get("mode", {}), MODES)
        for mode, inner in layer.get("mode", {}).items():
            _layer(path, f"task.{task}.mode.{mode}", inner, ())


def _layer(path: Path, place: str, layer: Any, more: tuple[str, ...]) -> None:
    _known(path, place, layer, (*SECTIONS, *Kind, *more))
    for kind in Kind:
        _known(path, f"{place}.{kind}", layer.get(kind, {}), tuple(SECTIONS))


def _table(path: Path, place: str, value: Any) -> Table:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {place} = {value!r}: write a table, [{place}]")
    return value


def _known(path: Path, place: str, table: Any, known: Iterable[str]) -> None:
    for name in _table(path, place, table):
        if name not in known:
            where = f"{place}.{name}" if place else name
            raise ValueError(f"{path}: {where} is unknown; write {any_of(known)}")


def _sections(layer: Mapping[str, Any]) -> Table:
    return {name: table for name, table in layer.items() if name in SECTIONS}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Table:
    """Both tables; where both have a value, that of `above`."""
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[name] = _merge(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _section(cls: type[T], table: Table, name: str, where: str) -> T:
    """A section from its table.

    Raises:
        ValueError: naming the file, the key and what may stand there.
    """
    hints = hints_of(cls)
    for key, value in table.items():
        if key not in hints:
            choices = any_of(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
            raise ValueError(f"{where}: {name}.{key} is unknown; write {choices}")
        if not _fits(value, plain_type(hints[key])):
            choices = describe_choices(hints[key]) or _told(plain_type(hints[key]))
            raise ValueError(f"{where}: {name}.{key} = {value!r}: write {choices}")
    try:
        return cls(**{key: _frozen(value) for key, value in table.items()})
    except Refused as error:
        raise ValueError(f"{where}: {error.within(f'{name}.')}") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of TOML can stand where this type is wanted."""
    if listed := typing.get_origin(kind) is typing.Literal and typing.get_args(kind):
        return value in listed
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, list) and all(_fits(part, inner) for part in value)
    numbers = {float: (int, float), int: (int,)}.get(kind)
    if numbers:
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def _told(kind: Any) -> str:
    """What a value of this type is called in TOML."""
    if typing.get_origin(kind) is tuple:
        return f"a list of {_told(typing.get_args(kind)[0]).removeprefix('a ')}s"
    return {bool: "true or false", str: "a text", int: "an integer", float: "a number"}[kind]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def filled(template: str, words: Mapping[str, str]) -> str:
    """A template with its names replaced. Other braces stay, and words are not searched again."""
    return _NAME.sub(lambda match: words.get(match[1], match[0]), template)


def _woven(shown: list[int | str]) -> list[Part]:
    """Frames and lines, one line each, the last without its end."""
    parts: list[Part] = []
    for number, part in enumerate(shown):
        parts.append(Span(part, part + 1) if isinstance(part, int) else part)
        parts += ["\n"] if number + 1 < len(shown) else []
    return parts


def _joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbouring words as one text."""

    def add(done: tuple[Part, ...], part: Part) -> tuple[Part, ...]:
        if done and isinstance(part, str) and isinstance(done[-1], str):
            return (*done[:-1], done[-1] + part)
        return (*done, part)

    return functools.reduce(add, parts, ())
