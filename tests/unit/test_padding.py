"""Which prompts are read together, and which sizes blocks are padded to."""

import collections

import numpy as np
import pytest

from paravt_jax.shapes import bucket
from rollout.engine.padding import grouped, prompt_batches, static_size

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


def test_sizes():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 33)] == [
        *(1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
    ]
    assert [bucket(n, 64) for n in (0, 64, 65, 129, 193, 257, 385)] == [
        64,
        64,
        128,
        192,
        256,
        384,
        512,
    ]
    assert [bucket(n, 8, coarse=True) for n in (1, 9, 17, 33)] == [8, 16, 32, 64]
    assert bucket(385, 64, most=448) == 448


def test_blocks_of_many_tokens_are_padded_less():
    sizes = [(9, 0), (33, 3), (65, 3), (100, 5), (175, 16), (175, 0)]
    padded = [static_size(*size, least=8, most=180) for size in sizes]
    assert padded == [(16, 0), (64, 4), (96, 4), (128, 8), (180, 16), (180, 0)]
    assert static_size(175, 16, least=64) == (192, 16)
