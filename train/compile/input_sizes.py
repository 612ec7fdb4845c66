"""Static sizes of all that an agent can put into the engine: prompts, tool responses, crops."""

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
from rollout.limits import CROP, MAIN, AgentConfig, token_budget
from train.agent import LONG_WINDOW, CropSize, crop_size
from train.data.settings import DataSettings


def agent_input_sizes(
    agent: AgentConfig,
    data: DataSettings,
    renderer: ChatRenderer,
    rows: Iterable[Row],
    hints: int = 0,
) -> dict[str, InputSizes]:
    """Sizes of what the slots of an `AgentMaker`'s engine can be given, for any of the questions
    shown with any of the frame budgets and a hint of at most `hints` tokens. (A video of fewer
    frames than its budget is not foreseen.)"""
    ends, crop = list(_ends(renderer, rows)), crop_size(agent, data.crop_frames, renderer)
    prompts = tuple(
        _main(data.overview_tokens, renderer, shortest, longest, budget, hints)
        for budget, (shortest, longest) in itertools.product(sorted(set(data.frame_budgets)), ends)
    )
    main = InputSizes(prompts, _given(agent, crop, renderer), agent.sampling)
    if agent.evidence == "frames":
        return {MAIN: main}
    crops = tuple(_crop(renderer, frames, crop.quota) for frames in range(1, crop.frames + 1))
    head = len(renderer.encode(renderer.opening))
    prefix = (SizeRange(0, head, head),) if head else ()
    return {MAIN: main, CROP: InputSizes(crops, prefix, agent.subagent_sampling)}


def _ends(renderer: ChatRenderer, rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """The shortest and the longest question about one video, about two, and so on."""
    by_videos: dict[int, list[Row]] = {}
    for row in rows:
        by_videos.setdefault(len(row.videos), []).append(row)
    for same in by_videos.values():
        lengths = [len(renderer.encode(renderer.request(row))) for row in same]
        yield same[lengths.index(min(lengths))], same[lengths.index(max(lengths))]


def _main(
    quota: int | None,
    renderer: ChatRenderer,
    shortest: Row,
    longest: Row,
    budget: int,
    hints: int,
) -> SizeRange:
    """Prompts of main agents with so many frames, and vision tokens for each video."""
    spec, videos = renderer.spec, len(longest.videos)

    def prompt(row: Row, time: float) -> Prompt:
        shown = [smallest_frames(spec, share, time) for share in shares(budget, videos)]
        return renderer.main_prompt(row, shown, tools=True)

    shown = quota and quota * videos
    extent = _extent(prompt(shortest, EARLY), prompt(longest, LATE), spec, shown)
    return dataclasses.replace(extent, most=extent.most + hints)


def _crop(renderer: ChatRenderer, frames: int, quota: int | None) -> SizeRange:
    """Prompts of sub-agents with so many frames."""
    early, late = (smallest_frames(renderer.spec, frames, time) for time in (EARLY, LATE))
    return _extent(
        renderer.subagent_prompt(early, 0.0, 1.0),
        renderer.subagent_prompt(late, *LONG_WINDOW),
        renderer.spec,
        quota,
    )


def _given(agent: AgentConfig, crop: CropSize, renderer: ChatRenderer) -> tuple[SizeRange, ...]:
    """What comes before a turn: its forced prefix, after responses from the second turn on."""
    room = token_budget(agent, renderer, crop.tokens)
    least, most = max(room.prefix, 1), room.prefix + room.response
    if agent.evidence == "text":
        return (SizeRange(0, least, most),)
    shown = agent.calls_run * crop.frames
    return tuple(SizeRange(frames, max(frames, least), most) for frames in range(shown + 1))


def _extent(shortest: Prompt, longest: Prompt, spec: FrameSpec, quota: int | None) -> SizeRange:
    frames = 0 if longest.patches is None else len(longest.patches.grids)
    return SizeRange(frames, len(shortest.tokens), full_size(longest, spec, quota))
