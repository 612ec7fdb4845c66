"""Streams to learner batches: padding, positions after the prompt, vision index, groups."""

import dataclasses

import numpy as np
import pytest

from paravt_jax.patches import restride, stack_patches
from paravt_jax.records import Example, Patches, Prompt, Shown
from pipelines.preprocess import SPECS
from train.batch import learner_batch, row_starts, streams_of_examples
from train.rl.batches import BatchShapes


def prompt(frames=2, patches=4, grid=(2, 2), text=3):
    """A prompt `text` tokens, then the vision tokens of each frame (merge 2), then one token."""
    per_frame = grid[0] * grid[1] // 4
    slots = patches // 4
    index = [f * slots + i for f in range(frames) for i in range(per_frame)]
    vision_index = np.array([-1] * text + index + [-1], np.int32)
    count = len(vision_index)
    return Prompt(
        tokens=np.arange(10, 10 + count, dtype=np.int32),
        positions=np.repeat(np.arange(count, dtype=np.int32)[:, None], 3, axis=1) - 1,
        vision_index=vision_index,
        patches=Patches(
            np.ones((frames, patches, 6), np.float32), np.tile(np.int32(grid), (frames, 1))
        ),
    )


def example(tokens=4, **kwargs):
    return Example(
        prompt(**kwargs),
        np.arange(50, 50 + tokens, dtype=np.int32),
        np.linspace(0.0, 1.0, tokens).astype(np.float32),
    )


def test_rows_are_right_padded_and_values_stand_at_their_tokens():
    batch = learner_batch(streams_of_examples([example(4), example(2)]), length=16, pad_id=9)
    assert batch.tokens[1, :8].tolist() == [10, 11, 12, 13, 14, 15, 50, 51]
    assert set(batch.tokens[1, 8:]) == {9}
    assert batch.lengths.tolist() == [10, 8]
    np.testing.assert_allclose(batch.loss_weights[0, 6:10], [0, 1 / 3, 2 / 3, 1])
    assert batch.loss_weights[0, :6].sum() == batch.loss_weights[0, 10:].sum() == 0


def test_text_continues_after_the_largest_position_of_the_prompt():
    batch = learner_batch(streams_of_examples([example(3)]), length=12, pad_id=0)
    assert batch.positions[0, 6:9].tolist() == [[5] * 3, [6] * 3, [7] * 3]


def test_vision_index_counts_over_the_padded_patches_of_the_batch():
    small, large = example(frames=2), example(frames=1, patches=8, grid=(2, 4))
    batch = learner_batch(streams_of_examples([small, large]), length=16, pad_id=0)
    assert batch.patches.shape == (2, 2, 8, 6)
    assert batch.vision_index[0, 3:5].tolist() == [0, 2]
    assert batch.vision_index[1, 3:5].tolist() == [0, 1]
    assert batch.grids[1].tolist() == [[2, 4], [0, 0]]


def test_frames_are_padded_to_the_patches_of_the_configuration():
    streams = streams_of_examples([example(1)])
    batch = learner_batch(streams, length=8, pad_id=0, frame_patches=12)
    assert batch.patches.shape == (1, 2, 12, 6)
    assert batch.vision_index[0, 3:5].tolist() == [0, 3]


def test_restride_leaves_a_prompt_of_full_width_alone():
    own = prompt()
    assert restride(own, 4) is own.vision_index


def test_vision_comes_once_per_group():
    streams = streams_of_examples([example(1)] * 4)
    batch = learner_batch(streams, length=8, pad_id=0, group_size=2, frames=5)
    assert batch.patches.shape == (2, 5, 4, 6)


def test_rows_with_frames_of_their_own_are_groups_of_their_own():
    """Two rollouts of a prompt of 2 frames: one was shown 3 larger frames, the other none."""
    block = prompt(frames=3, patches=8, grid=(2, 4), text=1)
    own = np.concatenate([[50, 51], block.tokens, [52]]).astype(np.int32)
    plain = streams_of_examples([example(len(own))])[0]
    shown = dataclasses.replace(plain, tokens=own, shown=(Shown(2, block),))
    batch = learner_batch([plain, shown], length=20, pad_id=0, group_size=2, frames=2)
    assert batch.patches.shape == (2, 6, 8, 6)
    assert batch.grids[0].tolist() == [[2, 2]] * 2 + [[0, 0]] * 4
    assert batch.grids[1].tolist() == [[2, 2]] * 2 + [[2, 4]] * 3 + [[0, 0]]
    assert batch.tokens[1, :6].tolist() == shown.prompt.tokens.tolist()
    assert batch.tokens[1, 6 : 6 + len(own)].tolist() == own.tolist()
    assert batch.vision_index[1, 3:5].tolist() == [0, 2]
    assert batch.vision_index[1, 8:17].tolist() == [-1, 4, 5, 6, 7, 8, 9, -1, -1]
    # Positions of the block count on from the text before it (6 and 7 after a prompt that ends
    # at 4 with next position 5), and the text after it from the block's largest.
    after = 7 + block.positions
    np.testing.assert_array_equal(batch.positions[1, 8:16], after)
    assert batch.positions[1, 16].tolist() == [after.max() + 1] * 3
    np.testing.assert_allclose(batch.loss_weights[1, 6 : 6 + len(own)], shown.loss_weights)


def test_a_stream_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="length 7"):
        learner_batch(streams_of_examples([example(4)]), length=7, pad_id=0)


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        stack_patches([prompt(frames=3).patches], frames=2, patches=4)


@pytest.mark.parametrize("unit", [1, 128])
@pytest.mark.parametrize(
    ("prompt", "own", "per_row"), [(5008, 9728, 8), (300, 200, 8), (37, 10, 1)]
)
def test_rows_have_few_layouts_that_are_known_before_the_run(prompt, own, per_row, unit):
    """Whatever is said, and each of them has an example; little of a row is padding."""
    shapes = BatchShapes(SPECS["image"](16, 2, 2), 0, 0, 0, prompt, own)
    possible = shapes.possible(per_row, unit)
    assert len(possible) <= 40
    for layout, (shown, said) in possible.items():
        assert len(said) == per_row and shapes.layout_of([shown], said, unit) == layout
    rng = np.random.default_rng(0)
    for share in np.repeat([1.0, 0.3, 0.05], 200):
        shown = [int(x) for x in rng.integers(1, prompt + 1, 2)]
        said = [int(x) for x in rng.integers(1, 2 + int(share * (own - 1)), 2 * per_row)]
        layout, end = shapes.layout_of(shown, said, unit), max(row_starts(shown, said, unit)[1])
        assert layout in possible and end <= layout.slots
        assert layout.bounds.prompt >= min(max(shown), layout.slots)
        assert layout.bounds.own >= max(said)
        # A fifth, and rounding to 64; rows shorter than the longest prompt are padded to it.
        assert layout.slots <= max(1.2 * end, prompt) + 64
