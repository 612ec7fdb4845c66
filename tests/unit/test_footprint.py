"""What a pod's devices would hold is known on a laptop."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from paravt_jax.params import abstract_params
from pipelines.needle.world import write_mp4
from tests.support.released_models import MODELS
from train import checks, main, setup
from train.compile.footprint import (
    checkpoint_bytes,
    format_checkpoint,
    format_footprint,
    planned_mesh,
)
from train.compile.layout import open_layout
from train.config import Config
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import override
from train.state import make_state, trainable_names


def needle(mesh: str | None, *settings: str) -> Config:
    return dataclasses.replace(override(get_recipe("needle_rl"), list(settings)), mesh=mesh)


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [("fsdp:8,tensor:4", 32), ("data:2,fsdp:2", 4), ("fsdp:-1", 8), (None, 8), ("data:64", 64)],
)
def test_a_mesh_of_devices_that_are_elsewhere(mesh, devices):
    assert jax.device_count() == 8
    assert planned_mesh(mesh).size == devices


@pytest.mark.parametrize("mesh", ["pipeline:2", "data:2,data:4", "data:0", "data:3,fsdp:-1"])
def test_a_wrong_mesh_is_refused_as_ever(mesh):
    with pytest.raises(ValueError, match="--mesh"):
        planned_mesh(mesh)


def test_it_is_what_real_devices_hold():
    """Bytes of weights that are really laid out over eight devices."""
    config = needle("data:2,fsdp:2,tensor:2")
    parts, mesh = setup.Parts(config), setup.open_mesh(config)
    planned = checks.planned_footprint(parts, planned_mesh(config.mesh))
    assert planned == checks.planned_footprint(parts, mesh)
    params = parts.params(mesh)
    held = {name: x.addressable_shards[0].data.nbytes for name, x in params.items()}
    trains = sum(held[name] for name in trainable_names(parts.policy.table, config.model))
    assert planned["parameters"] == sum(held.values())
    assert planned["gradients"] == planned["reference"] == trains
    assert 2 * trains <= planned["moments"] <= 2 * trains + 64
    assert "together" in format_footprint(planned)


def test_a_checkpoint_holds_every_array_once():
    config = needle("data:2,fsdp:2,tensor:2")
    parts, mesh = setup.Parts(config), setup.open_mesh(config)
    optimizer = make_optimizer(config.optimizer, config.steps, parts.policy.table)
    trained = trainable_names(parts.policy.table, config.model)
    state = make_state(parts.params(mesh), trained, mesh, optimizer)
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.optimizer)))
    size = checkpoint_bytes(parts.policy, optimizer, config.model)
    assert size == held
    assert format_checkpoint(98 * 10**9).endswith("93,460.1 MiB, 49.0 s to write or read at 2 GB/s")


def test_more_devices_hold_less_each():
    sizes = []
    for mesh in ("data:1", "fsdp:8", "fsdp:8,tensor:4"):
        config = needle(mesh)
        found = checks.planned_footprint(setup.Parts(config), planned_mesh(config.mesh))
        sizes.append(found["parameters"] + found["moments"])
    assert sizes[0] > 4 * sizes[1] and sizes[1] > 1.2 * sizes[2]


def test_rollouts_ahead_keep_weights_of_earlier_steps_and_may_have_devices_of_their_own():
    config = override(get_recipe("needle_rl"), ["rl.staleness=2", "rollout_devices=4"])
    parts = setup.Parts(config)
    found = checks.planned_footprint(parts, planned_mesh("fsdp:4", 4))
    assert found["weights of earlier steps"] == 2 * found["gradients"]
    learner, rollouts = format_footprint(found, apart=True).split("--rollout-devices")
    assert "rollout" not in learner and "parameters" not in rollouts
    assert planned_mesh(None, 4).size == 4, "of eight devices here"
    own, apart = setup.open_mesh(config), setup.open_rollout_devices(config)
    layout = open_layout(parts.policy, own, None, "float32", [], apart)
    assert set(layout({}).devices.flat) == {*jax.devices()[4:]}
    assert set(setup.open_mesh(config).devices.flat) == {*jax.devices()[:4]}


def test_each_host_gives_its_share_of_rollout_devices(monkeypatch):
    """And several hosts hold all versions of the prepared weights at once."""
    here = [SimpleNamespace(process_index=at // 4, id=at) for at in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: here)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = override(get_recipe("needle_rl"), ["rl.staleness=1", "rollout_devices=2"])
    assert [own.id for own in setup.learning_devices(config)] == [0, 1, 2, 4, 5, 6]
    with pytest.raises(ValueError, match=r"--rollout-devices 3: 2 hosts cannot .* multiple of 2"):
        setup.learning_devices(override(config, ["rollout_devices=3"]))
    parts, mesh = setup.Parts(config), planned_mesh("fsdp:6", 2)
    two = checks.planned_footprint(parts, mesh)["rollout weights"]
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert two == 2 * checks.planned_footprint(parts, mesh)["rollout weights"]


def test_supervised_runs_have_no_caches():
    parts = setup.Parts(get_recipe("needle_sft"))
    found = checks.planned_footprint(parts, planned_mesh(None))
    assert set(found) == {"parameters", "moments", "gradients"}
    assert found["parameters"] == 4 * sum(
        x.size for x in abstract_params(parts.policy.table).values()
    )


def test_caches_are_those_of_the_engine():
    config = needle("data:1")
    parts = setup.Parts(config)
    engine = parts.agents.engine(parts.pools([checks.EXAMPLE]))
    planned = checks.planned_footprint(parts, planned_mesh(config.mesh))
    assert planned["rollout caches"] == engine.cache_bytes()


@pytest.fixture
def released(tmp_path):
    """The shape of the released 8B, without weights, and a question about a video."""
    folder = tmp_path / "8B"
    shutil.copytree(COLD_START, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    made, shape = json.loads((folder / "config.json").read_text()), MODELS["8B"][0]
    (folder / "config.json").write_text(json.dumps(made | shape))
    write_mp4(str(tmp_path / "v.mp4"), np.zeros((40, 32, 32, 3), np.uint8), 10.0)
    (tmp_path / "q.csv").write_text(
        "video,question,answer,question_type\nv.mp4,What is seen?,nothing,oe\n"
    )
    return ["--model", str(folder), "--data", str(tmp_path / "q.csv")]


def test_the_command_shows_the_layout_of_a_pod(released, capsys):
    recipe = ["--recipe", "paravt_rl", "--mesh", "fsdp:8,tensor:4", "--dry-run"]
    assert main.main([*recipe, *released]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "fsdp:8,expert:1,context:1,tensor:4: 32 devices (8 here)" in said
    assert "8,767,123,696 parameters" in said
    lines = [line.split() for line in said.partition("on each device:")[2].splitlines()]
    mebibytes = {" ".join(x[:-2]): float(x[-2].replace(",", "")) for x in lines if x}
    whole = 8_767_123_696 * 4 / 32 / 2**20
    assert whole <= mebibytes["parameters"] < 1.01 * whole
    assert mebibytes["moments"] == pytest.approx(2 * mebibytes["gradients"], abs=0.2)
    assert mebibytes["rollout caches"] > 0


def test_a_run_itself_needs_the_devices(capsys):
    assert main.main(["--mesh", "fsdp:8,tensor:4"]) == 2
    assert "--mesh" in capsys.readouterr().err
