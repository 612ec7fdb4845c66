"""M-RoPE positions by hand, and as invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravt_jax.rope_index import mrope_positions, next_position, vision_index


def stream(grids, gap=2):
    """`gap` text tokens before each frame and at the end (merge 2)."""
    parts = []
    for rows, cols in grids:
        parts += [False] * gap + [True] * (rows * cols // 4)
    return np.array(parts + [False] * gap, bool), np.array(grids, np.int32).reshape(-1, 2)


def test_text_counts_up_on_all_axes():
    positions = mrope_positions(*stream([]), merge=2)
    np.testing.assert_array_equal(positions, [[0, 0, 0], [1, 1, 1]])


def test_one_frame_by_hand():
    """Two text tokens, a frame of 2 x 3 merged blocks, two text tokens."""
    visual, grids = stream([(4, 6)])
    np.testing.assert_array_equal(
        mrope_positions(visual, grids, merge=2),
        [
            [0, 0, 0], [1, 1, 1],
            [2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4],
            [5, 5, 5], [6, 6, 6],
        ],
    )  # fmt: skip


def test_vision_index_skips_the_padding_of_frames():
    visual, grids = stream([(2, 2), (2, 4)], gap=1)
    index = vision_index(visual, grids, merge=2, patches_per_frame=12)
    np.testing.assert_array_equal(index, [-1, 0, -1, 3, 4, -1])


def test_frames_may_touch():
    visual = np.array([True, True, False])
    positions = mrope_positions(visual, np.array([[2, 2], [2, 2]]), merge=2)
    np.testing.assert_array_equal(positions[:, 0], [0, 1, 2])


@pytest.mark.parametrize("visual", [[True], [True, True, True], [True, False, True]])
def test_tokens_that_are_no_frames_are_refused(visual):
    with pytest.raises(ValueError, match="vision tokens"):
        mrope_positions(np.array(visual), np.array([[2, 4]]), merge=2)


side = st.integers(1, 5).map(lambda n: 2 * n)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(side, side), max_size=4), st.integers(0, 3))
def test_invariants(grids, gap):
    visual, grids = stream(grids, gap)
    positions = mrope_positions(visual, grids, merge=2)
    text = positions[~visual]
    assert (text == text[:, :1]).all()
    assert len({tuple(row) for row in positions}) == len(positions)
    assert next_position(positions) >= (positions.max() + 1 if len(positions) else 0)
    assert (
        next_position(positions) == gap * (len(grids) + 1) + (grids.max(axis=1) // 2).sum()
        if gap or len(grids)
        else True
    )
    patches = int(grids.prod(axis=1).max(initial=4))
    index = vision_index(visual, grids, merge=2, patches_per_frame=patches)
    assert ((index >= 0) == visual).all()
    assert (np.diff(index[visual]) > 0).all()
