"""The sampler draws from the distribution that it reports, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollout.engine.sampler import (
    Draw,
    SamplingConfig,
    draw_tokens,
    lowest_score,
    mark_seen,
    row_keys,
)
from tests.support.drawing_oracle import processed

pytestmark = pytest.mark.slow

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
VOCAB = 500
drawn_jitted = jax.jit(draw_tokens)


def draw_rows(logits, sampling, seeds, seen=None, allowed=None):
    """One token per row, each the third of its stream."""
    keys = row_keys(jnp.asarray(seeds, jnp.uint32), jnp.full(len(seeds), 3))
    draw = Draw.of(sampling, seeds, [1] * len(seeds))
    return jax.tree.map(np.asarray, drawn_jitted(logits, keys, draw, seen, allowed))


def draw_many(count=2000, seen=None, allowed=None, **settings):
    """Draws of `count` rows with the logits above."""
    tiled = [None if one is None else jnp.tile(one, (count, 1)) for one in (seen, allowed)]
    sampling = [SamplingConfig(**settings)] * count
    return draw_rows(jnp.tile(LOGITS, (count, 1)), sampling, range(count), *tiled)


def random_logits(rows, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, VOCAB)) * 2.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    tokens = draw_many(20_000, temperature=temperature).tokens
    expected = jax.nn.softmax(LOGITS[0] / temperature)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, expected, atol=0.012)


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.6}, {"top_k": 2}, {"min_p": 0.4}, {"repetition_penalty": 1.4}]
)
def test_truncated_and_penalised_draws_follow_their_own_distribution(settings):
    seen = jnp.array([False, True, False, True])
    penalty = settings.get("repetition_penalty", 1.0)
    logits = np.array(LOGITS[0], np.float64) * np.where(seen, penalty, 1.0)
    kept = 4 if "repetition_penalty" in settings else 2
    expected = np.exp(logits[:kept]) / np.exp(logits[:kept]).sum()
    tokens = draw_many(20_000, seen=seen, **settings).tokens
    np.testing.assert_allclose(np.bincount(tokens, minlength=kept) / 20_000, expected, atol=0.012)


@pytest.mark.parametrize("constrained", [False, True])
def test_log_probs_are_those_of_the_distribution_that_was_sampled(constrained):
    """Each setting alone, and many together, against float64."""
    alone = [{"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.3}, {}]
    sampling = [SamplingConfig(**own) for own in alone] + random_settings(59)
    rows, dice = len(sampling), np.random.default_rng(5)
    logits, seen = random_logits(rows), dice.random((rows, VOCAB)) < 0.3
    allowed = dice.random((rows, VOCAB)) < 0.2 if constrained else None
    everything = [logits, sampling, seen, [None] * rows if allowed is None else allowed]
    tables = [processed(*row) for row in zip(*everything, strict=True)]
    for seed in range(20):
        masks = [None if own is None else jnp.array(own) for own in (seen, allowed)]
        drawn = draw_rows(logits, sampling, range(seed, seed + rows), *masks)
        expected = np.array(tables)[np.arange(rows), drawn.tokens]
        np.testing.assert_allclose(drawn.log_probs, expected, atol=2e-5)


def test_floors_part_what_can_be_drawn_from_what_was_cut_off():
    rows = 64
    logits, sampling = random_logits(rows), random_settings(rows)
    drawn = draw_rows(logits, sampling, range(rows))
    for row, own in enumerate(sampling):
        plain = dataclasses.replace(own, top_k=0, top_p=1.0, min_p=0.0)
        above = processed(logits[row], plain) >= drawn.floors[row]
        np.testing.assert_array_equal(above, np.isfinite(processed(logits[row], own)))
        assert np.isfinite(drawn.floors[row]) == (not above.all())


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7}])
def test_tokens_that_a_constraint_left_alone_are_a_fair_sample_of_those_drawn(settings):
    """Learning from them only must not prefer any token, or it would teach the grammar."""
    allowed = jnp.array([True, False, True, True])
    drawn = draw_many(40_000, allowed=allowed, **settings)
    table = np.exp(processed(LOGITS[0], SamplingConfig(**settings), allowed=np.array(allowed)))
    for tokens in (drawn.tokens, drawn.tokens[~drawn.constrained]):
        shares = np.bincount(tokens, minlength=4) / len(tokens)
        np.testing.assert_allclose(shares, table, atol=0.012)
    assert 0.1 < drawn.constrained.mean() < 0.9 and not drawn.forced.any()


def test_the_only_token_that_is_allowed_is_forced():
    drawn = draw_many(64, allowed=jnp.array([False, True, False, False]))
    assert (drawn.tokens == 1).all() and drawn.forced.all()
    np.testing.assert_allclose(drawn.log_probs, 0.0, atol=1e-6)
    # A likeliest token that alone is left by truncation is the policy's own choice.
    assert not draw_many(64, top_k=1).forced.any()


def test_temperature_zero_is_greedy_and_reports_temperature_one():
    drawn = draw_many(16, temperature=0.0)
    assert (drawn.tokens == 0).all()
    np.testing.assert_allclose(drawn.log_probs, np.log(0.5), rtol=1e-6)


def transformers_support(logits, seen, own):
    """Tokens that transformers' own processors leave, in the order of its `generate`."""
    import torch
    from transformers.generation import logits_process as theirs

    ids = torch.tensor(np.flatnonzero(seen))[None]
    scores = torch.tensor(np.array(logits))[None]
    chain = [
        theirs.RepetitionPenaltyLogitsProcessor(own.repetition_penalty),
        theirs.TemperatureLogitsWarper(own.temperature),
        theirs.TopKLogitsWarper(own.top_k or VOCAB),
        theirs.TopPLogitsWarper(own.top_p),
        theirs.MinPLogitsWarper(own.min_p),
    ]
    for step in chain:
        scores = step(ids, scores)
    return scores[0].numpy()


