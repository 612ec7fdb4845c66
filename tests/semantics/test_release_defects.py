"""Defects of ParaVT's release that no other test shows; `docs/design.md` lists all of them.

Each test fails on a system that does as the release does.
"""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.records import Frames, Row, VideoRef
from pipelines.loader import prompt_stream
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.limits import AgentConfig, slot_pools
from tests.support.needle import questions, renderer
from tests.support.rollout_fakes import SentinelReader
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_rollouts import (
    RENDERER,
    Learnable,
    as_state,
    configured,
    group,
    learner,
    rollout,
)
from train import setup
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.report.rollouts import write_rollouts
from train.settings.override import override
from train.state import make_state, trainable_names
from train.step import apply_gradients

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "data" / "reference_cases" / "reward_cases.jsonl"


def scored(trajectory, total):
    return dataclasses.replace(trajectory, rewards={"total": total, "task": total, "anchor": 0.0})


@pytest.mark.slow
def test_a_rollout_that_ends_on_a_tool_response_is_rewarded():
    """R6. Our agent never ends there (`test_rounds_run_out_in_a_forced_answer`), but whoever
    brings such a rollout gets an advantage at each of its generated tokens."""
    cut = rollout("look</tool_call>", responses=("seen",))
    assert not cut.generated[-1]
    groups = [group(scored(cut, 2.0), scored(rollout("a guess", seed=1), 0.0))]
    own = learner(configured("objective.anchor=sequence", "objective.kl_weight=0"))
    batch, _ = own.prepare(as_state(Learnable().init()), groups)
    learned = np.asarray(batch.loss_weights) > 0
    np.testing.assert_allclose(np.asarray(batch.advantages)[0][learned[0]], 0.5**0.5, rtol=1e-3)


def moved(params, optimizer, state) -> float:
    """Share of the entries that ten small steps change."""
    dice = np.random.default_rng(0)
    for _ in range(10):
        slopes = {n: jnp.asarray(dice.normal(size=x.shape), x.dtype) for n, x in params.items()}
        state = apply_gradients(optimizer, state, slopes)
    changed = [np.asarray(state.trainable[name] != x).ravel() for name, x in params.items()]
    return float(np.concatenate(changed).mean())


@pytest.mark.slow
def test_small_steps_move_weights_while_products_are_bfloat16():
    """R12. The release's learning rate is 2e-6, far below half a unit in the last place of a
    bfloat16 weight."""
    config = override(get_recipe("needle_rl"), ["model.compute_dtype=bfloat16"])
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    model = setup.Parts(config)
    rate = dataclasses.replace(get_recipe("paravt_rl").optimizer, weight_decay=0.0)
    optimizer = make_optimizer(rate, 10, model.policy.table)
    trained = trainable_names(model.policy.table, config.model)
    kernels = r"text\..*\.kernel"
    params = {n: x for n, x in model.params(mesh).items() if re.fullmatch(kernels, n)}
    assert params and all(x.dtype == jnp.float32 for x in params.values())
    assert moved(params, optimizer, make_state(dict(params), trained, mesh, optimizer)) > 0.99
    rounded = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    assert moved(rounded, optimizer, make_state(dict(rounded), trained, mesh, optimizer)) < 0.5


def test_questions_about_one_video_have_prompts_of_their_own():
    """R14. The same video and the same K, but what is asked is in the prompt."""
    rows = [question.row for question in questions()]
    stream = prompt_stream(rows, VideoReader(), renderer(), (4,), groups_per_step=len(rows), seed=0)
    asked = collections.defaultdict(set)
    for item in next(stream):
        text = renderer().decode(item.prompt.tokens)
        assert item.row.question in text
        asked[item.row.video.path].add(text)
    stream.close()
    assert min(map(len, asked.values())) > 1


class Reader(SentinelReader):
    """Frames of the size that the needle world shows."""

    def _frames(self, video):
        return Frames(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1))


