"""A LoRA run through the real command: adapters train, `hf/` is merged, `adapter/` is peft's."""

import json

import jax
import numpy as np
import pytest

from models.common.adapter import checkpoint_lora, load_adapter
from models.common.weights import load_params
from models.qwen3_vl import Qwen3VLPolicy, read_config
from paravt_jax.checkpoint import find_model_files, find_step, open_params
from paravt_jax.lora import NO_LORA, LoraConfig
from paravt_jax.mesh import make_mesh, parse_mesh
from tests.support.command import metrics, start
from train import setup
from train.checks import check_model
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import override

pytestmark = pytest.mark.slow

LORA = LoraConfig(rank=8, alpha=16)
SETTINGS = [
    "model.lora.alpha=16",
    "model.lora.rank=8",
    "optimizer.learning_rate=3e-3",
    "evaluation.rows=0",
    "rl.group_size=4",
    "rl.micro_groups=2",
    "agent.turn_tokens=48",
    "agent.max_tool_rounds=0",
    "data.train_videos=4",
]


@pytest.fixture(scope="module")
def workdir(cache, tmp_path_factory):
    """Two RL steps with adapters on the committed cold start."""
    workdir = tmp_path_factory.mktemp("run") / "lora"
    done = start(workdir, cache, "--steps", "2", settings=SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def policy(lora):
    return Qwen3VLPolicy(read_config(COLD_START), lora=lora)


def test_the_reference_is_the_starting_policy(workdir):
    first, second = metrics(workdir)
    assert abs(first["kl"]) < 1e-6 and second["kl"] > 1e-5
    assert max(first["logprob/gap_max"], second["logprob/gap_max"]) < 1e-4


def test_merged_folder_is_the_base_with_the_adapter(workdir):
    adapted, plain = policy(LORA), policy(LORA).without_lora
    base = load_params(COLD_START, plain.table)
    params = base | load_adapter(workdir / "adapter", adapted.table, LORA)
    merged = load_params(workdir / "hf", plain.table)
    for name, value in adapted.merge(params).items():
        np.testing.assert_allclose(merged[name], value, atol=1e-7, err_msg=name)
    moved = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert len(moved) == len(LORA.targets) and all(name.endswith("kernel") for name in moved)
    raw = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(COLD_START)


def test_a_checkpoint_knows_its_adapters(workdir, tmp_path):
    """Merged from the files of the checkpoint, box by box, as on the devices at the run's end."""
    step = find_step(workdir)
    source = find_model_files(step)
    adapted = policy(checkpoint_lora(source, policy(NO_LORA).table))
    assert adapted.lora == LORA
    params = adapted.merge(open_params(step, adapted.table))
    Qwen3VLPolicy(adapted.config).save_folder(params, tmp_path / "hf", base=source)
    ours, theirs = (load_params(f / "hf", adapted.without_lora.table) for f in (tmp_path, workdir))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), ours, theirs)
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        p.name for p in (workdir / "hf").iterdir()
    }


def test_an_adapter_continues_where_it_was(workdir):
    """A new run from `adapter/` starts at the policy that the first run ended with."""
    onward = [*SETTINGS, f"model.adapter={workdir / 'adapter'}"]
    config = override(get_recipe("needle_rl"), onward)
    check_model(config, here=True)
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    start = setup.Parts(config).params(mesh)
    end = open_params(find_step(workdir), policy(LORA).table)
    jax.tree.map(np.testing.assert_array_equal, start, end)
    with pytest.raises(ValueError, match=r"model\.lora\.alpha=32, but .* has 16"):
        check_model(override(config, ["model.lora.alpha=32"]), here=True)
    with pytest.raises(ValueError, match="give --model"):
        check_model(override(config, ["model.folder=none"]), here=True)
