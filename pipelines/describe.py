"""What a data set holds, before a run is paid for: `python pipelines/describe.py PATH`.

PATH is what `--data` of `train/main.py` takes: CSV, JSONL or parquet files of questions, or of
conversations for the cold start; without it, the needle world is described. Needs no accelerator.
"""

import os
import os.path
import sys

# Run as a script, `sys.path[0]` is this folder, where `import pipelines` would find
# somebody else's. Swap it for the repository root before any other import.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from paravt_jax.failures import attempt
from paravt_jax.flags import Parser
from paravt_jax.plugins import load
from paravt_jax.records import Conversation, Row, VideoRef
from pipelines.budget import shares
from pipelines.datasets import (
    Found,
    contents,
    needle_questions,
    question_rows,
    sft_rows,
)
from pipelines.media_check import check_media
from pipelines.needle.world import NeedleWorld
from pipelines.preprocess import SPECS, FrameSpec
from pipelines.video import VideoReader

SAMPLE = 512
"""Rows, evenly chosen, that sizes and tokens are computed from."""
REASONS = 10
"""Rejected rows that are shown."""


def make_parser() -> argparse.ArgumentParser:
    """The flags; defaults are those of the recipes."""
    parser = Parser(prog="pipelines/describe.py", description=__doc__)
    add = parser.add_argument
    add("path", nargs="?", help="file or folder of the data; none: the needle world")
    add("--root", help="folder below which the videos lie (default: the folder of the data)")
    add("--reader", help="your function from records to questions, as path/to/file.py:name")
    add("--model", help="Hugging Face folder whose tokenizer counts and shows the words")
    add("--budgets", default="4,8,16,32,64", help="choices of K (default: %(default)s)")
    add("--frames-as", choices=tuple(SPECS), default="image", help="(default: %(default)s)")
    add("--pixels", default="784,50176", help="fewest and most of a frame (default: %(default)s)")
    add("--cache", default="data", help="where the needle world's videos are (default: data)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = make_parser().parse_args(argv)

    def tell() -> None:
        for line in report(arguments):
            print(line)

    return attempt(tell)


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the description.

    Raises:
        ValueError: the data or the model folder cannot be read, or a flag is no number.
    """
    budgets, pixels = (
        _numbers("--budgets", arguments.budgets),
        _numbers("--pixels", arguments.pixels),
    )
    if len(pixels) != 2:
        raise ValueError(f"--pixels {arguments.pixels}: give two numbers, fewest and most")
    renderer = open_renderer(arguments, (pixels[0], pixels[1]))
    spec = renderer.spec if renderer else SPECS[arguments.frames_as]().limited(*pixels)
    questions_only = not arguments.path or arguments.reader
    kinds = ("questions",) if questions_only else contents(arguments.path)
    if "questions" in kinds:
        data = read_questions(arguments, renderer)
        yield from about_questions(data, spec, budgets, renderer)
    if "conversations" in kinds:
        yield from about_conversations(read_conversations(arguments, renderer), spec, renderer)


def open_renderer(arguments: argparse.Namespace, pixels: tuple[int, int]) -> Any:
    """The renderer of `--model`, if it is given. Importing tokenizers takes seconds."""
    if arguments.model is None:
        return None
    from paravt_jax.protocol import CROP_VIDEO_TOOL
    from pipelines.render import ChatRenderer

    return ChatRenderer.from_folder(
        arguments.model, arguments.frames_as, pixels=pixels, tools=[CROP_VIDEO_TOOL]
    )


def read_questions(arguments: argparse.Namespace, renderer: Any = None) -> Found[Row]:
    """The questions of a data set that a renderer can put into prompts, or of the needle world."""
    if arguments.path:
        check = renderer.check_question if renderer else lambda row: None
        reader = load(arguments.reader) if arguments.reader else None
        return question_rows(arguments.path, arguments.root, check=check, reader=reader)
    folder = os.path.join(os.path.abspath(arguments.cache), "needle_world")
    questions = needle_questions(NeedleWorld(), folder, "train", ("oe", "tvg", "mcq"))
    return Found([question.row for question in questions])


def read_conversations(arguments: argparse.Namespace, renderer: Any = None) -> Found[Conversation]:
    """The conversations of a data set that a renderer's tokenizer can write."""
    if not renderer:
        return sft_rows(arguments.path, arguments.root)
    from pipelines.conversation import TextCheck

    return sft_rows(arguments.path, arguments.root, TextCheck(renderer.tokenizer))


def about_questions(
    data: Found[Row], spec: FrameSpec, budgets: Sequence[int], renderer: Any
) -> Iterator[str]:
    """Counts, lengths, tokens, an example."""
    rows = data.rows
    yield f"questions: {len(rows)} of {data.total} rows can be used"
    yield f"  types: {_counts(row.question_type for row in rows)}"
    yield f"  with evidence windows: {sum(bool(row.evidence) for row in rows)}"
    yield from _about_videos([row.videos for row in rows])
    yield from _about_rejected(data)
    reader = VideoReader(spec=spec)
    media = check_media(rows, reader)
    yield from media.report()
    rows = [row for row in rows if media.shows(row)]
    if not rows:
        raise ValueError("no question has videos that can be decoded")
    some = evenly_chosen(rows)
    yield f"tokens of a prompt, {len(some)} rows (frames of {spec.mode}s):"
    yield "      K  vision: median      max" + ("  room of a prompt" if renderer else "")
    for budget in budgets:
        yield _budget_line(some, budget, spec, reader, renderer)
    if not renderer:
        yield "  give --model to count and show the words"
    yield from _example(rows[0], min(budgets), reader, renderer)


def _budget_line(
    rows: Sequence[Row], budget: int, spec: FrameSpec, reader: VideoReader, renderer: Any
) -> str:
    fitting = [row for row in rows if len(row.videos) <= budget]
    if not fitting:
        return f"{budget:7}  every row has more videos"
    vision = [vision_tokens(row.videos, budget, spec, reader) for row in fitting]
    line = f"{budget:7} {int(np.median(vision)):15,} {max(vision):8,}"
    if renderer:
        from pipelines.sizes import prompt_tokens

        line += f" {prompt_tokens(renderer, fitting, budget):17,}"
    return line


def vision_tokens(
    videos: Sequence[VideoRef], budget: int, spec: FrameSpec, reader: VideoReader
) -> int:
    """Vision tokens of an overview of `budget` frames of these videos together."""
    counts = shares(budget, len(videos))
    return sum(
        _video_tokens(v, count, spec, reader) for v, count in zip(videos, counts, strict=True)
    )


def _video_tokens(video: VideoRef, count: int, spec: FrameSpec, reader: VideoReader) -> int:
    info = reader.info(video)
    count = min(count, info.frames)
    height, width = spec.target_size(info.height, info.width, count)
    return spec.group_count(count) * (height // spec.factor) * (width // spec.factor)


def _example(row: Row, budget: int, reader: VideoReader, renderer: Any) -> Iterator[str]:
    yield f"example {row.row_id} ({row.question_type}), answer {row.answer!r}:"
    if renderer is None:
        yield from _indented(row.question)
        return
    counts = shares(max(budget, len(row.videos)), len(row.videos))
    frames = [reader.overview(*pair) for pair in zip(row.videos, counts, strict=True)]
    prompt = renderer.main_prompt(row, frames, tools=True)
    yield from _indented(shortened(renderer.decode(prompt.tokens)))


def about_conversations(data: Found[Conversation], spec: FrameSpec, renderer: Any) -> Iterator[str]:
    """Counts, lengths, an example."""
    rows = data.rows
    messages = [message for row in rows for message in row.messages]
    words = [
        [len(p) for m in row.messages for p in m.content if isinstance(p, str)] for row in rows
    ]
    yield f"conversations: {len(rows)} of {data.total} rows can be used"
    yield f"  messages: {_counts(message.role for message in messages)}"
    yield f"  characters of a conversation: {_range([sum(row) for row in words], '{:,.0f}')}"
    yield from _about_videos([row.videos for row in rows])
    yield from _about_rejected(data)
    yield from check_media(rows, VideoReader(spec=spec)).report()
    if renderer:
        some = evenly_chosen(rows)
        counts = [_word_tokens(row, renderer) for row in some]
        yield f"tokens of words, {len(some)} conversations: {_range(counts, '{:,.0f}')}"
    else:
        yield "  give --model to count the words in tokens"
    yield f"example {rows[0].row_id}:"
    for message in rows[0].messages:
        yield from _indented(f"{message.role}: " + "".join(map(_part_text, message.content)))


def _word_tokens(row: Conversation, renderer: Any) -> int:
    texts = (part for m in row.messages for part in m.content if isinstance(part, str))
    return sum(len(renderer.encode(text)) for text in texts)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = "video" if isinstance(part, VideoRef) else "image"
    return f"<{kind} {os.path.basename(part.path)}>"


def _about_videos(videos: Iterable[Sequence[VideoRef]]) -> Iterator[str]:
    """Lengths of distinct videos, and how many a row shows."""
    each = list(videos)
    distinct = {video.path: video.duration for shown in each for video in shown}
    hours = sum(distinct.values()) / 3600
    yield f"  videos of a row: {_counts(len(shown) for shown in each)}"
    seconds = _range(distinct.values(), "{:,.1f}")
    yield f"  {len(distinct)} videos, {hours:.2f} h, seconds: {seconds}"


def _about_rejected(data: Found) -> Iterator[str]:
    yield "files by first folder below the root: used, missing, unreadable"
    for name, bucket in data.buckets.items():
        used = bucket.files - bucket.missing - bucket.unreadable
        yield f"  {name}: {used}, {bucket.missing}, {bucket.unreadable}"
    if data.restated:
        yield f"choice answers that were read as the letter of an option: {data.restated}"
    if data.rejected:
        kinds = (f"{len(rows)} x {kind}" for kind, rows in data.faults.items())
        yield f"why rows are rejected: {', '.join(kinds)}"
        yield f"rejected rows, {min(REASONS, len(data.rejected))} of {len(data.rejected)}:"
    for rejected in data.rejected[:REASONS]:
        yield f"  {rejected.where}: {rejected.reason}"


def evenly_chosen(rows: Sequence) -> list:
    """At most `SAMPLE` rows, evenly chosen."""
    chosen = np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)), dtype=int)
    return [rows[index] for index in chosen]


def shortened(text: str) -> str:
    """Prompt text with each run of vision padding as one mark and its length."""
    return re.sub(
        r"(<\|(?:image|video)_pad\|>)\1+",
        lambda run: f"{run[1]}x{len(run[0]) // len(run[1])}",
        text,
    )


def _counts(values: Iterable[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(values).items()))


def _range(values: Iterable[float], form: str) -> str:
    numbers = np.array(list(values) or [0])
    names = {"least": numbers.min(), "median": np.median(numbers), "most": numbers.max()}
    return ", ".join(f"{name} {form.format(value)}" for name, value in names.items())


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{flag} {text}: give whole numbers, separated by commas") from error
    if min(numbers) < 1:
        raise ValueError(f"{flag} {text}: give numbers of 1 or more")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
