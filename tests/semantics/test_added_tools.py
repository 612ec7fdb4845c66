"""What it takes to give an agent another tool: a schema and a function."""

import pytest

from paravt_jax.records import Row, ToolCall
from pipelines.render import ChatRenderer
from rollout.agent import Agent
from rollout.limits import AgentConfig, slot_pools
from rollout.tools import Tool, ToolContext, crop_video, registry
from tests.support.needle import processor_folder
from tests.support.rollout_fakes import SentinelReader
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_episode import ANSWER, VIDEO, call, calls_turn


def video_length(call: ToolCall, video: ToolContext) -> str:
    if call.arguments.get("unit") == "nonsense":
        raise RuntimeError(f"no such unit in {VIDEO.path}")
    return f"{video.duration:g} seconds"


LENGTH_TOOL = Tool(
    {
        "type": "function",
        "function": {
            "name": "video_length",
            "description": "Length of the video.",
            "parameters": {"type": "object", "properties": {"unit": {"type": "string"}}},
        },
    },
    video_length,
)


def length_call(unit: str) -> str:
    return (
        call().replace("crop_video", "video_length").replace('"start_time": 0', f'"unit": "{unit}"')
    )


def test_a_new_tool_is_a_schema_and_a_function():
    """Its schema reaches the prompt through the chat template, its answer reaches the stream."""
    tools, config = registry(crop_video(AgentConfig()), LENGTH_TOOL), AgentConfig()
    schemas = [dict(tool.schema) for tool in tools.values()]
    renderer = ChatRenderer.from_folder(processor_folder(), tools=schemas)
    turn = calls_turn(length_call("seconds"), length_call("nonsense"))
    shapes = slot_pools(config, renderer, prompts=1, copies=1, prompt_tokens=500, crop_tokens=500)
    engine = ScriptedEngine(shapes, [[turn, ANSWER]], renderer=renderer)
    row = Row("row", VIDEO, "How long?", "64")
    prompt = renderer.main_prompt(row, None, tools=True)
    assert "Tool: video_length(unit)" in renderer.decode(prompt.tokens)
    agent = Agent(engine.session, renderer, SentinelReader(), tools, config)
    ((group),) = agent.run({}, [(row, 4, prompt)], copies=1, seed=0)
    (t,) = group.trajectories
    assert "<tool_response>\n64 seconds\n</tool_response>" in t.full_text
    assert "<tool_response>\nError: video_length failed\n</tool_response>" in t.full_text
    assert VIDEO.path not in t.full_text and t.executed == 1 and not t.subagents


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match="occurs twice"):
        registry(crop_video(AgentConfig()), crop_video(AgentConfig(evidence="frames")))
