"""Law 13: a grammar, a penalty and a truncation shape what is drawn, and the learner knows it.

Whole episodes of the real agent and engine, sub-agents included, against float64:

1. The sampler's log-probability of each token is that of the distribution that it was drawn from.
2. The learner's is the same, where it learns.
3. What a grammar wrote is not learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from rollout.engine.automaton import TokenAutomata
from rollout.engine.grammar import DEAD, ByteAutomaton
from rollout.engine.sampler import SamplingConfig
from rollout.limits import slot_pools
from tests.support.drawing_oracle import processed
from tests.support.rollout_fakes import PAD, SPECIAL, VOCAB
from tests.support.rollout_law import (
    CONFIG,
    CROP_TOKENS,
    ENDS,
    FRAME_PATCHES,
    PROMPT_TOKENS,
    Learnable,
    TapedEngine,
    TerseRenderer,
    World,
    crop_streams,
)
from train.batch import LearnerStream, streams_of_groups
from train.rl.batches import token_shares, with_what_shaped
from train.step import batch_hidden, batch_log_probs, shaping_of

pytestmark = pytest.mark.usefixtures("turns_that_call")

LOW, HIGH = range(96), range(96, 128)
SETTINGS = {
    "penalty": SamplingConfig(temperature=0.8, repetition_penalty=1.4),
    "top_p": SamplingConfig(temperature=1.3, top_p=0.8),
    "all but a grammar": SamplingConfig(top_k=30, min_p=0.02, top_p=0.9, repetition_penalty=0.8),
    "grammar and penalty": SamplingConfig(constrain="calls", repetition_penalty=1.4),
}


def two_by_two() -> ByteAutomaton:
    """Texts with at most two bytes of the upper quarter in a row; after two, one of four."""
    moves = np.zeros((3, 256), int)
    moves[0, HIGH], moves[1, HIGH], moves[2] = 1, 2, DEAD
    moves[2, [10, 32, 46, 65]] = 0
    return ByteAutomaton(moves, np.array([True, True, False]))


class HeadedRenderer(TerseRenderer):
    """Tool responses end with the head of the next turn, where a grammar begins anew."""

    def tool_turn(self, responses: Sequence[str]) -> list[int]:
        return [*super().tool_turn(responses), *self.encode("<|im_start|>assistant\n")]


def shaped_world(evidence: str, main: SamplingConfig, sub: SamplingConfig) -> World:
    """A toy world whose main agents draw by one setting, and whose sub-agents by another."""
    policy = Learnable()
    world = World(policy, policy.init(), 3, evidence, copies=4)
    world.renderer = HeadedRenderer(3)
    world.config = dataclasses.replace(
        CONFIG, evidence=evidence, response_tokens=40, sampling=main, subagent_sampling=sub
    )
    return world


@pytest.fixture(scope="module")
def engine() -> TapedEngine:
    """One for all settings: they are traced."""
    world = shaped_world("text", SamplingConfig(), SamplingConfig())
    room = slot_pools(
        world.config,
        world.renderer,
        prompts=4,
        copies=world.copies,
        prompt_tokens=PROMPT_TOKENS,
        crop_tokens=CROP_TOKENS["text"],
    )
    contents = [bytes([index]) for index in range(128)] + [text.encode() for text in SPECIAL]
    return TapedEngine(
        world.policy,
        room,
        automata=TokenAutomata(contents, ENDS, {"calls": two_by_two()}),
        pad_id=PAD,
        frame_patches=FRAME_PATCHES,
        penalties=True,
    )


def expected_log_probs(
    logits: np.ndarray, stream: LearnerStream, own: SamplingConfig, places: np.ndarray
) -> np.ndarray:
    """Of the tokens at these places behind the prompt, by what stands before each of them."""
    moves, state = two_by_two().moves, 0
    values = []
    for at, token in enumerate(stream.tokens.tolist()):
        if at and not stream.generated[at - 1]:
            # A turn begins with its head: the grammar has read the forced prefix.
            state = 0
        if at in places:
            allowed = np.ones(VOCAB, bool)
            if own.constrain:
                allowed[:128] = np.array([moves[state, byte] != DEAD for byte in range(128)])
                allowed[128:] = False
                allowed[list(ENDS)] = state < 2
            seen = np.isin(np.arange(VOCAB), stream.tokens[:at])
            values.append(processed(logits[at], own, seen, allowed)[token])
        if stream.generated[at] and token < 128:
            state = max(int(moves[state, token]), 0)
    return np.array(values)


def learned_log_probs(world: World, own: SamplingConfig, batch, table) -> np.ndarray:
    """As the train step computes them."""
    batch = with_what_shaped(batch, own)
    log_probs, entropy, _ = jax.jit(
        lambda params, batch: batch_log_probs(
            world.policy,
            params,
            batch,
            temperature=own.temperature,
            budget=64,
            shaping=shaping_of(batch, own.repetition_penalty, table),
        )
    )(world.params, batch)
    assert np.isfinite(entropy).all()
    return np.asarray(log_probs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_sampler_and_learner_agree_about_what_was_sampled(name, engine):
    main, sub = SETTINGS[name], list(SETTINGS.values())[::-1][list(SETTINGS).index(name)]
    world = shaped_world("text", main, sub)
    groups = world.roll_out(engine, world.items(3))
    table = engine.automata.table
    both = (main, streams_of_groups(groups), world.copies), (sub, crop_streams(groups), 1)
    for own, streams, copies in both:
        (batch,) = world.batches(streams, len(streams), copies)
        logits = all_logits(world, batch)
        learned = learned_log_probs(world, own, batch, table)
        for row, stream in enumerate(streams):
            start = 0 if batch.shared else len(stream.prompt.tokens)
            places = np.flatnonzero(stream.generated)
            want = expected_log_probs(logits[row, start:], stream, own, places)
            np.testing.assert_allclose(stream.log_probs[places], want, atol=1e-4)
            trained = np.flatnonzero(stream.loss_weights)
            np.testing.assert_allclose(
                learned[row, start + trained], stream.log_probs[trained], atol=1e-4
            )
    plain = learned_log_probs(world, SamplingConfig(), batch, None)
    mask = np.asarray(batch.loss_weights) > 0
    assert np.abs(plain - batch.behaviour_log_probs)[mask].max() > 0.1, "nothing was shaped"


def all_logits(world: World, batch) -> np.ndarray:
    """`[b, own, vocab]`: what predicts each token."""
    before, _ = batch_hidden(world.policy, world.params, batch)
    return np.asarray(world.policy.logits(world.params, before))


@pytest.mark.slow
def test_what_a_grammar_wrote_is_context(engine):
    own = SamplingConfig(temperature=1.5, constrain="calls")
    world = shaped_world("text", own, own)
    groups = world.roll_out(engine, world.items(4))
    streams = streams_of_groups(groups)
    shares = token_shares(streams)
    assert 0.02 < shares["tokens/not_chosen"] < 0.9 and shares["tokens/learned_not_chosen"] == 0
    assert shares["tokens/learned"] == pytest.approx(1 - shares["tokens/not_chosen"])
    assert shares["tokens/truncated"] == 0
    for stream in streams:
        written = stream.generated & (stream.loss_weights == 0)
        # Where everything is allowed, nothing is changed.
        assert (stream.noted.grammar[written] > 0).all()
