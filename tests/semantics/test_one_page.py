"""`examples/para_grpo.py` is the algorithm that the trainer runs: on the same rollouts both have
the same loss and the same gradient. And it runs, from anywhere."""

import copy
import importlib
import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.protocol import parse_tool_calls
from paravt_jax.records import CallResult, RolloutGroup, StopReason, Trajectory, Turn
from pipelines.datasets import needle_questions
from pipelines.needle.world import NeedleWorld
from rollout.record import TrajectoryBuilder
from tests.support.command import ROOT, environment
from train.recipes import get_recipe
from train.rl.scoring import Scorer
from train.settings.override import override
from train.setup import batch_shapes, open_learner
from train.state import TrainState

SCRIPT = ROOT / "examples" / "para_grpo.py"
PROMPTS = 2
SLOPES = optax.GradientTransformation(
    lambda weights: jax.tree.map(jnp.zeros_like, weights),
    lambda gradient, _, weights: (jax.tree.map(jnp.zeros_like, weights), gradient),
)
"""An optimiser that moves nothing and keeps the gradient as its state."""


@pytest.fixture(scope="module")
def page():
    found = importlib.import_module("examples.para_grpo")
    found.ROWS = PROMPTS * found.GROUP  # as few rows as there are rollouts
    return found


@pytest.fixture(scope="module")
def groups(page, tmp_path_factory):
    """Rollouts of weights that are neither the first policy's nor those that learn."""
    world = NeedleWorld(train_videos=4, held_out_videos=1)
    folder = str(tmp_path_factory.mktemp("world"))
    questions = needle_questions(world, folder, "train", ("oe", "tvg"))
    rows = [question.row for question in questions[:PROMPTS]]
    return page.roll_out(moved(page.MODEL.params, 1), rows, np.random.default_rng(0))


def moved(params, seed):
    """Weights that are a little different, so that some turns lose their form."""
    dice = np.random.default_rng(seed)
    return {
        name: x + 0.15 * np.std(x) * dice.standard_normal(x.shape, np.float32)
        for name, x in sorted(params.items())
    }


def test_the_page_is_a_page():
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert not re.search(r"^(from|import) (rollout|train|evaluate)\b", text, re.MULTILINE)


@pytest.mark.slow
def test_loss_and_gradient_are_the_trainers(page, groups):
    first, groups = page.MODEL.params, copy.deepcopy(groups)
    chosen = int(np.isfinite(groups[0][0].log_probs).argmax())
    groups[0][0].log_probs[chosen] -= 3  # so unlikely to the sampler that the cap drops it
    now = {n: x for n, x in moved(first, 2).items() if not n.startswith("vision.")}
    batch = [page.prepare(group, first) for group in groups]
    (loss, metrics), gradient = page.accumulate(now, first, batch)
    theirs, slopes = learned_by_the_trainer(page, groups, first, now)

    assert loss == pytest.approx(theirs["loss"], abs=1e-6)
    assert metrics["kl"] == pytest.approx(theirs["kl"], rel=1e-4)
    assert metrics["gap"] == pytest.approx(theirs["logprob/gap_mean"], rel=1e-4)
    assert gradient.keys() == slopes.keys()
    for name, slope in slopes.items():
        difference = np.linalg.norm(gradient[name] - slope)
        assert difference <= 1e-5 * np.linalg.norm(slope), name
    assert_everything_occurred(page, groups, batch, theirs)


def learned_by_the_trainer(page, groups, first, now):
    """Metrics of one step of `needle_rl` on these rollouts, and its gradient."""
    sizes = [f"rl.prompts_per_step={PROMPTS}", "rl.micro_groups=1"]
    config = override(get_recipe("needle_rl"), sizes)
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    scored = Scorer(config.rewards)([recorded(page, group) for group in groups])
    shapes = batch_shapes(config, page.RENDERER.spec, page.RENDERER.pad_id)
    reference, now = jax.tree.map(jnp.copy, (first, now))  # a step donates its state
    frozen = {name: x for name, x in reference.items() if name not in now}
    state = TrainState(now, frozen, SLOPES.init(now), jnp.zeros((), jnp.int32))
    with jax.set_mesh(mesh):
        learner = open_learner(config, page.POLICY, SLOPES, mesh, page.TAGS, shapes, reference)
        state, metrics = learner.step(state, scored)
    return metrics, jax.device_get(state.optimizer)


def recorded(page, group):
    """The rollouts of a group as the trainer records them."""
    frames = len(group[0].prompt.patches.grids)
    return RolloutGroup(group[0].row, frames, tuple(trajectory(page, own) for own in group))


def trajectory(page, rollout) -> Trajectory:
    record = TrajectoryBuilder(rollout.prompt)
    tokens = zip(rollout.tokens, rollout.turns, rollout.log_probs, strict=True)
    for (drawn, number), run in itertools.groupby(tokens, lambda t: (np.isfinite(t[2]), t[1])):
        ids, _, log_probs = zip(*run, strict=True)
        if not drawn:
            record.add_given(ids)
            continue
        text = rollout.texts[number - 1]
        calls = parse_tool_calls(text)
        ran = rollout.crops if number == 1 else 0
        results = tuple(CallResult("", n < ran) for n in range(len(calls)))
        record.add_turn(
            Turn(
                prefix=np.array(page.HEAD, np.int32),
                tokens=np.array(ids, np.int32),
                log_probs=np.array(log_probs, np.float32),
                stop_reason=StopReason.END if ids[-1] == page.END else StopReason.LENGTH,
                text=text,
                calls=calls,
                results=results,
            )
        )
    return record.finish(page.RENDERER, policy_version=0)


def assert_everything_occurred(page, groups, batch, theirs):
    """What the comparison would be blind to if it did not occur."""
    rollouts = [rollout for group in groups for rollout in group]
    assert {len(rollout.texts) for rollout in rollouts} == {1, 2}
    assert any(rollout.crops > 1 for rollout in rollouts)
    assert theirs["kl"] > 1e-2 and theirs["dropped_fraction"] > 0
    for _, drawn, _, _, advantage in batch:
        values = [np.unique(row[own]) for row, own in zip(advantage, drawn, strict=True)]
        assert sum(len(own) > 1 for own in values) > len(values) // 2, "the anchor moves tags"


@pytest.mark.slow
def test_sampler_and_learner_agree(page, groups):
    """Law 2: what was drawn with a KV cache has the log-probability of a whole forward pass."""
    sampler = moved(page.MODEL.params, 1)
    for group in groups:
        _, drawn, behaviour, again, _ = page.prepare(group, sampler)
        assert drawn.sum() > 100
        np.testing.assert_allclose(again[drawn], behaviour[drawn], atol=1e-4)


@pytest.mark.study
@pytest.mark.slow
def test_the_real_command_learns_from_a_foreign_directory(tmp_path):
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--prompts", "1", "--videos", "4"]
    # Optax promotes its counts of steps, for which a page has no room to say that it may.
    env = environment(JAX_NUMPY_DTYPE_PROMOTION="standard", ROWS="8")
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    first, second = (dict(re.findall(r"(\w+) (\S+)", line)) for line in done.stdout.splitlines())
    for line in (first, second):
        assert all(np.isfinite(float(line[name])) for name in ("loss", "total", "crops"))
        assert 0 < float(line["gap"]) < 1e-4
    # The policy is the first one before it has learned, and another one afterwards.
    assert abs(float(first["kl"])) < 1e-6 < float(second["kl"])
    assert (tmp_path / "data" / "needle_world").is_dir()