class Speller:
    """Spells texts in single characters, as the tokenizer would never write them."""

    def __init__(self, tokenizer_of):
        self._own, self.eos_ids = tokenizer_of, tokenizer_of.eos_ids
        self.decode = tokenizer_of.decode

    def encode(self, text):
        pieces = re.split(r"(<\|\w+\|>)", text)
        parts = [[piece] if piece.startswith("<|") else list(piece) for piece in pieces]
        return [token for part in parts for piece in part for token in self._own.encode(piece)]


def test_a_turn_that_is_spelled_otherwise_stays_as_it_was_drawn():
    """R15. The release tokenises the decoded turn again and relies on equal lengths."""
    own, config = renderer(), AgentConfig(turn_tokens=400, answer_tokens=200)
    call = '{"name": "crop_video", "arguments": {"start_time": 0, "end_time": 8}}'
    turns = [
        f"I look closer.\n</think>\n<tool_call>\n{call}\n</tool_call><|im_end|>",
        "A red circle.\n</think>\n<answer>red</answer><|im_end|>",
    ]
    spelled = [Speller(own).encode(turn) for turn in turns]
    assert all(len(s) > len(own.encode(t)) for s, t in zip(spelled, turns, strict=True))
    shapes = slot_pools(config, own, prompts=1, copies=1, prompt_tokens=500, crop_tokens=500)
    engine = ScriptedEngine(shapes, [turns], renderer=Speller(own))
    row = Row("row", VideoRef("/own.mp4", 64.0), "What colour?", "red")
    item = row, 4, own.main_prompt(row, None, tools=True)
    (made,) = Agent(engine.session, own, Reader(), config=config).run({}, [item], 1, 0)
    (t,) = made.trajectories
    assert [turn.tokens.tolist() for turn in t.turns] == spelled
    assert t.tokens[t.generated].tolist() == [token for turn in spelled for token in turn]
    (seen,) = engine.sessions[0].of("main")
    assert [*t.prompt.tokens.tolist(), *t.tokens.tolist()] == list(map(int, seen.tokens))
    assert t.executed == 1


@pytest.mark.slow
def test_what_sub_agents_saw_is_in_the_learners_batch_only_where_they_train():
    """R26. The release gathers the pixels of all crops on every rank and drops them there."""
    made = rollout("look", "red", responses=("r",), subagents=("a", "b")), rollout("no")
    groups = [group(*(scored(trajectory, 1.0) for trajectory in made))]
    config = configured("agent.subagent_sampling.temperature=1")
    for credit, present in (("none", False), ("full", True)):
        own = learner(override(config, [f"rl.subagent_credit={credit}"]))
        batch, _ = own.prepare(as_state(Learnable().init()), groups)
        assert (batch.subagents is not None) == present


@pytest.mark.slow
def test_the_environment_of_the_release_changes_nothing():
    """R28. There, rewards and prompts are set by exported variables, and differ where one is
    missing; here a run is what its configuration says."""
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    names = {name for case in cases for name in case.get("knobs", {})} | {"THINK_PREFIX"}
    assert len(names) >= 4
    code = (
        "from paravt_jax.rewards import score; from train.recipes import get_recipe;"
        "print(get_recipe('paravt_rl'), score('<think>\\nhm\\n</think>\\n"
        "<answer>a red door</answer><|im_end|>', 'red door'))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **extra},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ({}, dict.fromkeys(names, "0"), dict.fromkeys(names, "1"))
    ]
    assert said[0] and len(set(said)) == 1


def test_what_is_written_of_a_rollout_tells_turns_from_responses(tmp_path):
    """R29. The release cuts a stream in two by the number of generated tokens."""
    made = scored(
        rollout("look", "I see.", "red", responses=("near", "far"), prefix="<think>"), 1.0
    )
    write_rollouts(tmp_path, 7, [group(made)])
    (written,) = map(json.loads, (tmp_path / "step_000007.jsonl").read_text().splitlines())
    tokens, own = np.array(written["tokens"]), np.array(written["generated"]) > 0
    assert RENDERER.decode(tokens) == written["text"]
    assert RENDERER.decode(tokens[own]) == "lookI see.red"
    assert written["text"].index("look") < written["text"].index("near")
    assert written["text"].index("near") < written["text"].index("I see.")
    np.testing.assert_array_equal(np.array(written["log_probs"]) < 0, own)
