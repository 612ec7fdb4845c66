"""The tools of related systems: what their calls ask for, and what an episode makes of them."""

import json
from typing import get_args

import numpy as np
import pytest

from paravt_jax.protocol import parse_tool_calls, parses_strictly
from paravt_jax.records import Frames, Row, ToolCall
from paravt_jax.rewards import score
from paravt_jax.structure import anchor_tags
from paravt_jax.windows import (
    clip_frame_window,
    grounding_strategy,
    grounding_window,
)
from pipelines.render import ChatRenderer
from rollout.engine.sampler import SamplingConfig
from rollout.limits import AgentConfig, ToolName
from rollout.tools import MAKERS, TOOLS, agent_tools
from tests.support.needle import processor_folder
from tests.support.rollout_fakes import SentinelReader
from tests.support.scripted_episode import ANSWER, END, VIDEO, Episode, call, calls_turn
from train.agent import crop_size
from train.recipes import get_recipe
from train.settings.override import override
from train.setup import prompt_texts

FOREIGN = "/etc/passwd"
QUOTAS = (4, 8, 12)
VIDEO_O3 = {
    "tools": ("grounding",),
    "call_syntax": "grounding",
    "clip_tokens": QUOTAS,
    "dispatch": "sequential",
    "evidence": "frames",
}


class QuotaReader(SentinelReader):
    """Remembers the quotas of clips too."""

    def __init__(self) -> None:
        super().__init__()
        self.quotas: list[int | None] = []

    def clip(self, video, start, end, tokens=None):
        self.quotas.append(tokens)
        return super().clip(video, start, end, tokens)


def ground(start, end, strategy="medium", **more) -> str:
    body = {"temporal_segment": [start, end], "sampling_strategy": strategy, **more}
    return f"<grounding>{json.dumps(body)}</grounding>"


def clip_call(start, end, **more) -> ToolCall:
    times = {"start_time": start, "end_time": end}
    return ToolCall("get_video_clip_frame", times | more)


def segment(value, strategy: object = "medium") -> ToolCall:
    return ToolCall("grounding", {"temporal_segment": value, "sampling_strategy": strategy})


@pytest.mark.parametrize(
    ("start", "end", "outcome"),
    [
        (0, 64, (0, 64)),
        ("0:10", "12.5 s", (10, 12.5)),
        (10, 11.001, (10, 11.001)),
        (10, 11, "more than 1 second"),
        (20, 10, "more than 1 second"),
        (-0.5, 10, "must lie within 0 and 64"),
        (10, 64.5, "must lie within 0 and 64"),
        (None, 10, '"start_time" must be a number'),
    ],
)
def test_vital_refuses_what_leaves_the_video(start, end, outcome):
    found = clip_frame_window(clip_call(start, end), 64.0)
    assert found == outcome if isinstance(outcome, tuple) else outcome in found


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        ([3, 9], (3, 9)),
        ([-5, 200], (0, 64)),
        ([10, 11], (10, 11)),
        ([10, 10.9], "at least 1 second"),
        ([63.5, 80], "at least 1 second"),
        ([9, 3], "at least 1 second"),
        ([1, 2, 3], "list of two"),
        ("3, 9", "list of two"),
        ([True, 9], "two numbers"),
        ([float("nan"), 9], "two numbers"),
        (None, "list of two"),
    ],
)
def test_video_o3_clamps_to_the_video_and_wants_a_second(value, outcome):
    found = grounding_window(segment(value), 64.0)
    assert found == outcome if isinstance(outcome, tuple) else outcome in found


def test_strategies_are_three_words():
    names = ("coarse", "medium", "fine")
    assert [grounding_strategy(segment([0, 9], name)) for name in names] == [0, 1, 2]
    for wrong in ("Fine", None, ["fine"], 1):
        assert "sampling_strategy" in str(grounding_strategy(segment([0, 9], wrong)))


def test_each_syntax_reads_its_own_tag_alone():
    text = f"<think>x</think>\n{ground(3, 9)}{call()}"
    (own,) = parse_tool_calls(text, syntax="grounding")
    assert (own.name, own.error) == ("grounding", None)
    assert own.arguments == {"temporal_segment": [3, 9], "sampling_strategy": "medium"}
    assert [c.name for c in parse_tool_calls(text)] == ["crop_video"]
    broken = parse_tool_calls("<grounding>[1]</grounding><grounding>{", syntax="grounding")
    errors = [str(call.error) for call in broken]
    assert "one JSON object" in errors[0] and "never closed" in errors[1]
    with pytest.raises(ValueError, match="compat='fixed' only"):
        parse_tool_calls(text, "reference", syntax="grounding")
    with pytest.raises(ValueError, match="tool_call, grounding"):
        parse_tool_calls(text, syntax="xml")


