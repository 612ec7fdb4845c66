"""The mesh that rollouts take by default where the chip is known."""

import dataclasses

import jax
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from rollout.engine.engine import SlotPool
from tests.support.tiny_models import QWEN
from train.compile import layout
from train.compile.chips import CHIPS

POOLS = {"main": SlotPool(prompts=8, copies=2, prompt_tokens=64, suffix=32)}


@pytest.mark.parametrize(("bandwidth", "tensor"), [(1e3, 2), (1e15, 1)])
def test_rollouts_take_the_mesh_that_is_soonest_done_with_a_token(monkeypatch, bandwidth, tensor):
    """Where reading weights takes long they are shared; where waiting does, they are not."""
    devices = make_mesh(parse_mesh("fsdp:8", 8))
    chip = dataclasses.replace(CHIPS["TPU v5"], bandwidth=bandwidth)
    monkeypatch.setitem(layout.CHIPS, jax.devices()[0].device_kind, chip)
    monkeypatch.setattr(layout, "memory_limit", lambda mesh: 2**40)
    found = layout.RolloutLayout(QWEN, devices, None, QWEN.compute_dtype, 0)(POOLS)
    assert found is not None
    assert dict(found.shape) == parse_mesh(f"data:{8 // tensor},tensor:{tensor}", 8)
