"""Held-out questions: as many as asked for, about videos that no training question shows."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravt_jax.records import Row, VideoRef
from train.data.split import hold_out, related, split


def rows_of(sizes, shared=()):
    """`sizes[v]` questions about each video v; of `shared` pairs of videos one question each."""
    videos = [VideoRef(f"/far/{number}.mp4", 8.0) for number in range(len(sizes))]
    rows = [
        Row(f"{v}-{n}", videos[v], "What?", "red")
        for v, size in enumerate(sizes)
        for n in range(size)
    ]
    pairs = [
        Row(f"{a}+{b}", videos[a], "Both?", "red", more_videos=(videos[b],)) for a, b in shared
    ]
    return rows + pairs


def shown(rows):
    return {video.path for row in rows for video in row.videos}


SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=8)


@given(SIZES, st.integers(1, 20))
def test_the_number_is_met_and_as_little_as_possible_is_left_over(sizes, number):
    rows = rows_of(sizes)
    sums = {
        sum(some)
        for count in range(len(sizes))
        for some in itertools.combinations(sizes, count)
        if sum(some) >= number
    }
    if not sums:  # all videos would be needed
        with pytest.raises(ValueError, match=r"evaluation\.rows="):
            split([rows], number)
        return
    parts = split([rows], number)
    assert len(parts.held_out) == number and parts.unused == min(sums) - number
    assert not shown(parts.held_out) & shown(parts.training[0])
    assert len(parts.training[0]) + number + parts.unused == len(rows)


def test_nothing_is_left_unused_where_whole_videos_make_up_the_number():
    """64 questions of videos of three and five each: whichever video comes first, it fits."""
    parts = split([rows_of([3] * 40 + [5] * 40)], 64)
    assert len(parts.held_out) == 64 and parts.unused == 0
    assert "256 questions about" in parts.report() and "64 questions about" in parts.report()
    assert parts.report().endswith("0 questions are left unused")


def test_videos_of_one_question_are_not_torn_apart():
    rows = rows_of([2, 2, 2, 2], shared=[(0, 1), (1, 2)])
    assert sorted(map(len, related(rows))) == [2, 8]
    parts = split([rows], 2)
    assert shown(parts.held_out) == {"/far/3.mp4"} and parts.unused == 0


def test_other_data_sets_lose_the_videos_that_are_held_out():
    first = rows_of([2, 2, 2])
    out = hold_out(first, 2)
    (path,) = shown(out)
    parts = split([first, rows_of([1, 1, 1])], 2)
    assert path not in shown(parts.training[1]) and parts.unused == 1
    assert split([first], 0).held_out == [] and split([first], 0).training == [first]


def test_where_the_videos_lie_does_not_matter():
    near = [
        Row(row.row_id, VideoRef(row.video.path.replace("/far", "/near"), 8.0), "What?", "red")
        for row in rows_of([1] * 9)
    ]
    ids = [[row.row_id for row in hold_out(rows, 4)] for rows in (rows_of([1] * 9), near)]
    assert ids[0] == ids[1]
