"""Subtitles of a video: an `.srt` file beside it, as lines of text with times."""

from __future__ import annotations

import functools
import os
import re

from paravt_jax.fetched import local_file
from paravt_jax.records import VideoRef
from paravt_jax.remote import is_file, is_remote
from pipelines.faults import SUBTITLES

HEAD = "Subtitles:\n"
"""Stands before the subtitles in a prompt."""
KEPT = 4096
"""Files whose text is remembered: an epoch shows the same ones again."""

# Hours may be missing and a point may stand for the comma: WebVTT, and what many tools write.
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_CUE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}.*")
_MARKUP = re.compile(r"<[^<>]*>|\{\\[^}]*\}")


def subtitle_path(video: VideoRef) -> str:
    """Where the subtitles of a video are kept: its path with the ending `.srt`."""
    return os.path.splitext(video.path)[0] + ".srt"


class UnreadableSubtitles(ValueError):
    """A file of subtitles is none, or is not the video's own. The message names it and a remedy."""

    kind = SUBTITLES


def has_subtitles(video: VideoRef) -> bool:
    """Whether there is such a file."""
    return is_file(subtitle_path(video))


def subtitle_text(video: VideoRef) -> str:
    """The video's subtitles, one line `<t seconds> words` per cue; empty if it has none.

    Times are written as those of frames are, so that the model can put both in one order.

    Raises:
        UnreadableSubtitles: the file is no SubRip file in UTF-8, or a link that leads out of the
            folder of the video.
    """
    return _text(_own_path(video)) if has_subtitles(video) else ""


def _own_path(video: VideoRef) -> str:
    """Where the text itself is. Videos keep to the root of their data set; a link beside one must
    not lead to other files of this machine, whose text the model would read."""
    if is_remote(video.path):  # stores have no links
        return subtitle_path(video)
    written, folder = subtitle_path(video), os.path.realpath(os.path.dirname(video.path))
    path = os.path.realpath(written)
    if os.path.commonpath([folder, path]) != folder:
        raise UnreadableSubtitles(
            f"{written}: the link leads out of {folder}; put the file itself beside the video"
        )
    return path


@functools.lru_cache(KEPT)
def _text(path: str) -> str:
    cues = read_srt(path)
    lines = [f"<{start:.1f} seconds> {words}\n" for start, _, words in cues]
    return HEAD + "".join(lines) if lines else ""


def read_srt(path: str) -> list[tuple[float, float, str]]:
    """Start and end in seconds and words of each cue of a SubRip file, in order of time.

    Markup is dropped and the lines of a cue become one; cues without words are left out.

    Raises:
        UnreadableSubtitles: the file is no SubRip file in UTF-8.
    """
    try:
        with local_file(path) as copy, open(copy, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableSubtitles(
            f"{path}: {error}; write SubRip in UTF-8 or remove the file"
        ) from error
    cues = [_cue(block) for block in re.split(r"\n\s*\n", text.strip())]
    ordered = sorted(cue for cue in cues if cue is not None)
    if text.strip() and not ordered:
        raise UnreadableSubtitles(
            f"{path}: no cue `0:00:01,000 --> 0:00:02,000`; write SubRip or remove it"
        )
    return [cue for cue in ordered if cue[2]]


def _cue(block: str) -> tuple[float, float, str] | None:
    """The cue of a block of lines; None for a block without times."""
    lines = block.splitlines()
    for number, line in enumerate(lines):
        if match := _CUE.fullmatch(line):
            groups = match.groups()
            words = _MARKUP.sub("", " ".join(lines[number + 1 :]))
            return _seconds(*groups[:4]), _seconds(*groups[4:]), " ".join(words.split())
    return None


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    whole = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
    return whole + int(fraction.ljust(3, "0")) / 1000