def test_strict_turns_and_anchors_know_the_syntax():
    turn = f"<think>Look.</think>\n{ground(3, 9)}{END}"
    assert parses_strictly(turn, syntax="grounding") and not parses_strictly(turn)
    stray = "<think>Look.</think><answer>red<grounding></answer>"
    assert not parses_strictly(stray) and not parses_strictly(stray, syntax="grounding")
    assert "</grounding>" in anchor_tags("grounding") and "</tool_call>" in anchor_tags()


def test_video_o3_episode_looks_within_its_quota_and_never_elsewhere():
    reader = QuotaReader()
    turns = [
        f"I look.\n</think>{ground(3, 9, 'fine', video_path=FOREIGN)}{END}",
        f"Again.\n</think>{ground(-4, 90, 'coarse')}{END}",
        ANSWER,
    ]
    episode = Episode(*turns, reader=reader, max_tool_rounds=2, **VIDEO_O3)
    assert reader.clips == [(3, 9), (0, 64)] and reader.quotas == [12, 4]
    assert set(reader.opened) == {VIDEO.path}
    assert len(episode.trajectory.shown) == 2 and episode.trajectory.executed == 2
    assert episode.trajectory.call_syntax == "grounding" and not episode.trajectory.over_turn


@pytest.mark.parametrize(
    ("written", "response"),
    [
        (ground(3, 3.5), "at least 1 second"),
        (ground(3, 9, "finest"), "sampling_strategy"),
        ("<grounding>3 to 9</grounding>", "not valid JSON"),
        ("<grounding>{}", "never closed"),
    ],
)
def test_a_bad_grounding_is_an_error_response(written, response):
    episode = Episode(f"Hm.\n</think>{written}{END}", ANSWER, **VIDEO_O3)
    (said,) = episode.responses
    assert said.startswith("Error: ") and response in said
    assert (episode.trajectory.calls, episode.trajectory.executed) == (1, 0)


def test_a_rollout_that_calls_to_the_end_is_over_turn():
    look = f"I look.\n</think>{ground(3, 9)}{END}"
    stubborn = Episode(look, look, answer_tokens=400, **VIDEO_O3)
    assert stubborn.trajectory.over_turn and stubborn.trajectory.executed == 1
    assert not Episode(look, ANSWER, **VIDEO_O3).trajectory.over_turn


def test_vital_episode_shows_frames_and_refuses_short_clips():
    reader = QuotaReader()
    named = [
        call(*window).replace("crop_video", "get_video_clip_frame") for window in ((3, 9), (3, 4))
    ]
    config = {"tools": ("get_video_clip_frame",), "evidence": "frames", "dispatch": "sequential"}
    for written, executed in zip(named, (1, 0), strict=True):
        episode = Episode(calls_turn(written), ANSWER, reader=reader, **config)
        assert episode.trajectory.executed == executed == len(episode.trajectory.shown)
    assert "Error: end_time 4 must be more than 1 second after 3" in episode.responses
    assert reader.clips == [(3, 9)] and reader.quotas == [None]
    other = Episode(calls_turn(call(3, 9)), ANSWER, **config)
    assert "available: get_video_clip_frame" in other.responses[0]


def test_an_agent_has_the_tools_that_it_names():
    both = agent_tools(AgentConfig(tools=("get_video_clip_frame", "crop_video")))
    assert list(both) == ["get_video_clip_frame", "crop_video"] and list(TOOLS) == ["crop_video"]
    for name, tool in both.items():
        assert tool.name == name
    assert set(MAKERS) == set(get_args(ToolName))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"set AgentConfig\.tools=grounding"):
        AgentConfig(call_syntax="grounding")
    with pytest.raises(ValueError, match="go together"):
        AgentConfig(tools=("grounding",))
    with pytest.raises(ValueError, match="coarse, medium, fine"):
        AgentConfig(tools=("grounding",), clip_tokens=(1, 2))
    with pytest.raises(ValueError, match="stop at </tool_call>"):
        AgentConfig(sampling=SamplingConfig(stop=("</grounding>",)))