def random_settings(rows):
    rng = np.random.default_rng(0)
    return [
        SamplingConfig(
            temperature=float(rng.uniform(0.5, 2)),
            top_k=int(rng.choice([0, 1, 40, 100, 10_000])),
            top_p=float(rng.choice([1, 0.2, 0.9, 0.99])),
            min_p=float(rng.choice([0, 0, 0.01, 0.1])),
            repetition_penalty=float(rng.choice([1, 0.7, 1.8])),
        )
        for _ in range(rows)
    ]


def test_what_can_be_drawn_is_what_transformers_leaves():
    rows = 64
    logits, sampling = random_logits(rows), random_settings(rows)
    seen = np.random.default_rng(1).random((rows, VOCAB)) < 0.3
    theirs_ = [transformers_support(*row) for row in zip(logits, seen, sampling, strict=True)]
    # Their scores before truncation, which ours must cut at the same place.
    free = [dataclasses.replace(own, top_k=0, top_p=1.0, min_p=0.0) for own in sampling]
    before = [transformers_support(*row) for row in zip(logits, seen, free, strict=True)]
    draw = Draw.of(sampling, range(rows), [1] * rows)
    kept = jnp.array(before) >= lowest_score(jnp.array(before), draw)[:, None]
    np.testing.assert_array_equal(kept, np.isfinite(theirs_))
    assert len(set(np.asarray(kept.sum(-1)).tolist())) > 20
    for seed in range(50):
        tokens = draw_rows(logits, sampling, range(seed, seed + rows), jnp.array(seen)).tokens
        assert np.isfinite(np.array(theirs_)[np.arange(rows), tokens]).all()


def test_ties_and_excluded_tokens_at_the_edge_of_a_truncation():
    scores = jnp.array([[0.0, -0.0, -1.0, -jnp.inf, 2.0, 2.0]] * 6)
    settings = [{"top_k": 1}, {"top_k": 3}, {"top_k": 5}, {"top_k": 99}, {"top_p": 0.3}, {}]
    draw = Draw.of([SamplingConfig(**own) for own in settings], range(6), range(6))
    kept = (scores >= lowest_score(scores, draw)[:, None]).sum(-1)
    assert kept.tolist() == [2, 4, 5, 6, 2, 6]


