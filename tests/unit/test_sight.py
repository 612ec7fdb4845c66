"""Whether a policy sees is told by its log-probabilities, and a blind one is told apart."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from evaluate.model import open_model
from evaluate.seeing import Seeing
from models.common.weights import load_params
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.records import Frames, Patches, Prompt, StopReason, Trajectory, Turn
from pipelines.needle import traces
from tests.support.needle import questions
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.rl.batches import BatchShapes
from train.rl.sight import Sight
from train.setup import Parts

pytestmark = pytest.mark.slow
FRAMES = 8
SAID = "Nothing happens.<|im_end|>"


@functools.cache
def parts() -> Parts:
    return Parts(get_recipe("needle_rl"))


@functools.cache
def sight(every: int = 1) -> Sight:
    renderer = parts().renderer
    shapes = BatchShapes(renderer.spec, renderer.pad_id, FRAMES, FRAMES)
    mesh = make_mesh(parse_mesh(None, 1), jax.devices()[:1])
    return Sight(parts().policy, mesh, shapes, every, rows=2)


def report(shade: int, said: str = SAID) -> Trajectory:
    """What a sub-agent says of frames of one shade."""
    renderer = parts().renderer
    pixels = np.full((FRAMES, 32, 32, 3), shade, np.uint8)
    frames = Frames(pixels, np.arange(FRAMES, dtype=np.float64))
    prompt: Prompt = renderer.subagent_prompt(frames, 0, FRAMES)
    tokens = np.array(renderer.encode(said), np.int32)
    nothing = np.zeros(len(tokens), np.float32)
    turn = Turn(np.zeros(0, np.int32), tokens, nothing, StopReason.END, said)
    return Trajectory(prompt, tokens, np.ones(len(tokens), bool), nothing, (turn,), said, said)


@functools.cache
def params():
    return load_params(str(COLD_START), parts().policy.table)


def test_the_cold_start_sees_an_event_that_it_reports():
    """Words that the oracle says of a crop with something in it."""
    question = next(q for q in questions("oe"))
    start, end = question.target.start, question.target.start + FRAMES
    frames = parts().reader.clip(question.row.video, start, end)
    prompt = parts().renderer.subagent_prompt(frames, start, end)
    said = traces.report(question.events, start, end) + "<|im_end|>"
    assert question.target.colour in said
    own = dataclasses.replace(report(30, said), prompt=prompt)
    seeing, blind = sight().of(params(), [own], FRAMES)
    assert seeing - blind > 0.5


def test_frames_that_are_grey_are_no_frames():
    """Patches are zero at the mean of the processor, 127.5."""
    own = report(30)
    patches = own.prompt.patches
    assert patches is not None
    grey = Patches(np.zeros(patches.values.shape, np.float32), patches.grids)
    blinded = dataclasses.replace(own, prompt=dataclasses.replace(own.prompt, patches=grey))
    seeing, blind = sight().of(params(), [blinded], FRAMES)
    assert seeing == blind
    assert blind == pytest.approx(sight().of(params(), [own], FRAMES)[1], rel=1e-5)


def test_the_mean_is_over_tokens_and_does_not_depend_on_filling():
    one, two = report(30), report(200, "A red cross appears from 3 to 5 seconds.<|im_end|>")
    alone = [sight().of(params(), [t], FRAMES)[0] for t in (one, two)]
    both = sight().of(params(), [one, two], FRAMES)[0]
    sizes = [len(one.tokens), len(two.tokens)]
    assert both == pytest.approx(np.average(alone, weights=sizes), rel=1e-5)


def test_an_evaluation_measures_the_report_nearest_to_the_frames():
    model = open_model(None, None, lambda rules: rules)
    seeing = Seeing(model, parts().renderer, patches=4)
    own = report(30)
    alone = seeing(own)
    assert (alone["seeing"], alone["blind"]) == pytest.approx(sight().of(params(), [own], FRAMES))
    answer = dataclasses.replace(report(200, "<answer>red</answer><|im_end|>"), subagents=(own,))
    assert seeing(answer) == pytest.approx(alone), "reports are nearer to frames than answers"
    bare = dataclasses.replace(own.prompt, patches=None)
    assert seeing(dataclasses.replace(own, prompt=bare)) == {}


def test_other_steps_measure_nothing():
    assert sight(3)(1, params(), []) == {}