def test_responses_hold_no_tag_of_any_syntax():
    report = "red<grounding>[1, 9]</grounding><grounding>"
    episode = Episode(calls_turn(call()), ANSWER, report=lambda prompt: report + END)
    assert episode.responses == ["red[1, 9]"]


def test_format_rewards_read_the_syntax_of_the_rollout():
    """ParaVT's format score is the same for the same episode in another syntax."""
    last = "<think>I saw a red circle.</think><answer>red</answer>"
    looked = f"<think>I look at the part.</think>{ground(3, 9)}{END}"
    called = f"<think>I look at the part.</think>{call(3, 9)}{END}"
    own = score("", "red", turns=[looked, last], call_syntax="grounding", executed_calls=1)
    assert own == score("", "red", turns=[called, last], executed_calls=1)
    assert own.format == 1.0
    assert score("", "red", turns=[looked, last], executed_calls=1).format < 1.0


@pytest.mark.parametrize(
    ("recipe", "setting", "named"),
    [
        ("needle_video_o3", "rewards.scheme=longvt", "agent.call_syntax=tool_call"),
        ("needle_longvt", "rewards.scheme=video_o3", "agent.call_syntax=grounding"),
        ("needle_longvt", "agent.tools=zoom", "choose crop_video"),
        ("needle_video_o3_sft", "sft.task_masks=1.5", "between 0 and 1"),
        ("needle_sft", "sft.task_masks=0.1", "no effect"),
        ("needle_rl", "data.overview_tokens=7", "at least one|less than one"),
        ("needle_rl", "rl.mask_over_turn=maybe", "expected bool"),
    ],
)
def test_settings_of_related_systems_are_checked(recipe, setting, named):
    with pytest.raises(ValueError, match=named):
        override(get_recipe(recipe), [setting])


def renderer_of(config) -> ChatRenderer:
    schemas = [dict(tool.schema) for tool in agent_tools(config.agent).values()]
    texts, size = prompt_texts(config), (32 * 32, 64 * 64)
    return ChatRenderer.from_folder(processor_folder(), "image", texts, size, schemas)


@pytest.mark.parametrize(
    ("recipe", "instructions", "told", "untold"),
    [
        (
            "needle_longvt",
            "full",
            "call crop_video before answering: one call in a turn",
            "several",
        ),
        ("needle_longvt", "terse", "Tool: crop_video(start_time, end_time)", "call crop_video"),
        ("needle_vital", "full", "call get_video_clip_frame before", "crop_video"),
        ("needle_video_o3", "full", '<grounding>{"temporal_segment": [START, END]', "Tool:"),
        ("needle_video_o3", "terse", "Tool: <grounding>", "temporal_segment"),
        (
            "paravt_rl",
            "full",
            "call crop_video before answering, once for each part",
            "<grounding>",
        ),
    ],
)
def test_prompts_tell_of_the_tools_and_of_how_to_call_them(recipe, instructions, told, untold):
    config = override(get_recipe(recipe), [f"data.instructions={instructions}"])
    renderer = renderer_of(config)
    row = Row("row", VIDEO, "What colour?", "red")
    text = renderer.decode(renderer.main_prompt(row, None, tools=True).tokens)
    assert told in text and untold not in text
    assert told not in renderer.decode(renderer.main_prompt(row, None, tools=False).tokens)


def test_there_is_room_for_the_clip_of_every_strategy():
    """As many vision tokens as the quota, whether of many frames or of large ones, and the words
    around them; and no more room than the largest needs."""
    config = override(get_recipe("needle_video_o3"), ["data.instructions=full"])
    renderer = renderer_of(config)
    room, needed = crop_size(config.agent, config.data.crop_frames, renderer).tokens, []
    for quota in config.agent.clip_tokens:
        for count in range(1, renderer.spec.frames_within(quota) + 1):
            size = renderer.spec.size_within(480, 480, count, quota)
            frames = Frames(np.zeros((count, *size, 3), np.uint8), np.full(count, 12345.6))
            block = renderer.frames_turn([renderer.clip(frames, 12.5, 60.25)])
            assert renderer.decode(block.tokens).count("look again, or answer.") == 1
            needed.append(len(block.tokens) - len(renderer.tool_turn([""])))
    assert max(needed) <= room <= max(needed) + 20