def test_a_row_that_keeps_all_is_not_cut_beside_one_that_does_not():
    # The rounded mass of these reaches 1 long before the last token.
    logits = jnp.tile(-0.1 * jnp.arange(VOCAB, dtype=jnp.float32), (2, 1))
    draw = Draw.of([SamplingConfig(), SamplingConfig(top_p=0.5)], [0, 1], [1, 1])
    kept = (logits >= lowest_score(logits, draw)[:, None]).sum(-1)
    assert kept[0] == VOCAB and kept[1] == 7


def test_draws_and_log_probs_do_not_depend_on_the_batch():
    rows = 24
    logits, sampling = random_logits(rows), random_settings(rows)
    sampling[::3] = [SamplingConfig(), SamplingConfig(temperature=0.0)] * 4
    seen = jnp.array(np.random.default_rng(2).random((rows, VOCAB)) < 0.5)
    allowed = jnp.array(np.random.default_rng(3).random((rows, VOCAB)) < 0.3)
    allowed = allowed.at[::2].set(True)
    whole = draw_rows(logits, sampling, range(rows), seen, allowed)
    order = np.random.default_rng(4).permutation(rows)
    for part in (order, order[:5], *order[:6, None]):
        few = draw_rows(
            logits[part], [sampling[i] for i in part], part.tolist(), seen[part], allowed[part]
        )
        np.testing.assert_array_equal(few.tokens, whole.tokens[part])
        np.testing.assert_array_equal(few.constrained, whole.constrained[part])
        # XLA sums a row in another order when the batch has another shape; 0 is certainty.
        np.testing.assert_allclose(few.log_probs, whole.log_probs[part], rtol=2e-6, atol=1e-6)
    alone = draw_rows(logits[:1], sampling[:1], [0])
    assert alone.tokens[0] == whole.tokens[0]


def test_one_compiled_step_serves_every_setting():
    step = jax.jit(lambda *drawn: draw_tokens(*drawn))  # no other test's
    logits, keys = random_logits(4), row_keys(jnp.arange(4, dtype=jnp.uint32), jnp.zeros(4, int))
    for at in range(0, 40, 4):
        sampling = random_settings(40)[at : at + 4]
        step(logits, keys, Draw.of(sampling, [at] * 4, [at] * 4))
    assert step._cache_size() == 1


def test_a_constraint_acts_before_truncation_and_is_reported():
    allowed = jnp.array([False, False, True, True])
    drawn = draw_many(20_000, allowed=allowed, top_k=1)
    assert (drawn.tokens == 2).all() and drawn.constrained.all()
    drawn = draw_many(20_000, allowed=allowed)
    np.testing.assert_allclose(np.bincount(drawn.tokens) / 20_000, [0, 0, 0.6, 0.4], atol=0.012)
    np.testing.assert_allclose(drawn.constrained.mean(), 0.75, atol=0.012)
    free = draw_many(20_000)
    np.testing.assert_array_equal(drawn.constrained, free.tokens < 2)
    np.testing.assert_array_equal(drawn.tokens[~drawn.constrained], free.tokens[free.tokens >= 2])
    assert not draw_many(allowed=jnp.ones(4, bool)).constrained.any()


def test_seen_tokens_are_marked_in_active_rows():
    seen = jnp.zeros((3, 4), bool).at[2, 1].set(True)
    marked = mark_seen(seen, jnp.array([3, 0, 1]), jnp.array([True, False, False]))
    np.testing.assert_array_equal(np.argwhere(marked), [[0, 3], [2, 1]])


def test_keys_depend_on_seed_and_position():
    seeds = jnp.array([1, 1, 2, 1], jnp.uint32)
    data = jax.random.key_data(row_keys(seeds, jnp.array([5, 5, 5, 6])))
    assert (data[0] == data[1]).all()
    assert len({tuple(np.asarray(key)) for key in data}) == 3


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": ("a", "")},
        {"stop_ids": (-1,)},
    ],
)
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)


def test_one_stop_string_without_its_tuple_is_refused():
    config = SamplingConfig()
    object.__setattr__(config, "stop", "</tool_call>")  # the annotation is checked here only
    with pytest.raises(ValueError, match="pass a tuple"):
        config.__post_init__()


def test_a_draw_needs_one_of_each_per_row():
    with pytest.raises(ValueError, match="2 settings, 1 seeds"):
        Draw.of([SamplingConfig()] * 2, [0], [1, 1])
