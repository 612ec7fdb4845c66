"""Which prompts are read together."""

import collections

import numpy as np
import pytest

from rollout.engine.padding import grouped, prompt_batches

MANY = [(512, 8), (512, 8), (512, 8), (512, 8), (256, 4), (256, 0)]
MIXED = [(1024, 16), (512, 8), (256, 4), (512, 16), (64, 32)]


def read(shapes, most, shards):
    groups = grouped(enumerate(shapes), lambda pair: pair[1])
    return list(prompt_batches(groups, most, shards))


@pytest.mark.parametrize("shards", [1, 3, 4, 8, 32])
@pytest.mark.parametrize("most", [1, 2, 8, 64])
def test_every_prompt_is_read_once_in_a_shape_that_holds_it(most, shards):
    dice = np.random.default_rng(most)
    for count in range(1, 30):
        shapes = [(int(64 << dice.integers(4)), int(dice.integers(3)) * 4) for _ in range(count)]
        seen = collections.Counter()
        for (tokens, frames), batch, size in read(shapes, most, shards):
            assert (tokens, frames) in shapes and len(batch) <= size in (
                1,
                min(most, max(16, shards)),
            )
            for number, (own, shown) in batch:
                assert own <= tokens and shown <= frames
                seen[number] += 1
        assert seen == dict.fromkeys(range(count), 1)


def test_one_device_reads_each_shape_by_itself():
    assert [size for _, _, size in read(MIXED, 8, 1)] == [1] * 5
    assert [size for _, _, size in read(MANY, 8, 1)] == [8, 1, 1]


def test_a_mesh_reads_prompts_of_several_shapes_together():
    found = read(MIXED, 8, 8)
    assert [(shape, len(batch), size) for shape, batch, size in found] == [
        ((1024, 16), 4, 8),
        ((64, 32), 1, 1),
    ]
