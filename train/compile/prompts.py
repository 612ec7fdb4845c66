"""All that an agent can be given to read, so that it can be compiled beforehand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from paravt_jax.records import Prompt, Row
from pipelines.budget import shares
from pipelines.preprocess import FrameSpec
from pipelines.render import ChatRenderer
from pipelines.sizes import EARLY, LATE, full_size, smallest_frames
from rollout.engine.precompile import InputSizes, SizeRange
from rollout.limits import CROP, MAIN, token_budget
from train.agent import LONG_WINDOW, crop_frames, crop_tokens
from train.config import Config


def agent_reads(
    config: Config,
    renderer: ChatRenderer,
    rows: Iterable[Row],
    budgets: Iterable[int],
    hints: int = 0,
) -> dict[str, InputSizes]:
    """Sizes of what the slot pools of `open_engine` can be given, for any of the questions shown
    with any of the frame budgets and a hint of at most `hints` tokens. (A video of fewer frames
    than its budget is not foreseen.)"""
    ends = list(_ends(renderer, rows))
    prompts = tuple(
        _main(config, renderer, shortest, longest, budget, hints)
        for budget, (shortest, longest) in itertools.product(sorted(set(budgets)), ends)
    )
    main = InputSizes(prompts, _given(config, renderer), config.agent.sampling)
    if config.agent.evidence == "frames":
        return {MAIN: main}
    most, quota = crop_frames(config, renderer.spec)
    crops = tuple(_crop(renderer, frames, quota) for frames in range(1, most + 1))
    head = len(renderer.encode(renderer.opening))
    given = (SizeRange(0, head, head),) if head else ()
    return {MAIN: main, CROP: InputSizes(crops, given, config.agent.subagent_sampling)}


def _ends(renderer: ChatRenderer, rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """The shortest and the longest question about one video, about two, and so on."""
    by_videos: dict[int, list[Row]] = {}
    for row in rows:
        by_videos.setdefault(len(row.videos), []).append(row)
    for same in by_videos.values():
        lengths = [len(renderer.encode(renderer.request(row))) for row in same]
        yield same[lengths.index(min(lengths))], same[lengths.index(max(lengths))]


def _main(
    config: Config, renderer: ChatRenderer, shortest: Row, longest: Row, budget: int, hints: int
) -> SizeRange:
    """Prompts of main agents with so many frames."""
    spec, quota, videos = renderer.spec, config.data.overview_tokens, len(longest.videos)

    def prompt(row: Row, time: float) -> Prompt:
        shown = [smallest_frames(spec, share, time) for share in shares(budget, videos)]
        return renderer.main_prompt(row, shown, tools=True)

    shown = quota and quota * videos
    extent = _extent(prompt(shortest, EARLY), prompt(longest, LATE), spec, shown)
    return dataclasses.replace(extent, most=extent.most + hints)


def _crop(renderer: ChatRenderer, frames: int, quota: int | None) -> SizeRange:
    """What sub-agents read about so many frames."""
    early, late = (smallest_frames(renderer.spec, frames, time) for time in (EARLY, LATE))
    return _extent(
        renderer.subagent_prompt(early, 0.0, 1.0),
        renderer.subagent_prompt(late, *LONG_WINDOW),
        renderer.spec,
        quota,
    )


def _given(config: Config, renderer: ChatRenderer) -> tuple[SizeRange, ...]:
    """What comes before a turn: its forced prefix, after responses from the second turn on."""
    agent, room = config.agent, token_budget(config.agent, renderer, crop_tokens(config, renderer))
    least, most = max(room.prefix, 1), room.prefix + room.response
    if agent.evidence == "text":
        return (SizeRange(0, least, most),)
    shown = agent.calls_run * crop_frames(config, renderer.spec)[0]
    return tuple(SizeRange(frames, max(frames, least), most) for frames in range(shown + 1))


def _extent(shortest: Prompt, longest: Prompt, spec: FrameSpec, quota: int | None) -> SizeRange:
    frames = 0 if longest.patches is None else len(longest.patches.grids)
    return SizeRange(frames, len(shortest.tokens), full_size(longest, spec, quota))
