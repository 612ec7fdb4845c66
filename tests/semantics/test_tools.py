"""The tools of related systems: what their calls ask for, and what an episode makes of them."""

import json

import pytest

from paravt_jax.protocol import parse_tool_calls, parses_strictly
from paravt_jax.records import ToolCall
from paravt_jax.structure import anchor_tags
from paravt_jax.windows import (
    clip_frame_window,
    grounding_strategy,
    grounding_window,
)
from rollout.limits import AgentConfig
from rollout.sampler import SamplingConfig
from rollout.tools import TOOLS, agent_tools
from tests.rollout_fakes import SentinelReader
from tests.semantics.test_episode import ANSWER, END, VIDEO, Episode, call, calls_turn

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
    with pytest.raises(ValueError, match="mode='strict' only"):
        parse_tool_calls(text, mode="repair", syntax="grounding")
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
    with pytest.raises(ValueError, match="known: crop_video, get_video_clip_frame, grounding"):
        agent_tools(AgentConfig(tools=("zoom",)))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="set tools=grounding"):
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
