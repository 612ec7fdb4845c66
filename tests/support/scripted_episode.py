"""One rollout under a script, through the real agent, and everything around it."""

from __future__ import annotations

import json

import numpy as np

from paravt_jax.records import Row, VideoRef
from rollout.agent import Agent
from rollout.limits import AgentConfig, slot_pools, token_budget
from rollout.tools import agent_tools
from tests.support.rollout_fakes import SentinelReader, ToyRenderer
from tests.support.scripted_engine import ScriptedEngine, ScriptedSession

END = "<|im_end|>"

ANSWER = f"I know.\n</think>\n<answer>red</answer>{END}"

RENDERER = ToyRenderer()

VIDEO = VideoRef("/videos/own.mp4", duration=64.0)


def call(start=0, end=8, **more) -> str:
    arguments = {"start_time": start, "end_time": end, **more}
    body = json.dumps({"name": "crop_video", "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


def calls_turn(*calls: str) -> str:
    return "I look.\n</think>\n" + "\n".join(calls) + END


CROP_TOKENS = 300
"""More than any crop of the toy renderer takes."""


def scripted_engine(config: AgentConfig, turns_B, report=None, copies=1, steps_per_call=16):
    """An engine with the slot pools that the agent asks for, over a script."""
    shape = {"prompts": len(turns_B), "copies": copies, "prompt_tokens": 200}
    shapes = slot_pools(config, RENDERER, **shape, crop_tokens=CROP_TOKENS)
    return ScriptedEngine(shapes, turns_B, report, steps_per_call)


class Episode:
    """One rollout under a script, and everything around it."""

    def __init__(self, *turns: str, reader=None, report=None, **config) -> None:
        limits = {"turn_tokens": 1000, "answer_tokens": 80, "response_tokens": 150}
        self.config = AgentConfig(**(limits | config))
        self.engine = scripted_engine(self.config, [turns], report)
        self.reader = reader or SentinelReader()
        self.room = token_budget(self.config, RENDERER, CROP_TOKENS)
        self.agent = Agent(
            self.engine.session,
            RENDERER,
            self.reader,
            agent_tools(self.config),
            self.config,
            CROP_TOKENS,
        )
        row = Row("row", VIDEO, "What colour?", "red")
        prompt = RENDERER.main_prompt(row, self.reader.overview(VIDEO, 4), tools=True)
        (group,) = self.agent.run({}, [(row, 4, prompt)], copies=1, seed=0, policy_version=3)
        (self.trajectory,) = group.trajectories
        self.group = group
        self.check()

    def check(self) -> None:
        """Rules 1, 2 and 9 hold for every episode of this module."""
        t = self.trajectory
        (seen,) = [row.tokens for row in self.session.of("main")]
        assert [*t.prompt.tokens.tolist(), *t.tokens.tolist()] == list(map(int, seen))
        assert len(t.tokens) == len(t.generated) == len(t.log_probs)
        assert t.generated[-1]
        assert (t.log_probs[~t.generated] == 0).all() and (t.log_probs[t.generated] < 0).all()
        own = np.concatenate([turn.tokens for turn in t.turns])
        np.testing.assert_array_equal(t.tokens[t.generated], own)
        texts = [RENDERER.decode([*turn.prefix, *turn.tokens]) for turn in t.turns]
        assert t.scored_text == "".join(texts)
        assert all(text.startswith(self.config.think_prefix) for text in texts)
        assert t.full_text == RENDERER.decode(t.tokens.tolist())

    @property
    def session(self) -> ScriptedSession:
        (session,) = self.engine.sessions
        return session

    @property
    def responses(self) -> list[str]:
        """Texts of all tool responses, in order."""
        parts = self.trajectory.full_text.split("<tool_response>\n")[1:]
        return [part.split("\n</tool_response>")[0] for part in parts]

    @property
    def asked(self) -> list[str]:
        """Windows that sub-agents were shown, in order."""
        texts = [RENDERER.decode(sub.prompt.tokens) for sub in self.trajectory.subagents]
        return [text.split("SUB ")[1].split(END)[0] for text in texts]
