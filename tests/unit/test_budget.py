"""Frame gating draws K from a hash, so that nothing else can change it."""

from collections import Counter

import pytest

from pipelines.budget import frame_budget

CHOICES = (4, 8, 16, 32, 64)


def test_a_draw_is_a_pure_function_with_known_values():
    draws = [frame_budget(0, epoch, "row", CHOICES) for epoch in range(8)]
    assert draws == [frame_budget(0, epoch, "row", CHOICES) for epoch in range(8)]
    assert len(set(draws)) > 1


def test_draws_are_uniform_over_the_choices():
    counts = Counter(frame_budget(3, 0, f"row{i}", CHOICES) for i in range(5000))
    assert set(counts) == set(CHOICES)
    assert max(abs(count - 1000) for count in counts.values()) < 120


def test_every_argument_changes_the_draw():
    rows = [f"row{i}" for i in range(50)]
    base = [frame_budget(0, 0, row, CHOICES) for row in rows]
    assert base != [frame_budget(1, 0, row, CHOICES) for row in rows]
    assert base != [frame_budget(0, 1, row, CHOICES) for row in rows]


def test_one_choice_switches_gating_off():
    assert {frame_budget(s, 0, "row", (16,)) for s in range(20)} == {16}


@pytest.mark.parametrize("choices", [(), (0, 4)])
def test_impossible_choices_are_refused(choices):
    with pytest.raises(ValueError, match="at least one choice"):
        frame_budget(0, 0, "row", choices)
