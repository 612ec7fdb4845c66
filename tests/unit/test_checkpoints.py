"""Checkpoints are written beside the steps, verified when restored, and never the last one lost."""

import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx as nn
from jax.sharding import NamedSharding, PartitionSpec

from paravt_jax import event_loops
from paravt_jax.array_store import boxes
from paravt_jax.checksum import checksum, checksums, part_checksum
from paravt_jax.event_loops import close_in_order
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import ParamSpec
from train.state import TrainState
from train.workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TABLE, MANY = (
    {
        name: ParamSpec(
            name, (64, 32), jnp.dtype("float32"), ("embed", "mlp"), nn.initializers.zeros, name
        )
        for name in ("w", *(f"w{number}" for number in range(more)))
    }
    for more in (0, 40)
)


def state_of(value, table=TABLE):
    """A state of weights with a moment each."""
    rng = np.random.default_rng(value)
    w, m = (
        {name: jnp.asarray(rng.normal(size=(64, 32)), jnp.float32) for name in table} for _ in "wm"
    )
    count, step = (jnp.asarray(value, jnp.int32) for _ in "cs")
    return TrainState(w, {}, {"mu": m, "count": count}, step)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def flip_bit(item, name="w"):
    """Change one bit of one stored number, as a disk would."""
    store = ts.open(f"file://{item}/|ocdbt:{name}/|auto:", open=True).result()
    values = store.read().result().copy()
    values.view(np.uint32)[5, 7] ^= 1 << 22
    store.write(values).result()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_a_checksum_sees_any_bit_and_any_swap_and_no_layout(dtype):
    values = np.random.default_rng(0).integers(0, 2, (16, 8)).astype(jnp.dtype(dtype))
    plain = int(checksum(jnp.asarray(values)))
    mesh = make_mesh(parse_mesh("fsdp:4,tensor:2", 8))
    for axes in (("fsdp", "tensor"), ("tensor", None), (None, None)):
        home = NamedSharding(mesh, PartitionSpec(*axes))
        assert int(checksum(jax.device_put(values, home))) == plain
    raw = values.view(np.uint8)
    for at in range(raw.size if dtype != "bool" else 0):
        changed = raw.copy()
        changed.reshape(-1)[at] ^= 1 << (at % 8)
        assert int(checksum(jnp.asarray(changed.view(values.dtype)))) != plain
    assert int(checksum(jnp.asarray(values[::-1]))) != plain
    assert int(checksum(jnp.asarray(values.reshape(8, 16)))) == plain, "shape is Orbax's to check"
    assert set(checksums({"a": jnp.ones(3), "b": (jnp.ones(3),)})) == {"['a']", "['b'][0]"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("chunk", [(1, 1, 5), (2, 3, 5), (3, 2, 4), (9, 9, 9)])
def test_checksums_of_boxes_add_up(dtype, chunk):
    values = np.random.default_rng(1).integers(0, 99, (3, 4, 5)).astype(jnp.dtype(dtype))
    parts = [
        part_checksum(values[box], tuple(side.start for side in box), values.shape)
        for box in boxes(values.shape, chunk)
    ]
    assert sum(parts) % 2**32 == int(checksum(jnp.asarray(values)))
    assert part_checksum(np.array(3, np.float32), (), ()) == int(checksum(jnp.float32(3)))


def test_a_state_that_is_donated_while_it_is_written_comes_back_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, table=TABLE)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, want = state_of(1), state_of(1)
    checkpoints.save(1, state, {"prompts": 3})
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    back, number, position = checkpoints.restore(want)
    assert (number, position) == (1, {"prompts": 3})
    same(back, want)
    checkpoints.close()


def test_the_newest_few_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, table=TABLE)
    for number in range(1, 5):
        checkpoints.save(number, state_of(number))
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def damage_weights(step):
    flip_bit(step / "params")


