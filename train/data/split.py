"""Which questions train and which are held out. No video is shown in both."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence

from paravt_jax.records import Row


@dataclasses.dataclass(frozen=True)
class QuestionSplit:
    """Questions of a run."""

    training: list[list[Row]]
    """Of each data set."""
    held_out: list[Row]
    unused: int = 0
    """Questions that can neither train nor be evaluated on: they share a video with held-out
    ones, of which there are enough."""

    def report(self) -> str:
        """How many of which, in one line."""
        training = [row for rows in self.training for row in rows]
        return (
            f"{_counted(training)} train, {_counted(self.held_out)} are held out, "
            f"{self.unused:,} questions are left unused"
        )


def split(sets: Sequence[Sequence[Row]], held_out: int) -> QuestionSplit:
    """Hold out questions of the first data set; see `hold_out`.

    Raises:
      ValueError: nothing would be left to train on.
    """
    out = hold_out(sets[0], held_out)
    parts = apart(sets, out)
    if not parts.training[0]:
        raise ValueError(
            f"evaluation.rows={held_out} holds out every video of the {len(sets[0])} questions and "
            "leaves none to train on; lower it"
        )
    return dataclasses.replace(parts, unused=parts.unused - len(out))


def apart(sets: Sequence[Sequence[Row]], held_out: list[Row]) -> QuestionSplit:
    """Train on what shows no video of the held-out questions, which are of another data set."""
    training = [without_videos(rows, held_out) for rows in sets]
    return QuestionSplit(training, held_out, sum(map(len, sets)) - sum(map(len, training)))


def hold_out(rows: Sequence[Row], number: int) -> list[Row]:
    """That many questions, about whole videos as far as possible.

    Videos are taken in the order of a hash of their names, passing over those with which the
    number cannot be met exactly. If no videos have so many questions together, the fewest possible
    are left over. All rows if there are not more.
    """
    groups = related(rows)
    chosen = _least_sum([len(group) for group in groups], number)
    return [row for at in chosen for row in groups[at]][:number]


def related(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share videos, directly or through others, together; in the order of a hash of the
    name of a video, which is the same wherever the videos lie."""
    leader: dict[str, str] = {}

    def find(path: str) -> str:
        while leader.setdefault(path, path) != path:
            leader[path] = path = leader[leader[path]]
        return path

    for row in rows:
        for video in row.more_videos:
            leader[find(video.path)] = find(row.video.path)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(find(row.video.path), []).append(row)
    return sorted(groups.values(), key=lambda group: min(map(_name_hash, group)))


def _least_sum(sizes: Sequence[int], least: int) -> list[int]:
    """Positions of numbers that sum up to the least possible sum of `least` or more: of all such
    choices the one that takes the first numbers. All of them if they are not more together."""
    # Bit t of reach[i]: some of the numbers from the i-th on sum up to t.
    reach, mask = [1], (1 << (least + max(sizes, default=0))) - 1
    for size in reversed(sizes):
        reach.append((reach[-1] | reach[-1] << size) & mask)
    reach.reverse()
    enough = reach[0] >> least
    if not enough:
        return list(range(len(sizes)))
    left = least + (enough & -enough).bit_length() - 1
    chosen: list[int] = []
    for number, size in enumerate(sizes):
        if size <= left and reach[number + 1] >> (left - size) & 1:
            chosen.append(number)
            left -= size
    return chosen


def one_per_video(rows: Sequence[Row]) -> list[Row]:
    """One question about each video, chosen by a hash, so that all kinds of question occur."""
    chosen: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: _hash(row.row_id)):
        chosen.setdefault(row.video.path, row)
    return sorted(chosen.values(), key=lambda row: row.row_id)


def without_videos(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """The rows that show no video of any of the other rows."""
    out = {video.path for row in others for video in row.videos}
    return [row for row in rows if not any(video.path in out for video in row.videos)]


def _counted(rows: Sequence[Row]) -> str:
    videos = {video.path for row in rows for video in row.videos}
    return f"{len(rows):,} questions about {len(videos):,} videos"


def _name_hash(row: Row) -> str:
    return min(_hash(os.path.basename(video.path)) for video in row.videos)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
