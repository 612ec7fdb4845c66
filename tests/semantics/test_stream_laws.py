"""Laws of the stream of prompts, over workers, restarts and mixtures.

1. K is uniform over its choices, and a function of seed, epoch and row alone.
2. A stream set to the state it had at any element goes on as it did.
3. Every row comes once per epoch, in each data set of a mixture.
4. A mixture draws from its data sets in proportion to their weights, at any stretch.
5. No prompt is larger than the element spec says.
6. Hosts that share a stream see what one host sees, and each row is made by one of them, or fails
   by one of them for all.

What workers add to a stream is only where prompts are made: the light tests run without them, one
runs with them, and the study runs the whole matrix.
"""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from paravt_jax.records import Frames, Prompt, Row, VideoRef
from pipelines.budget import frame_budget
from pipelines.container import UnreadableVideo
from pipelines.loader import Mixture, prompt_stream
from pipelines.sizes import prompt_tokens
from pipelines.tfds_builder import row_source
from pipelines.video import VideoReader
from tests.support.needle import data_folder, questions, renderer
from tests.support.rollout_fakes import ToyRenderer
from tests.support.row_share import on_both

CHOICES = (4, 8, 16, 32, 64)
PIXELS = np.zeros((1, 1, 1, 3), np.uint8)


class PlainReader:
    """Frames without a file."""

    def overview(self, video: VideoRef, count: int) -> Frames:
        return Frames(PIXELS, np.zeros(1))

    def clip(self, video: VideoRef, start: float, end: float, tokens: int | None = None) -> Frames:
        return self.overview(video, 1)

    def frames_at(self, video: VideoRef, times: Sequence[float]) -> Frames:
        return self.overview(video, len(times))


class PlainRenderer(ToyRenderer):
    """Prompts without words."""

    def main_prompt(self, row: Row, frames, tools: bool) -> Prompt:
        return Prompt(np.zeros(1, np.int32), np.zeros((1, 3), np.int32), np.full(1, -1))


def make_rows(count: int, name: str = "row") -> list[Row]:
    return [Row(f"{name}{n}", VideoRef("/v.mp4", 8.0), "?", "!") for n in range(count)]


def stream(rows, budgets=CHOICES, seed=0, **options):
    options = {"groups_per_step": 1} | options
    return prompt_stream(rows, PlainReader(), PlainRenderer(), budgets, seed=seed, **options)


def seen(prompts, count: int) -> list[tuple[str, int]]:
    """Row and K of the next steps."""
    steps = itertools.islice(prompts, count)
    return [(item.row.row_id, item.frame_budget) for items in steps for item in items]


