"""Which checkpoints stay: the newest, some by time, some by what they were evaluated to."""

import jax.numpy as jnp
import pytest
from flax import nnx as nn

from paravt_jax.params import ParamSpec
from train.state import TrainState
from train.workdir.checkpoints import Checkpoints
from train.workdir.retention import Retention, Saved

MINUTES = [Saved(step, at=60.0 * step) for step in (1, 3, 4, 8, 9, 12)]
RATED = [Saved(s, figure=f) for s, f in ((1, 0.5), (2, None), (3, 0.9), (4, 0.9), (5, 0.1), (6, 0))]


@pytest.mark.parametrize(
    ("keep", "saved", "stay"),
    [
        (Retention(2), MINUTES, {9, 12}),
        (Retention(1, minutes=4), MINUTES, {1, 8, 12}),
        (Retention(1, minutes=100), MINUTES, {1, 12}),
        (Retention(1, best=1), RATED, {3, 6}),
        (Retention(1, best=3), RATED, {1, 3, 4, 6}),
        (Retention(2, minutes=5, best=1), [], set()),
    ],
)
def test_what_stays(keep, saved, stay):
    assert keep.kept(reversed(saved)) == stay


def test_what_stayed_by_time_stays_whatever_follows():
    keep, there, deleted = Retention(1, minutes=5), [], set()
    for step in range(1, 40):
        there = [one for one in (*there, Saved(step, at=100.0 * step)) if one.step not in deleted]
        deleted |= {one.step for one in there} - keep.kept(there)
    assert keep.kept(there) == {*range(1, 40, 3), 39}


def test_a_better_state_is_worth_a_checkpoint():
    keep = Retention(1, best=2)
    assert keep.is_best(0.0, []) and keep.is_best(0.0, RATED[:1])
    assert keep.is_best(0.6, RATED[:3]) and not keep.is_best(0.5, RATED[:3])
    assert not Retention(1).is_best(1.0, [])


def test_the_best_stay_also_after_a_restart(tmp_path):
    spec = ParamSpec("w", (4,), jnp.dtype("float32"), ("mlp",), nn.initializers.zeros, "w")
    state = TrainState({"w": jnp.ones(4)}, {}, {"mu": jnp.ones(4)}, jnp.asarray(0))

    def run(figures):
        saved = Checkpoints(tmp_path, Retention(1, best=1), {"w": spec})
        for step, figure in figures:
            saved.save(step, state, figure=figure)
        saved.close()
        return sorted(int(path.name) for path in tmp_path.iterdir())

    assert run([(1, 0.2), (2, 0.8), (3, None)]) == [2, 3]
    assert run([(4, 0.3)]) == [2, 4]
    assert run([(5, 0.9), (6, 0.9)]) == [5, 6]
