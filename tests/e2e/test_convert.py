"""`python models/convert.py`, run as a user runs it, from another folder."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from benchmarks.convert import measure
from models import convert as door
from models.common.weights import load_params
from models.qwen3_vl import (
    Qwen3VLConfig,
    Qwen3VLPolicy,
    TextConfig,
    VisionConfig,
    from_pretrained,
    read_config,
)
from paravt_jax.checkpoint import open_params, save_params
from paravt_jax.params import initialise
from tests.support.command import run as run_command
from tests.support.command import run_anew
from train.state import TrainState
from train.workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "models" / "convert.py"
CONFIG = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, mrope_section=(3, 3, 2),
    ),
    vision=VisionConfig(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4,
        out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=(1,),
    ),
    tie_word_embeddings=True,
)  # fmt: skip
TABLE = Qwen3VLPolicy(CONFIG).table


@pytest.fixture(scope="module")
def params():
    return initialise(TABLE, jax.random.key(0))


@pytest.fixture
def model(tmp_path, params):
    """A Hugging Face folder with a tokenizer file and a field that is not ours."""
    folder = tmp_path / "model"
    Qwen3VLPolicy(CONFIG).save_folder(params, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def convert(tmp_path, *arguments, start=run_command):
    return start([sys.executable, str(SCRIPT), *map(str, arguments)], tmp_path)


def assert_same(folder, params):
    loaded = load_params(folder, TABLE)
    for name, value in params.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_there_and_back(tmp_path, model, params):
    there = convert(tmp_path, "from-hf", model, "checkpoint", start=run_anew)
    assert there.returncode == 0, there.stderr
    back = convert(tmp_path, "to-hf", "checkpoint", "again", start=run_anew)
    assert back.returncode == 0, back.stderr
    assert_same(tmp_path / "again", params)
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["text_config"]["eos_token_id"] == 7
    assert read_config(tmp_path / "again") == CONFIG


@pytest.mark.parametrize("meant", ["run", "run/checkpoints", "run/checkpoints/12"])
def test_a_run_means_its_latest_step(tmp_path, model, params, meant):
    """Checkpoints as the trainer writes them, beside other items; config.json from the run."""
    manager = ocp.CheckpointManager(tmp_path / "run" / "checkpoints")
    for step in (3, 12):
        shifted = {name: value + (12 - step) for name, value in params.items()}
        items = {
            "params": ocp.args.StandardSave(shifted),
            "meta": ocp.args.JsonSave({"step": step}),
        }
        manager.save(step, args=ocp.args.Composite(**items))
    manager.close()
    model.rename(tmp_path / "run" / "model")
    assert door.main(["to-hf", str(tmp_path / meant), str(tmp_path / "hf")]) == 0
    assert_same(tmp_path / "hf", params)
    assert (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.fixture
def run(tmp_path, model, params):
    """A run's folder with a checkpoint that carries checksums."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1, table=TABLE)
    step = jnp.asarray(3, jnp.int32)
    checkpoints.save(3, TrainState(dict(params), {}, {"count": step}, step))
    checkpoints.close()
    model.rename(tmp_path / "run" / "model")
    return tmp_path / "run"


def change_one_number(step, name):
    """As a disk would that flips bits."""
    store = ts.open(f"file://{step}/params/|ocdbt:{name}/|auto:", open=True).result()
    values = store.read().result().copy()
    values.reshape(-1).view(np.uint32)[3] ^= 1 << 22
    store.write(values).result()


@pytest.mark.parametrize("name", ["text.norm.scale", "text.layers.mlp.up.kernel"])
def test_weights_that_have_changed_since_are_named(tmp_path, run, params, name):
    whole = convert(tmp_path, "to-hf", "run", "whole")
    assert (whole.returncode, whole.stderr) == (0, "") and "checksum" not in whole.stdout
    assert_same(tmp_path / "whole", params)
    change_one_number(run / "checkpoints" / "3", name)
    changed = convert(tmp_path, "to-hf", "run", "changed")
    assert changed.returncode == 1 and not (tmp_path / "changed").exists()
    (line,) = changed.stderr.strip().splitlines()
    assert f"1 of {len(TABLE)} arrays" in line and line.count(name) == 1
    assert "run/checkpoints/3 is damaged" in line and "older checkpoint" in line