def test_budgets_are_uniform():
    """Chi-square over 10,000 draws, 4 degrees of freedom: 23.5 is exceeded once in 10,000 seeds."""
    draws = [frame_budget(0, n // 2000, f"row{n % 2000}", CHOICES) for n in range(10_000)]
    counts = np.array([draws.count(choice) for choice in CHOICES])
    assert ((counts - 2000.0) ** 2 / 2000.0).sum() < 23.5
    # Neighbours in rows and in epochs are independent: pairs are uniform too (24 degrees: 59.4).
    for lag in (1, 2000):
        pairs = Counter(zip(draws[:-lag], draws[lag:], strict=True))
        expected = (len(draws) - lag) / 25
        assert sum((pairs[p] - expected) ** 2 for p in itertools.product(CHOICES, CHOICES)) < (
            59.4 * expected
        )


@pytest.mark.slow
def test_budgets_differ_between_epochs_and_are_the_same_after_a_restart():
    code = (
        "from pipelines.budget import frame_budget as k;print([k(3,e,'a',range(1,99)) for e in %s])"
    )
    epochs = [frame_budget(3, epoch, "a", range(1, 99)) for epoch in range(8)]
    assert len(set(epochs)) > 4
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    again = subprocess.run(
        [sys.executable, "-c", code % "range(8)"],
        capture_output=True, text=True, check=True, env=environment,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    )  # fmt: skip
    assert json.loads(again.stdout) == epochs


class Hole(PlainReader):
    """Cannot read one file: what `raised` is of, it raises."""

    def __init__(self, raised: Exception | None = None):
        self.raised = raised

    def overview(self, video: VideoRef, count: int) -> Frames:
        if self.raised and video.path == f"/v{SECOND[3:]}.mp4":
            raise self.raised
        return super().overview(video, count)


SECOND = seen(stream(make_rows(6), seed=5, groups_per_step=4), 1)[1][0]
"""The row that is drawn second, by the second host."""


def on_two_hosts(steps: int, raised: Exception | None = None):
    """Row and K of so many steps of four, on each of two hosts of which the second alone meets
    trouble with `SECOND`; what the streams have counted, and what ended each of them."""

    def host(share):
        number = share.number
        rows = [Row(f"row{n}", VideoRef(f"/v{n}.mp4", 8.0), f"{number}", "!") for n in range(6)]
        reader = Hole(raised if number else None)
        made = rows, reader, PlainRenderer(), CHOICES, 4, 5
        prompts = prompt_stream(*made, max_bad_rows=0.5, share=share)
        items, error = [], None
        try:
            items = [item for _ in range(steps) for item in next(prompts)]
        except Exception as ended:
            error = str(ended)
        assert {item.row.question for item in items} <= {str(number)}, "rows are a host's own"
        seen = [(item.row.row_id, item.frame_budget) for item in items]
        return seen, prompts.get_state(), error, share.rows_made

    return on_both(host)


def test_two_hosts_see_the_stream_of_one_and_make_half_of_it_each():
    (seen_0, state_0, _, made_0), (seen_1, state_1, _, made_1) = on_two_hosts(6)
    assert seen_0 == seen_1 == seen(stream(make_rows(6), seed=5, groups_per_step=4), 6)
    assert state_0 == state_1 and made_0 == made_1 == 12


def test_what_one_host_cannot_read_no_host_shows():
    one, two = on_two_hosts(6, UnreadableVideo("no such file"))
    assert one[:3] == two[:3] and one[1]["bad_rows"] == [SECOND]
    assert len(one[0]) == 24, "and others take its place"


def test_an_error_on_one_host_ends_the_stream_on_all():
    one, two = on_two_hosts(6, OSError("the disk is gone"))
    assert one[2] == two[2] == "the disk is gone"


@pytest.mark.slow
def test_a_stream_resumes_at_any_element():
    rows, total = make_rows(7), 20
    prompts, states, items = stream(rows), [], []
    for _ in range(total):
        states.append(json.loads(json.dumps(prompts.get_state())))
        items += seen(prompts, 1)
    for at, state in enumerate(states):
        resumed = stream(rows)
        resumed.set_state(state)
        assert seen(resumed, total - at) == items[at:], f"element {at}"
        resumed.close()


def test_a_position_of_an_earlier_version_is_read_where_it_counts_rows():
    rows = make_rows(7)
    prompts, resumed = stream(rows), stream(rows)
    first = seen(prompts, 9)
    resumed.set_state({"position": {"next_index": 4}, "bad_rows": []})
    assert seen(resumed, 5) == first[4:]
    with pytest.raises(ValueError, match=r"earlier version with data\.workers"):
        resumed.set_state({"position": {"workers_state": {}}, "bad_rows": []})


def test_every_row_is_shown_once_per_epoch():
    rows, epochs = make_rows(6), 3
    shown = seen(stream(rows), 6 * epochs)
    for epoch in range(epochs):
        part = shown[6 * epoch : 6 * epoch + 6]
        assert sorted(name for name, _ in part) == sorted(row.row_id for row in rows)
        for name, budget in part:
            assert budget == frame_budget(0, epoch, name, CHOICES)


def test_a_mixture_draws_by_weight_and_keeps_epochs():
    small, large = make_rows(3, "a"), make_rows(10, "b")
    names = [name for name, _ in seen(stream(Mixture((small, large), (3.0, 1.0))), 40)]
    for start in range(0, 40, 4):
        assert sum(name[0] == "a" for name in names[start : start + 4]) == 3
    for rows, kind in ((small, "a"), (large, "b")):
        of_kind = [name for name in names if name[0] == kind]
        for start in range(0, len(of_kind) - len(rows) + 1, len(rows)):
            assert len(set(of_kind[start : start + len(rows)])) == len(rows)


def test_a_mixture_resumes():
    mixture = Mixture((make_rows(4, "a"), make_rows(6, "b")), (1.0, 1.0))
    prompts, resumed = stream(mixture), stream(mixture)
    first = seen(prompts, 4)
    assert sum(name[0] == "a" for name, _ in first) == 2, "it has both"
    resumed.set_state(prompts.get_state())
    assert seen(resumed, 9) == seen(prompts, 9)


def test_a_mixture_is_a_sequence_of_all_rows():
    mixture = Mixture((make_rows(2, "a"), make_rows(3, "b")), (1.0, 1.0))
    assert [mixture[index].row_id for index in range(len(mixture))] == [
        "a0",
        "a1",
        "b0",
        "b1",
        "b2",
    ]
    with pytest.raises(IndexError):
        mixture[5]
    with pytest.raises(ValueError, match="rows is empty"):
        stream(Mixture((make_rows(2), []), (1.0, 1.0)))


@pytest.mark.slow
def test_no_prompt_is_longer_than_was_said_beforehand():
    rows = [question.row for question in questions()]
    most = prompt_tokens(renderer(), rows, 8)
    prompts = prompt_stream(rows, VideoReader(), renderer(), (2, 8), 8, seed=0)
    lengths = [len(item.prompt.tokens) for _ in range(4) for item in next(prompts)]
    assert max(lengths) <= most < 2 * max(lengths)
    prompts.close()


def whole(prompts, count: int) -> list[tuple]:
    """Row, K, tokens and frames of the next steps, comparable."""
    items = [item for items in itertools.islice(prompts, count) for item in items]
    return [
        (
            item.row,
            item.frame_budget,
            item.prompt.tokens.tobytes(),
            item.prompt.patches.values.tobytes(),
        )
        for item in items
    ]


def check_workers(workers: int, total: int, at: tuple[int, ...]) -> None:
    """With workers, the stream is that without them, and resumes at these elements: at even ones
    without workers, at odd ones with as many."""
    rows = row_source([question.row for question in questions()][:5], data_folder())

    def real(workers: int):
        return prompt_stream(
            rows, VideoReader(), renderer(), (2, 4), groups_per_step=1, seed=0, workers=workers
        )

    expected = whole(real(0), total)
    prompts, states, items = real(workers), {}, []
    for step in range(total):
        states[step] = json.loads(json.dumps(prompts.get_state()))
        items += whole(prompts, 1)
    prompts.close()
    assert items == expected
    for step in at:
        resumed = real(step % 2 * workers)
        resumed.set_state(states[step])
        assert whole(resumed, total - step) == items[step:], f"element {step}"
        resumed.close()


@pytest.mark.slow
def test_a_stream_with_a_worker_resumes_without_one():
    check_workers(workers=1, total=7, at=(4,))


@pytest.mark.study
@pytest.mark.parametrize("workers", [1, 4])
def test_streams_with_workers_resume_at_any_element(workers):
    check_workers(workers, total=8, at=tuple(range(8)))
