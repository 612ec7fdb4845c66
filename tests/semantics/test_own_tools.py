"""A tool that is a plain function in a file of the user's: schema, arguments, frames and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest

from paravt_jax.plugins import Own
from paravt_jax.protocol import parse_tool_calls
from paravt_jax.records import Frames, VideoRef
from pipelines.decode import video_ref
from pipelines.preprocess import ImageSpec
from pipelines.video import VideoReader
from rollout.engine.grammar import DEAD, response_grammar
from rollout.limits import AgentConfig
from rollout.signature import Signature, WrongArguments
from rollout.tools import ToolContext, ToolError, agent_tools, function_tool
from tests.support.needle import renderer
from tests.support.rollout_fakes import SentinelReader
from tests.support.scripted_episode import ANSWER, VIDEO, Episode, calls_turn
from train.recipes import get_recipe
from train.settings.override import override
from train.setup import prompt_texts

ZOOM = Own(f"{Path(__file__).resolve().parents[2]}/examples/zoom_image.py:zoom_image")
SIDE = 256
SPEC = ImageSpec().limited(64 * 64, 64 * 64)


def call(name: str, **arguments) -> str:
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> VideoRef:
    """Four seconds; from the third on a small sign stands in the lower right: stripes that are too
    fine for the model's size of a frame."""
    path = str(tmp_path_factory.mktemp("videos") / "sign.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 8, (SIDE, SIDE))
    for index in range(32):
        image = np.full((SIDE, SIDE, 3), 40, np.uint8)
        if index >= 16:
            image[192:256, 192:256] = 128 + 100 * (-1) ** (np.arange(64) // 2)[None, :, None]
        writer.write(image)
    writer.release()
    return video_ref(path)


def context_of(video: VideoRef) -> ToolContext:
    return ToolContext(VideoReader(spec=SPEC), video, frame_budget=4)


def test_the_schema_is_the_signature_and_the_docstring():
    (tool,) = agent_tools(AgentConfig(tools=(ZOOM,))).values()
    own = tool.schema["function"]
    assert tool.name == own["name"] == "zoom_image"
    assert own["description"] == "Enlarge a part of the frame that the video shows at one moment."
    box = own["parameters"]["properties"]["box"]
    assert box["description"].startswith("Left, top, right") and box["items"]["type"] == "number"
    assert (box["minItems"], box["maxItems"]) == (4, 4)
    assert own["parameters"]["required"] == ["time", "box"]


def test_it_enlarges_from_the_full_resolution_file(video):
    """A frame as the model sees it blurs the stripes away; the enlarged part has them all."""
    (zoom,) = agent_tools(AgentConfig(tools=(ZOOM,))).values()
    (wanted,) = parse_tool_calls(call("zoom_image", time=3, box=[0.75, 0.75, 1, 1]))
    found = zoom.run(wanted, context_of(video))
    assert isinstance(found, Frames) and found.pixels.shape == (1, SIDE, SIDE, 3)
    assert found.times.tolist() == [3.0]
    assert contrast(SPEC.resize(found.pixels)[0]) > 2 * contrast(sign_of(context_of(video)))


def contrast(pixels: np.ndarray) -> float:
    return float(pixels.astype(float).std())


def sign_of(context: ToolContext) -> np.ndarray:
    """The sign in the last frame as the model sees all of it."""
    return context.overview(8).pixels[-1, 48:64, 48:64]


def test_a_moment_shows_the_frame_on_screen_then(video):
    frames = context_of(video).frames_at(3.99, 1.99, 2.0)
    assert frames.pixels.shape == (3, SIDE, SIDE, 3)
    assert [int(p[200:, 200:].std()) > 50 for p in frames.pixels] == [True, False, True]
    with pytest.raises(ToolError, match="outside of the video's 4"):
        context_of(video).frames_at(4.5)


def test_frames_of_any_size_are_shown_at_the_size_of_the_model():
    own = renderer()
    shown = own.resized(Frames(np.zeros((1, 37, 501, 3), np.uint8), np.zeros(1)))
    clip = own.clip(shown, 0.0, 0.0)
    assert shown.pixels.shape[1:3] == own.spec.target_size(37, 501, 1) and len(clip.times) == 1


@pytest.mark.parametrize("evidence", ["frames", "text"])
def test_an_episode_with_it(evidence):
    """It is called beside crops; its frames are shown, or a sub-agent reports on them."""
    reader = SentinelReader()
    turn = calls_turn(
        call("zoom_image", time=3, box=[0, 0, 0.5, 0.5]),
        call("crop_video", start_time=0, end_time=8),
    )
    tools = (ZOOM, "crop_video")
    episode = Episode(turn, ANSWER, reader=reader, tools=tools, evidence=evidence)
    assert episode.trajectory.executed == 2 and set(reader.opened) == {VIDEO.path}
    if evidence == "text":
        assert episode.asked == ["3 3", "0 8"]
    else:
        (shown,) = episode.trajectory.shown
        assert len(shown.block.patches.grids) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"time": 3}, '"box" is missing: it must be a list of 4, each a number'),
        ({"time": "soon", "box": [0, 0, 1, 1]}, "\"time\" must be a number, not 'soon'"),
        ({"time": True, "box": [0, 0, 1, 1]}, '"time" must be a number, not True'),
        ({"time": 3, "box": [0, 0, 1]}, '"box" must be a list of 4'),
        ({"time": 3, "box": [0, 0, 1, "x"]}, '"box" must be a list of 4'),
        ({"time": 3, "box": [0.5, 0, 0.5, 1]}, "is empty or leaves the frame"),
        ({"time": 99, "box": [0, 0, 1, 1]}, "99 seconds lie outside of the video's 64"),
        ({"time": 3, "box": [0, 0, 1, 1], "video_path": "/etc/passwd"}, "no argument 'video_path'"),
    ],
)
def test_a_bad_call_is_an_error_response(arguments, said):
    reader = SentinelReader()
    turn = calls_turn(call("zoom_image", **arguments))
    episode = Episode(turn, ANSWER, reader=reader, tools=(ZOOM,))
    (response,) = episode.responses
    assert response.startswith("Error: ") and said in response
    assert not episode.trajectory.executed and set(reader.opened) <= {VIDEO.path}