def test_accelerators_are_left_to_others(tmp_path, model, monkeypatch):
    """Here are none, so that asking for one would fail."""
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    done = convert(tmp_path, "from-hf", model, "there", start=run_anew)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_read_is_named(tmp_path, model, capsys):
    """Without checksums too, which is told."""
    assert door.main(["from-hf", str(model), str(tmp_path / "there")]) == 0
    assert door.main(["to-hf", str(tmp_path / "there"), str(tmp_path / "again")]) == 0
    assert "holds no checksums" in capsys.readouterr().out
    files = sorted((tmp_path / "there" / "params" / "d").iterdir(), key=lambda p: p.stat().st_size)
    files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size // 2])
    assert door.main(["to-hf", str(tmp_path / "there"), str(tmp_path / "lost")]) == 1
    assert not (tmp_path / "lost").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "damaged at " in line and any(name in line for name in TABLE), line


def test_misuse_is_one_line_and_code_2(tmp_path):
    for arguments in ([], ["to-hf"], ["sideways", "a", "b"]):
        result = convert(tmp_path, *arguments)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-hf", "nowhere", "out"], "holds no checkpoint"),
        (["to-hf", "bare", "out"], "pass --base"),
        (["to-hf", "bare", "out", "--base", "nowhere"], "does not exist"),
        (["to-hf", "bare", "full", "--base", "model"], "not empty"),
        (["from-hf", "nowhere", "out"], "does not exist"),
        (["from-hf", "model", "full"], "not empty"),
    ],
)
def test_bad_input_is_one_line_and_code_1(
    tmp_path, model, params, arguments, message, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_params("bare", params)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    assert door.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "precious").exists()
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(tmp_path, model, params):
    save_params(tmp_path / "step", {name: v for name, v in params.items() if "norm" not in name})
    with pytest.raises(ValueError, match=r"text\.norm\.scale"):
        open_params(tmp_path / "step", TABLE)
    untied = Qwen3VLConfig(CONFIG.text, CONFIG.vision, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing \[lm_head\.weight\]"):
        load_params(model, Qwen3VLPolicy(untied).table)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pickled weights"):
        from_pretrained(model)


def test_saving_again_replaces_a_model(tmp_path, model, params):
    changed = {name: value + 1 for name, value in params.items()}
    Qwen3VLPolicy(CONFIG).save_folder(changed, model, base=model)
    assert_same(model, changed)
    assert (model / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def study(*case):
    """Each way and each moment is held by the cases beside."""
    return pytest.param(*case, marks=pytest.mark.study)


@pytest.mark.parametrize(
    ("command", "source", "file_bytes"),
    [
        ("from-hf", "model", 0),
        ("to-hf", "there", 8000),
        study("from-hf", "model", 8000),
        study("to-hf", "there", 0),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, model, command, source, file_bytes):
    """Files may not grow beyond a size, so that writing fails at the first byte, or on the way."""
    assert door.main(["from-hf", str(model), str(tmp_path / "there")]) == 0
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file_bytes), str(SCRIPT), command, source, "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("models/convert.py: could not write"), done.stderr
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.study
def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.6 GB of weights; `benchmarks/results.md` has the figures of an 8B model."""
    text = TextConfig(
        vocab_size=40000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    vision = VisionConfig(
        depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=1024,
        deepstack_visual_indexes=(1,),
    )  # fmt: skip
    found = measure(Qwen3VLConfig(text, vision), tmp_path, max_shard_bytes=2**28)
    assert found["weights"] > 5.9e8
    for command in ("from-hf", "to-hf"):
        assert found[command] - found["idle"] < 0.6 * found["weights"], found
