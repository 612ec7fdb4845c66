"""Law 2 for packs: what a stream learns in a pack is what it learns alone."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.common.attention import QUERY_CHUNK, attend
from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from paravt_jax.interfaces import FrameReader
from paravt_jax.lazy_array import LazyArray
from paravt_jax.params import initialise
from paravt_jax.records import Conversation, Frames, Message, VideoRef
from pipelines.conversation import ConversationRenderer, EncodedConversation, VisionInput, pack
from pipelines.packing import PackShape, UnusableCount, fill, pack_stream
from pipelines.preprocess import ImageSpec
from pipelines.render import ChatRenderer, PromptTexts
from pipelines.row_share import ONE_HOST
from tests.support.needle import processor_folder
from tests.support.row_share import on_both
from tests.support.tiny_models import NEEDLE_MODEL
from train.batch import packed_batch
from train.step import SftStep, batch_log_probs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("length", [20, QUERY_CHUNK + 30], ids=["at once", "in chunks"])
def test_a_token_attends_to_its_own_segment_alone(length):
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(rng.normal(size=(3, 1, length, 2, 8)), jnp.float32)
    cut = length // 3
    segments = jnp.repeat(jnp.array([1, 2]), jnp.array([cut, length - cut]))[None]
    packed = attend(query, key, value, causal=True, segments=segments)
    for part in (slice(0, cut), slice(cut, length)):
        alone = attend(query[:, part], key[:, part], value[:, part], causal=True)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


POLICY = Qwen3VLPolicy(Qwen3VLConfig.from_dict(NEEDLE_MODEL))
LENGTH, FRAMES = 512, 16
ROOM = PackShape(8192, 16)


class Reader(FrameReader):
    """Frames that differ from video to video, of 64x96 pixels where a path says so."""

    def overview(self, video, count):
        rng = np.random.default_rng(len(video.path))
        size = (64, 96) if "large" in video.path else (32, 32)
        pixels = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
        return Frames(pixels, np.arange(count) * 1.5)

    def clip(self, video, start, end, tokens=None):
        raise AssertionError("nobody asks for a clip here")


def talk(row_id, *videos, rounds=1):
    """A conversation about videos, with as many tool responses as it has rounds."""
    asked = Message("user", (*(VideoRef(path, 3.0) for path in videos), "What colour is it?"))
    look = Message("assistant", ("<think>\nI look.\n</think>\n<tool_call>\n{}\n</tool_call>",))
    told = Message("tool", (VideoRef("large-crop", 2.0), "A red circle."))
    answer = Message("assistant", ("<answer>red</answer>",))
    return Conversation(row_id, (asked, *(look, told) * rounds, answer))


CONVERSATIONS = [talk("one", "a", "large"), talk("two", rounds=0), talk("three", "abc", rounds=2)]


@functools.cache
def examples():
    """The conversations, rendered."""
    own = ChatRenderer.from_folder(processor_folder(), "image", PromptTexts(), (1024, 64 * 96))
    return [ConversationRenderer(own, Reader())(item) for item in CONVERSATIONS]


def batch_of(groups):
    packs = [pack(group) for group in groups]
    return jax.tree.map(
        jnp.asarray,
        packed_batch(packs, length=LENGTH, pad_id=0, frames=FRAMES, frame_patches=24),
    )


def learned(batch, log_probs):
    """Log-probs of learned tokens, stream after stream."""
    return np.asarray(log_probs)[np.asarray(batch.loss_weights) > 0]


def test_log_probs_of_a_pack_are_those_of_its_streams_alone():
    params = initialise(POLICY.table, jax.random.key(0))
    run = jax.jit(
        lambda batch: batch_log_probs(POLICY, params, batch, temperature=1.0, budget=LENGTH)[0]
    )
    together, alone = batch_of([examples()]), batch_of([[example] for example in examples()])
    assert together.grids.any(-1).sum() == alone.grids.any(-1).sum() >= 10
    packed, single = learned(together, run(together)), learned(alone, run(alone))
    assert len(packed) == len(single) > 50 and np.std(single) > 0.01
    np.testing.assert_allclose(packed, single, atol=1e-5)
    blended = dataclasses.replace(together, segments=jnp.ones_like(together.segments))
    assert np.abs(learned(blended, run(blended)) - single).max() > 1e-3, "segments must matter"


@pytest.mark.study
def test_gradients_of_a_pack_are_the_sum_of_those_of_its_streams():
    params = initialise(POLICY.table, jax.random.key(0))
    step = SftStep(POLICY, optax.sgd(0.1), micro_rows=1, budgets={})

    @jax.jit
    def slope(batch):
        loss = functools.partial(step._loss, frozen={}, budget=LENGTH)
        (value, (count, *_)), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return value, count, gradients

    whole = slope(batch_of([examples()]))
    parts = [slope(batch_of([[example]])) for example in examples()]
    summed = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
    assert float(whole[1]) == float(summed[1])
    np.testing.assert_allclose(whole[0], summed[0], rtol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in summed[2].values())
    for name, leaf in whole[2].items():
        np.testing.assert_allclose(leaf, summed[2][name], atol=1e-5 * scale, err_msg=name)


def blank(tokens, frames=0):
    """An example of so many tokens."""
    clips = (VisionInput(np.zeros((frames, 32, 32, 3), np.uint8), ImageSpec()),) if frames else ()
    visual = np.arange(tokens) < frames
    return EncodedConversation(
        np.zeros(tokens, np.int32), visual, np.ones(tokens, np.float32), clips
    )


def sizes(count, seed=0):
    """Lengths as of ParaVT's conversations: videos of 10 s to 10 minutes at one frame per second,
    at most 64, of which two take some 56 tokens, and a few hundred tokens of words."""
    rng = np.random.default_rng(seed)
    frames = np.minimum(np.exp(rng.uniform(np.log(10), np.log(600), count)), 64)
    words = rng.lognormal(np.log(500), 0.6, count)
    return (np.ceil(frames / 2) * 56 + words).astype(int)


def stream(lengths, fit="first", bins=64, shape=ROOM, skip=0.05, rows=8, frames=0, share=ONE_HOST):
    skips = UnusableCount(skip)
    rows_ = [talk(str(number)) for number in range(len(lengths))]
    made = pack_stream(
        rows_,
        lambda item: blank(int(lengths[int(item.row_id)]), frames),
        shape,
        rows,
        seed=0,
        skips=skips,
        fit=fit,
        bins=bins,
        threads=2,
        share=share,
    )
    return made, skips


@pytest.mark.parametrize("fit", ["first", "best"])
def test_rows_are_filled(fit):
    packs, _ = stream(sizes(2000), fit)
    shares = [fill(next(packs), 8192) for _ in range(24)]
    assert np.mean(shares) > 0.95


def test_every_conversation_once_per_epoch_and_the_same_after_a_resume():
    lengths = 20 + np.arange(40)
    packs, _ = stream(lengths, bins=4, shape=PackShape(256, 16), rows=2)

    def take(source):
        return [(item.segments.tolist(), item.drawn) for _ in range(3) for item in next(source)]

    first = take(packs)
    position = packs.get_state()
    after = take(packs)
    again, _ = stream(lengths, bins=4, shape=PackShape(256, 16), rows=2)
    again.set_state(json.loads(json.dumps(position)))
    assert take(again) == after
    taken_so_far = np.cumsum([row[-1] for row, _ in first + after])
    drawn = np.maximum.accumulate([count for _, count in first + after])
    assert np.all(drawn >= taken_so_far), "no more can be shown than were drawn"
    assert np.all(drawn <= taken_so_far + 4 * 256 // 20), "and four open rows hold the others"
    seen = [np.bincount(row)[1:].tolist() for row, _ in first + after]
    assert len({tuple(row) for row in seen}) > 6
    taken = sorted(size for row in seen for size in row)
    assert len(taken) > 40 and set(lengths) <= set(taken)


def test_rows_hold_no_more_frames_than_there_is_room_for():
    packs, _ = stream(np.full(60, 20), bins=2, rows=2, frames=5)
    for item in next(packs):
        assert item.segments[-1] == 3 and len(item.stream.patches.grids) == 15


def test_conversations_that_do_not_fit_are_skipped_and_counted_and_too_many_end_the_run():
    lengths = np.full(40, 50)
    lengths[7] = 300
    packs, skips = stream(lengths, bins=2, shape=PackShape(256, 16), skip=0.1)
    for _ in range(4):
        assert max(len(item.stream.tokens) for item in next(packs)) == 250
    assert 0 < skips.skipped < 0.1 * skips.seen
    packs, _ = stream(np.full(40, 300), bins=2, shape=PackShape(256, 16))
    with pytest.raises(ValueError, match="300 tokens and 0 frames do not fit into 256 and 16"):
        next(packs)


def test_two_hosts_pack_the_stream_of_one_and_render_half_of_it_each():
    """What one of them cannot use is left out, and counted, by both."""
    lengths = 20 + np.arange(40)
    lengths[8] = 300

    def rows_of(share):
        packs, skips = stream(
            lengths, bins=4, shape=PackShape(256, 16), rows=2, skip=0.5, share=share
        )
        seen = [(item.segments.tolist(), item.drawn) for _ in range(8) for item in next(packs)]
        return seen, packs.get_state(), skips.seen, skips.skipped

    alone = rows_of(ONE_HOST)
    made = []

    def host(share):
        found = rows_of(share)
        made.append(share.rows_made)
        return found

    assert on_both(host) == (alone, alone) and alone[3] >= 1
    assert abs(made[0] - made[1]) <= 1 and sum(made) == alone[2]


def test_pixels_that_are_elsewhere_are_looked_at_with_their_row_alone():
    """Conversations of another host are packed as any: sizes are enough."""
    asked = []

    def elsewhere(clip):
        def fetch():
            asked.append(clip)
            return clip.pixels

        pixels = LazyArray(clip.pixels.shape, clip.pixels.dtype, fetch)
        return dataclasses.replace(clip, pixels=pixels)

    own = examples()
    theirs = [
        dataclasses.replace(example, clips=tuple(map(elsewhere, example.clips))) for example in own
    ]
    rows, lazy = ([pack(group[:2]), pack(group[2:])] for group in (own, theirs))
    assert not asked
    for one, other in zip(rows, lazy, strict=True):
        np.testing.assert_array_equal(one.stream.vision_index, other.stream.vision_index)
        assert one.stream.patches.values.shape == other.stream.patches.values.shape
    np.testing.assert_array_equal(rows[1].stream.patches.values, lazy[1].stream.patches.values)
    assert [id(clip) for clip in asked] == [id(clip) for clip in own[2].clips]