MINE = '''
def length(context):
    """Tell how long the video is."""
    return f"{context.duration:g} seconds, {context.frame_budget} frames shown"

def broken() -> str:
    """Fail."""
    raise RuntimeError("/secret/path")

def wrong() -> str:
    """Return what is neither words nor frames."""
    return 3
'''


def test_functions_given_as_such_or_by_name(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    names = [Own(f"{tmp_path}/mine.py:{name}") for name in ("length", "broken", "wrong")]
    turn = calls_turn(*(call(name) for name in ("length", "broken", "wrong")))
    episode = Episode(turn, ANSWER, tools=tuple(names), max_calls_per_turn=3)
    assert episode.responses == [
        "64 seconds, 4 frames shown",
        "Error: broken failed",
        "Error: wrong failed",
    ]
    config = AgentConfig(tools=(halve, "crop_video"))
    assert config.tools == (f"{Path(__file__).resolve()}:halve", "crop_video") or (
        config.tools == ("tests.semantics.test_own_tools:halve", "crop_video")
    )
    assert list(agent_tools(config)) == ["halve", "crop_video"]


def halve(
    count: int,
    unit: Literal["frames", "seconds"] = "frames",
    marks: list[str] | None = None,
    fast: bool = False,
) -> str:
    """Halve a number.

    Longer words, which models do not read.

    Args:
        count: How many there are,
            all of them.
        unit (str): Of what.
        marks: Words to add.
        fast: Whether to hurry.

    Returns:
        count: half of it.
    """
    return f"{count / 2:g} {unit} {marks} {fast}"


def test_types_defaults_and_docstrings():
    own = Signature.of(halve)
    parameters = own.schema["function"]["parameters"]
    assert parameters["required"] == ["count"]
    assert parameters["properties"] == {
        "count": {"type": "integer", "description": "How many there are, all of them."},
        "unit": {
            "type": "string",
            "enum": ["frames", "seconds"],
            "description": "Of what.",
            "default": "frames",
        },
        "marks": {
            "type": ["array", "null"],
            "items": {"type": "string"},
            "description": "Words to add.",
            "default": None,
        },
        "fast": {"type": "boolean", "description": "Whether to hurry.", "default": False},
    }
    assert own.arguments({"count": 3.0, "marks": None}) == {"count": 3, "marks": None}
    for wrong in ({"count": 3.5}, {"count": 3, "unit": "hours"}, {"count": 3, "fast": 1}):
        with pytest.raises(WrongArguments, match="must be"):
            own.arguments(wrong)


def test_grammars_hold_its_calls():
    schemas = [
        tool.schema
        for tool in (function_tool(halve), *agent_tools(AgentConfig(tools=(ZOOM,))).values())
    ]
    grammar = response_grammar(schemas)
    for body, allowed in [
        (call("zoom_image", time=3, box=[0, 0, 0.5, 1]), True),
        (call("zoom_image", time=3, box=[0, 0, 0.5]), False),
        (call("halve", count=3, unit="seconds", marks=None), True),
        (call("halve", count=3, unit="hours"), False),
    ]:
        assert (grammar.read(f"<think>x</think>{body}".encode()) != DEAD) == allowed


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def t(x: float): pass", "write a docstring"),
        ('def t(x):\n  """Do.\n\n  Args:\n    x: That."""', "needs a type"),
        ('def t(x: float):\n  """Do."""', "needs a type and a line below `Args:`"),
        ('def t(x: dict):\n  """Do.\n\n  Args:\n    x: That."""', "use str, int, float"),
        ('def t(*x: float):\n  """Do.\n\n  Args:\n    x: That."""', "cannot be given by name"),
        ("t = 3", "define it at the top"),
        ("", "nothing called t"),
    ],
)
def test_functions_that_models_cannot_be_told_of_are_refused(tmp_path, source, said):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=rf"tools=.*{said}"):
        agent_tools(AgentConfig(tools=(Own(f"{tmp_path}/mine.py:t"),)))


def test_recipes_and_settings_take_it():
    config = override(
        get_recipe("needle_rl"), [f"agent.tools=crop_video,{ZOOM}", "data.instructions=full"]
    )
    assert config.agent.tools == ("crop_video", ZOOM)
    assert "call crop_video or zoom_image before answering" in prompt_texts(config).tools
    with pytest.raises(ValueError, match=r"agent\.tools=.*none\.py: no such file"):
        override(get_recipe("needle_rl"), ["agent.tools=none.py:zoom"])
