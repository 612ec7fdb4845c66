"""A checkpoint is saved by two hosts of four devices each, and restored on other meshes."""

import json
import subprocess
import sys

import pytest

from tests.support.command import ROOT, environment
from tests.support.hosts import on_hosts

pytestmark = pytest.mark.slow

STATE = """
import json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import optax
from flax import nnx as nn
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import ParamSpec, abstract_params, initialise
from train.hosts import cluster
from train.model import ModelSettings
from train.state import abstract_state, make_state, trainable_names
from train.workdir.checkpoints import Checkpoints

cluster.start()
folder = Path({folder!r})
TABLE = {{
    name: ParamSpec(name, shape, jnp.dtype("float32"), axes, nn.initializers.normal(1.0), name)
    for name, shape, axes in (
        ("mlp", (3, 32, 64), ("layers", "embed", "mlp")),
        ("vocab", (80, 32), ("vocab", "embed")),
        ("scale", (32,), ("norm",)),
    )
}}
OPTIMIZER = optax.adam(1e-3)
TRAINED = trainable_names(TABLE, ModelSettings())

def on(text, count):
    return make_mesh(parse_mesh(text, count), jax.devices()[:count])
"""
SAVE = """
mesh = on("data:2,fsdp:2,tensor:2", 8)
params = initialise(TABLE, jax.random.key(3), mesh)
state = make_state(params, TRAINED, mesh, OPTIMIZER)
for step in (6, 7):  # the second time there is something that the hosts find
    saved = Checkpoints(folder, 1, TABLE)
    saved.save(step, state, {"prompts": 5})
    saved.close()
print("saved by", jax.process_count(), len(jax.local_devices()))
"""
RESTORE = """
one = initialise(TABLE, jax.random.key(3), on("data:1", 1))
for text, count in (("fsdp:4", 4), ("data:1", 1), ("fsdp:8,tensor:2", 16)):
    mesh = on(text, count)
    like = abstract_state(abstract_params(TABLE, mesh), TRAINED, mesh, OPTIMIZER)
    saved = Checkpoints(folder, 1, TABLE)
    state, step, position = saved.restore(like)
    saved.close()
    for name, want in one.items():
        np.testing.assert_array_equal(jax.device_get(state.params[name]), jax.device_get(want))
        assert state.params[name].sharding == like.params[name].sharding
    devices = {d for x in jax.tree.leaves(state) for d in x.sharding.device_set}
    print(json.dumps([step, position, len(devices)]))
"""


def test_two_hosts_save_and_four_one_and_sixteen_devices_restore(tmp_path):
    start = STATE.format(root=str(ROOT), folder=str(tmp_path / "checkpoints"))
    ends = on_hosts([sys.executable, "-c", start + SAVE], devices=4)
    assert all("saved by 2 4" in end.output for end in ends)
    done = subprocess.run(
        [sys.executable, "-c", start + RESTORE],
        env=environment(16),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert told == [[7, {"prompts": 5}, devices] for devices in (4, 1, 16)]
