"""The learning rate over a run, what decays, and how a continued run keeps to its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.params import ParamSpec
from train.optimizer import (
    OptimizerSettings,
    check_continued,
    learning_rate,
    make_optimizer,
    warm_up_note,
)


@pytest.fixture(autouse=True)
def promotion_of_optax():
    """Optax adds whole and real numbers, as it may in a train step."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def rates(steps: int, **settings) -> list[float]:
    schedule = learning_rate(OptimizerSettings(learning_rate=1.0, **settings), steps)
    return [float(schedule(jnp.int32(step))) for step in range(steps)]


def spec(*shape: int, axes: tuple[str | None, ...]) -> ParamSpec:
    layers = tuple(range(shape[0])) if axes[0] == "layers" else None
    return ParamSpec(
        "x", shape, jnp.dtype("float32"), axes, jax.nn.initializers.ones, "x", layers=layers
    )


def test_every_step_of_a_warm_up_teaches():
    np.testing.assert_allclose(rates(6, warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


def test_a_cosine_follows_its_warm_up():
    # Four steps down from the peak: 1/2 + cos(pi i / 4) / 2.
    np.testing.assert_allclose(
        rates(6, warmup_steps=2, decay="cosine"), [0.5, 1, 1, 0.853553, 0.5, 0.146447], rtol=1e-5
    )


def test_a_cosine_stays_at_its_end():
    found = rates(6, decay="cosine", decay_steps=2, final_fraction=0.1)
    np.testing.assert_allclose(found, [1, 0.55, 0.1, 0.1, 0.1, 0.1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_decay_and_nothing_else(name):
    table = {
        "kernel": spec(4, 6, axes=("embed", "mlp")),
        "stack": spec(2, 4, 6, axes=("layers", "embed", "mlp")),
        "norms": spec(2, 4, axes=("layers", "norm")),
        "bias": spec(4, axes=("norm",)),
        "embedding": spec(8, 4, axes=("vocab", "embed")),
        "positions": spec(8, 4, axes=("positions", "embed")),
    }
    settings = OptimizerSettings(name=name, learning_rate=0.1, weight_decay=0.5)
    params = {key: jnp.ones(s.shape) for key, s in table.items()}
    optimizer = make_optimizer(settings, 1, table)
    still = {key: jnp.zeros_like(x) for key, x in params.items()}
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    moved = {key for key, x in updates.items() if np.abs(x).max() > 1e-6}
    assert moved == {"kernel", "stack"}
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-5)


def test_no_clip_norm_clips_nothing():
    # Without momentum an Adam step has the size of the rate, so compare the moments' inputs.
    table = {"bias": spec(2, axes=("norm",))}
    params = {"bias": jnp.zeros(2)}
    gradient = {"bias": jnp.array([300.0, 400.0])}
    moments = {}
    for clip in (None, 5.0):
        settings = OptimizerSettings(learning_rate=1.0, b1=0.0, clip_norm=clip)
        optimizer = make_optimizer(settings, 1, table)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        adam = (state if clip is None else state[1])[0]
        moments[clip] = np.asarray(adam.mu["bias"])
    np.testing.assert_allclose(moments[None], [300, 400])
    np.testing.assert_allclose(moments[5.0], [3, 4], rtol=1e-6)


def test_a_warm_up_beyond_the_run_is_said():
    settings = OptimizerSettings(learning_rate=1e-3, warmup_steps=10)
    assert warm_up_note(settings, 10) is None
    assert "optimizer.warmup_steps=10" in (warm_up_note(settings, 4) or "")
    assert "0.0004" in (warm_up_note(settings, 4) or "")


def test_a_cosine_does_not_rise_again_unasked():
    began = cosine = OptimizerSettings(decay="cosine")
    check_continued(began, 8, cosine, 8)
    check_continued(began, 8, OptimizerSettings(), 16)
    for chosen in (8, 16):
        check_continued(began, 8, OptimizerSettings(decay="cosine", decay_steps=chosen), 16)
    with pytest.raises(ValueError, match=r"optimizer\.decay_steps=8 .* optimizer\.decay_steps=16"):
        check_continued(began, 8, cosine, 16)