def damage_position(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"prompts": 2', '"prompts": 7'))


def cut_off(step):
    for path in (step / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_item(step):
    (step / "meta" / "metadata").unlink()


@pytest.mark.parametrize("damage", [damage_weights, damage_position, cut_off, lose_item])
def test_a_damaged_checkpoint_gives_way_to_an_older_one(damage, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3, table=TABLE)
    for number in (1, 2):
        checkpoints.save(number, state_of(number), {"prompts": number})
    checkpoints.close()
    damage(tmp_path / "2")
    lines = []
    checkpoints = Checkpoints(tmp_path, keep=3, table=TABLE)
    back, number, position = checkpoints.restore(state_of(1), lines.append)
    assert (number, position) == (1, {"prompts": 1})
    same(back, state_of(1))
    (line,) = lines
    assert str(tmp_path / "2") in line and str(tmp_path / "1") in line
    checkpoints.save(2, state_of(2), {"prompts": 2})
    same(checkpoints.restore(state_of(1))[0], state_of(2))
    checkpoints.close()


def test_what_fails_together_is_not_heard_of_one_by_one(tmp_path, monkeypatch):
    """Neither while it is written nor when it is read: all that Orbax waited for ends with it."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    monkeypatch.setattr(sys, "excepthook", lambda *error: heard.append(error))
    checkpoints = Checkpoints(tmp_path, keep=3, table=MANY)
    checkpoints.save(1, state_of(1, MANY))
    checkpoints.close()
    cut_off(tmp_path / "1")
    for _ in range(5):
        checkpoints = Checkpoints(tmp_path, keep=3, table=MANY)
        with pytest.raises(ValueError, match="no checkpoint"):
            checkpoints.restore(state_of(1, MANY))
        checkpoints.close()
    time.sleep(1)  # for threads of TensorStore
    assert heard == []


@pytest.mark.parametrize("seconds", [0.05, 60])
def test_a_loop_that_closes_has_no_tasks_left(seconds, monkeypatch, caplog):
    """Those that end soon are waited for, others are cancelled; nobody complains of either."""
    close_in_order()
    monkeypatch.setattr(event_loops, "PATIENCE", 0.5)
    ended, kept = [], []

    async def late():
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        ended.append("failed")
        raise OSError("full, too")

    async def fails():
        kept.append(asyncio.ensure_future(late()))
        await asyncio.sleep(0)
        raise OSError("full")

    loop = asyncio.new_event_loop()
    with pytest.raises(OSError, match="full"):
        loop.run_until_complete(fails())
    assert ended == []
    loop.close()
    assert ended == ["failed" if seconds < 1 else "cancelled"] and loop.is_closed()
    loop.close()
    kept.clear()
    gc.collect()
    assert caplog.text == ""


def test_no_intact_checkpoint_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3, table=TABLE)
    for number in (1, 2):
        checkpoints.save(number, state_of(number))
        checkpoints.wait()
        flip_bit(tmp_path / str(number) / "params")
    with pytest.raises(ValueError, match=r"no checkpoint .*\(2: 1 arrays .*'w'.*; 1: 1 arrays"):
        checkpoints.restore(state_of(1))
    checkpoints.close()


def test_a_checkpoint_of_an_earlier_version_is_restored_and_told(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3, table=TABLE)
    checkpoints.save(1, state_of(1), {"prompts": 1})
    checkpoints.close()
    path = tmp_path / "1" / "meta" / "metadata"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({key: held[key] for key in ("step", "updates", "data")}))
    lines = []
    checkpoints = Checkpoints(tmp_path, keep=3, table=TABLE)
    assert checkpoints.restore(state_of(1), lines.append)[1] == 1
    assert len(lines) == 1 and "earlier version" in lines[0]
    checkpoints.close()


FULL = """
import sys
sys.path[0] = {root!r}
import resource
from pathlib import Path
from tests.unit.test_checkpoints import *
from train.hosts.interrupt import end_process
checkpoints = Checkpoints(Path({folder!r}), keep=1, table=MANY)
checkpoints.save(1, state_of(1, MANY))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    checkpoints.save(2, state_of(2, MANY))
    checkpoints.close()
except OSError as error:
    print(error)
    end_process(1, seconds=5)
    sys.exit(1)
"""


def test_a_disk_that_is_full_costs_no_older_checkpoint_and_ends_in_one_line(tmp_path):
    assert resource.RLIMIT_FSIZE, "stands in for the disk: writes beyond it fail"
    code = FULL.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.strip().splitlines()
    assert str(tmp_path) in line and "2 could not be written" in line and "--workdir" in line
    assert "(File too large)" in line
    assert "1" in [path.name for path in tmp_path.iterdir()]
    checkpoints = Checkpoints(tmp_path, keep=1, table=MANY)
    same(checkpoints.restore(state_of(1, MANY))[0], state_of(1, MANY))
    checkpoints.close()  # what was half written is deleted beside other work
    assert [path.name for path in tmp_path.iterdir()] == ["1"], "what was half written is gone"
