"""Subtitles as each harness puts them into a prompt."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np

from evaluate.benchmarks.sample import Sample
from paravt_jax.marks import Mark
from paravt_jax.ranges import at_least
from paravt_jax.settings import Settings

_FONT = re.compile(r'<font color="white" size=".72c">(.*?)</font>')
_MARKUP = re.compile(r"<[^>]+>")


class Seen(NamedTuple):
    """What a prompt shows of a video."""

    indices: Sequence[int]
    total: int
    """Frames of the video."""
    fps: float

    @property
    def times(self) -> list[float]:
        """Seconds of the frames shown, at a constant rate."""
        return [index / self.fps for index in self.indices]


class Cue(NamedTuple):
    """One subtitle: seconds, and its lines joined by spaces, markup and all."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class SubtitleRules(Settings):
    """Which subtitles stand in a prompt, and how."""

    style: Literal["none", "sampled", "per_frame", "seen", "all", "timed"] = "none"
    """`sampled`: those on screen at any of `frames` frames, once each (lmms-eval); `per_frame`: for
    each frame shown the one on screen, however often (VLMEvalKit); `seen`: those on screen at a
    frame shown (Qwen); `all`: every line (ParaVT); `timed`: every one with its time, as this
    project trains with them."""
    frames: Annotated[int, at_least(1)] = 32
    """Frames, evenly spaced, by which `sampled` chooses; not those that are shown."""
    head: Annotated[str, Mark.MAY_BE_BLANK] = ""
    """Stands before subtitles."""
    tail: Annotated[str, Mark.MAY_BE_BLANK] = ""
    """Stands after them."""
    absent: str = ""
    """Stands instead of all three where the video has none."""
    absent_if_blank: bool = True
    """Whether that holds, too, for a file of which no line is taken."""

    def text(self, sample: Sample, seen: Seen) -> str:
        """What `{subtitles}` stands for.

        Raises:
            ValueError: the file is no SubRip file in UTF-8.
        """
        if self.style == "none" or not os.path.isfile(sample.subtitles):
            return self.absent if self.style != "none" else ""
        words = _STYLES[self.style](cues(sample.subtitles), seen, self)
        if not words and self.absent_if_blank:
            return self.absent
        return f"{self.head}{words}{self.tail}"


def cues(path: str) -> list[Cue]:
    """The cues of a SubRip file in the order of the file.

    Raises:
        ValueError: it is none, or not in UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        blocks = [block.strip().split("\n") for block in re.split(r"\n\s*\n", text.strip())]
        return [_cue(lines) for lines in blocks if len(lines) >= 3]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; write SubRip in UTF-8 or remove the file") from error


def _cue(lines: Sequence[str]) -> Cue:
    start, end = lines[1].split(" --> ")
    return Cue(_seconds(start), _seconds(end.split()[0]), " ".join(lines[2:]))


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.strip().replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _sampled(cues: Sequence[Cue], seen: Seen, rules: SubtitleRules) -> str:
    """lmms-eval compares frame numbers, counts cues with the same times as one, whose words are
    those of the last, and knows only the white font of YouTube's downloads. It puts the chosen ones
    into a set, whose order is that of the file as long as their numbers are small."""
    frames = np.linspace(0, seen.total - 1, rules.frames, dtype=int)
    same = {(cue.start, cue.end): cue.text for cue in cues}
    shown = []
    for (start, end), text in same.items():
        first, last = int(start * seen.fps), int(end * seen.fps)
        if np.any((frames >= first) & (frames < last)) and (match := _FONT.search(text)):
            shown.append(match[1])
    return "\n".join(shown)


def _per_frame(cues: Sequence[Cue], seen: Seen, rules: SubtitleRules) -> str:
    shown = []
    for time in seen.times:
        now = round(1000 * time) / 1000  # pysubs2 counts in milliseconds
        on_screen = next((cue for cue in cues if cue.start < now < cue.end), None)
        if on_screen and (words := _plain(on_screen.text)).strip():
            shown.append(words)
    return "\n".join(shown)


def _seen(cues: Sequence[Cue], seen: Seen, rules: SubtitleRules) -> str:
    shown = [cue for cue in cues if any(cue.start < time < cue.end for time in seen.times)]
    return " ".join(words for cue in shown if (words := _plain(cue.text)).strip())


def _all(cues: Sequence[Cue], seen: Seen, rules: SubtitleRules) -> str:
    return "\n".join(words for cue in cues if (words := _plain(cue.text).strip()))


def _timed(cues: Sequence[Cue], seen: Seen, rules: SubtitleRules) -> str:
    shown = [(cue.start, " ".join(_plain(cue.text).split())) for cue in cues]
    return "\n".join(f"<{start:.1f} seconds> {words}" for start, words in sorted(shown) if words)


def _plain(text: str) -> str:
    return _MARKUP.sub("", text)


_STYLES: dict[str, Callable[[Sequence[Cue], Seen, SubtitleRules], str]] = {
    "sampled": _sampled,
    "per_frame": _per_frame,
    "seen": _seen,
    "all": _all,
    "timed": _timed,
}


def interleaved(sample: Sample, count: int, frames: int) -> list[int | str]:
    """LongVideoBench's subtitles between the frames that they belong to: numbers of frames and
    lines of text in the order of lmms-eval's `longvideobench_val_i`.

    Args:
        count: frames of the protocol, by which a long video is cut.
        frames: frames that are shown.
    """
    length = float(sample.doc["duration"])
    times = [length / count * n for n in range(count)] if length > count else range(int(length))
    shown: list[int | str] = []
    waiting = list(enumerate(times))
    for start, end, words in _spoken(sample, length):
        middle = (start + end) / 2
        while waiting and waiting[0][1] <= middle:
            shown.append(waiting.pop(0)[0])
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < time < end for time in times):
            shown.append(words)
    shown += [number for number, _ in waiting]
    return [part for part in shown if isinstance(part, str) or part < frames]


def _spoken(sample: Sample, length: float) -> list[tuple[float, float, str]]:
    """Lines with seconds in the piece that the video was cut from."""
    if not os.path.isfile(sample.subtitles):
        return []
    with open(sample.subtitles, encoding="utf-8") as file:
        listed = json.load(file)
    begin = float(sample.doc.get("starting_timestamp_for_subtitles") or 0)
    lines = []
    for line in listed:
        if "timestamp" in line:
            start, end = line["timestamp"]
            end, words = end if isinstance(end, float) else length, line["text"]
        else:
            start, end = _seconds(line["start"]), _seconds(line["end"])
            words = line["line"]
        lines.append((start - begin, end - begin, words))
    return lines
