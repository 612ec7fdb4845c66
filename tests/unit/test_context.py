"""Rows whose tokens devices share (`context`) give what one device gives: log-probabilities, losses
and gradients of text, video, packed and shared rows, with dense layers and with experts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise, param_shardings
from paravt_jax.records import LearnerBatch
from paravt_jax.routing import UNKNOWN
from paravt_jax.shared_rows import Bounds
from tests.support.tiny_models import QWEN
from tests.unit.test_shared_rows import GROUP, PAD, SPARSE, streams_of
from train.batch import learner_batch, shared_batch, to_mesh
from train.step import batch_log_probs

LENGTH = 128
VALUES = QWEN.config.vision.patch_values
TOLERANCE = 1e-5
"""Of the largest number of each array."""


def short_streams(kind: str):
    """Streams of `tests.unit.test_shared_rows` that fit a row."""
    streams = streams_of(kind, VALUES)
    room = LENGTH - max(len(stream.prompt.tokens) for stream in streams)
    names = "tokens", "loss_weights", "log_probs", "generated"
    return [
        dataclasses.replace(own, shown=(), **{name: getattr(own, name)[:room] for name in names})
        for own in streams
    ]


def whole_rows() -> LearnerBatch:
    """Rows of text, of video, and of two packed streams, the second of which begins anew."""
    text, video = short_streams("text"), short_streams("image")
    sizes = {"length": LENGTH, "frames": 4, "frame_patches": 8, "pad_id": PAD}
    batch = learner_batch([*video[:2], *video[4:6], *text[:4]], group_size=2, **sizes)
    rows, cuts = np.arange(len(batch.tokens)), np.asarray(batch.lengths) // 2
    second = (rows % 2 == 1)[:, None] & (np.arange(LENGTH)[None] >= cuts[:, None])
    positions = np.asarray(batch.positions)
    anew = np.where(second[..., None], positions - positions[rows, cuts][:, None], positions)
    segments = (1 + second).astype(np.int32)
    return dataclasses.replace(batch, positions=anew.astype(np.int32), segments=segments)


def shared_rows() -> LearnerBatch:
    streams = short_streams("image")
    prompt = max(len(stream.prompt.tokens) for stream in streams)
    return shared_batch(
        streams,
        slots=2 * LENGTH,
        bounds=Bounds(prompt, LENGTH - prompt),
        pad_id=PAD,
        group_size=GROUP,
        per_row=GROUP,
        frames=4,
        frame_patches=8,
    )


@functools.cache
def batches() -> dict[str, LearnerBatch]:
    return {"whole": whole_rows(), "shared": shared_rows()}


def routed(policy, batch: LearnerBatch) -> LearnerBatch:
    """With experts that serve two of three tokens, in turns; routers choose for the others."""
    if (shape := policy.routing) is None:
        return batch
    rows, slots = np.shape(batch.tokens)
    first = np.arange(rows * slots).reshape(rows, slots, 1)
    served = (first + np.arange(shape.choices) % shape.per_token) % shape.experts
    routing = np.where(first % 3, served, UNKNOWN).astype(shape.dtype)
    return dataclasses.replace(batch, routing=routing)


def prefilled(policy, params, batch: LearnerBatch):
    """Hidden states, keys and values of rows as prompts."""
    features = policy.encode(params, batch.patches, batch.grids)
    features = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), features)
    return policy.prefill(params, batch.tokens, batch.positions, batch.vision_index, features)


def figures(policy, params, batch: LearnerBatch):
    """Log-probabilities, mean loss and its gradients."""

    def loss(params):
        found = batch_log_probs(policy, params, batch, temperature=0.8, budget=LENGTH)
        weights = batch.trained
        return -jnp.sum(found[0] * weights) / jnp.sum(weights), found[0]

    (value, log_probs), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return log_probs, value, gradients


@functools.cache
def of_rows(policy, mesh: str, count: int, kinds: tuple[str, ...]):
    """`figures` of these kinds of rows, and of prefilled ones, by one program; and its text."""
    devices = make_mesh(parse_mesh(mesh, count), jax.devices()[:count])
    params = initialise(policy.table, jax.random.key(0))
    with jax.set_mesh(devices):
        split = jax.device_put(params, param_shardings(policy.table, devices))
        rows = {kind: to_mesh(routed(policy, x), devices) for kind, x in batches().items()}

        def all_kinds(params, rows):
            do = {kind: figures for kind in rows} | {"prefill": prefilled}
            own = rows | {"prefill": rows["whole"]}
            return {kind: do[kind](policy, params, own[kind]) for kind in kinds}

        compiled = jax.jit(all_kinds).lower(split, rows).compile()
        return jax.device_get(compiled(split, rows)), compiled.as_text() or ""


def assert_same(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * np.abs(other).max())


ALL = "whole", "shared", "prefill"


def study(policy, mesh):
    return pytest.param(policy, mesh, ALL, marks=pytest.mark.study)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "mesh", "kinds"),
    [
        (QWEN, "fsdp:2,context:2,tensor:2", ("whole",)),
        study(QWEN, "fsdp:2,context:2,tensor:2"),
        study(QWEN, "context:4"),
        study(QWEN, "context:2,fsdp:2"),
        study(QWEN, "context:2,tensor:2"),
        study(SPARSE, "context:2,expert:2,tensor:2"),
    ],
)
def test_rows_of_all_kinds_are_those_of_one_device(policy, mesh, kinds):
    alone, _ = of_rows(policy, "data:1", 1, kinds)
    count = math.prod(int(part.split(":")[1]) for part in mesh.split(","))
    split, text = of_rows(policy, mesh, count, kinds)
    for kind, found in split.items():
        assert_same(found, alone[kind])
    assert "all-to-all" in text
