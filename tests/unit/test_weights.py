"""Weights in parts: boxes of Hugging Face tensors, safetensors files, checkpoints, damage."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from models import convert
from models.common import weights as weights_module
from models.common.folder import whole_folder
from models.common.safetensors_io import StoredTensor, TensorSpec, stored_tensors, write_tensors
from models.common.weights import FolderWeights, load_params
from models.qwen3_vl import Qwen3VLPolicy, read_config
from paravt_jax import checkpoint
from paravt_jax.array_store import boxes
from paravt_jax.checkpoint import create_params, open_params
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import HfLayout, param_shardings
from tests.support.tiny_models import SPARSE as CONFIG
from tests.support.tiny_models import SPARSE_TABLE as TABLE
from train.state import TrainState
from train.workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(0)
    shapes = {name: spec.shape for name, spec in TABLE.items()}
    return {n: jnp.asarray(generator.normal(size=s), jnp.float32) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory, params):
    """A folder in three shards with an index."""
    folder = tmp_path_factory.mktemp("written") / "model"
    Qwen3VLPolicy(CONFIG).save_folder(params, folder, max_shard_bytes=70_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def model(tmp_path, written):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def change(folder, edit):
    """Rewrite the tensors of a folder as one file."""
    tensors = {name: tensor[(slice(None),)] for name, tensor in stored_tensors(folder).items()}
    for path in folder.glob("model*"):
        path.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(loaded, params):
    assert loaded.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


# Boxes of tensors

LAYOUTS = {
    "norm": (HfLayout((6,), swapped=False), (6,)),
    "linear": (HfLayout((6, 4)), (4, 6)),
    "patches": (HfLayout((5, 3, 2, 2)), (12, 5)),
    "experts, released": (HfLayout((3, 4, 10), swapped=False), (3, 4, 2, 5)),
    "experts, transposed": (HfLayout((3, 10, 4), batch=1), (3, 4, 2, 5)),
    "experts down": (HfLayout((3, 4, 5), batch=1), (3, 5, 4)),
    "ones": (HfLayout((1, 2), swapped=False), (1, 1, 2)),
}


class Spy:
    """Counts the values that are taken from a tensor."""

    def __init__(self, tensor):
        self.tensor, self.taken = tensor, 0

    def __getitem__(self, box):
        part = self.tensor[box]
        self.taken += part.size
        return part


def span(size):
    bounds = st.tuples(st.integers(0, size - 1), st.integers(1, size))
    return bounds.map(lambda b: slice(b[0], max(b[0] + 1, b[1])))


@pytest.mark.parametrize("kind", LAYOUTS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_box_is_that_part_of_the_whole(kind, data):
    layout, shape = LAYOUTS[kind]
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(layout.shape)
    box = data.draw(st.tuples(*map(span, shape)))
    spy = Spy(tensor)
    np.testing.assert_array_equal(layout.read_box(spy, shape, box), layout.read(tensor, shape)[box])
    common = layout.common_axes(shape)
    within = [box[axis].stop - box[axis].start for axis in common]
    rest = [n for d, n in enumerate(layout.shape) if d not in common.values()]
    assert spy.taken == np.prod([*within, *rest])


def test_rows_are_cut_where_the_file_has_its_rows():
    for layout, shape in LAYOUTS.values():
        whole = np.arange(np.prod(shape)).reshape(shape)
        axis = next((a for a, d in layout.common_axes(shape).items() if d == 0), None)
        assert axis is not None
        for row in range(layout.shape[0]):
            part = whole.take([row], axis)
            np.testing.assert_array_equal(layout.write_rows(part)[0], layout.write(whole)[row])


def test_boxes_cover_an_array_once():
    counts = np.zeros((5, 4, 3), int)
    for box in boxes(counts.shape, (2, 4, 2)):
        counts[box] += 1
    assert (counts == 1).all() and len(list(boxes((5, 4, 3), (2, 4, 2)))) == 6


# Safetensors files


def test_written_tensors_are_what_the_library_reads(tmp_path):
    """Wide and narrow types in one file, parts in any order, one tensor beyond a shard's size."""
    want = {
        "half": np.arange(3).astype(jnp.bfloat16),
        "full": np.arange(40, dtype=np.float32).reshape(10, 4),
        "large": np.arange(300, dtype=np.float16).reshape(30, 10),
        "last": np.ones((1, 2), np.float32),
    }
    rows = [
        ("large", 20, want["large"][20:]), ("last", 0, want["last"]), ("half", 0, want["half"]),
        ("full", 4, want["full"][4:]), ("large", 0, want["large"][:20]),
        ("full", 0, want["full"][:4]),
    ]  # fmt: skip
    specs = [TensorSpec(name, value.shape, value.dtype) for name, value in want.items()]
    write_tensors(tmp_path, specs, rows, max_shard_bytes=200)
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    files = [load_file(tmp_path / name) for name in names]
    assert [set(file) for file in files] == [{"half", "full"}, {"large"}, {"last"}]
    for name, value in {k: v for file in files for k, v in file.items()}.items():
        assert value.dtype == want[name].dtype
        np.testing.assert_array_equal(value, want[name])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["large"] == names[1]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in want.values())


def test_a_single_file_counts_before_an_index(model, params):
    """As in transformers: the index of an earlier, larger model may still lie about."""
    index = (model / "model.safetensors.index.json").read_text()
    change(model, lambda tensors: None)
    (model / "model.safetensors.index.json").write_text(index)
    assert_same(load_params(model, TABLE), params)


# To devices


def test_each_shard_is_read_once_and_alone(model, params, monkeypatch):
    """Eight devices, four kinds of shards: together they read the kernel once, nothing twice."""
    mesh = make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8))
    taken, original = {}, StoredTensor.__getitem__

    def spy(self, box):
        value = original(self, box)
        taken[self.name] = taken.get(self.name, 0) + value.size
        return value

    monkeypatch.setattr(StoredTensor, "__getitem__", spy)
    loaded = load_params(model, TABLE, mesh, "bfloat16")
    assert_same(loaded, {name: value.astype(jnp.bfloat16) for name, value in params.items()})
    kernel = loaded["text.layers.mlp.up.kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 16, 12)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert taken[name] == kernel.size
    assert taken[EMBEDDING] == 48 * 32


def test_sharded_weights_are_written_as_whole_ones(tmp_path, model, params):
    mesh = make_mesh(parse_mesh("fsdp:2,expert:2,tensor:2", 8))
    Qwen3VLPolicy(CONFIG).save_folder(load_params(model, TABLE, mesh), tmp_path / "again")
    assert_same(load_params(tmp_path / "again", TABLE), params)


# To a checkpoint and back


@pytest.mark.parametrize("chunk_bytes", [1000, 5000, 2**20])
def test_any_chunk_size_gives_the_same_checkpoint(
    tmp_path, model, params, chunk_bytes, monkeypatch
):
    """Some rows of a layer, one layer, several: Orbax restores all of them like its own."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    weights, size = FolderWeights(model, TABLE), np.dtype("float32").itemsize
    for name, array in create_params(tmp_path / "step", TABLE, weights.dtypes).items():
        smallest = all(array.chunk[axis] == 1 for axis in TABLE[name].part_axes)
        assert np.prod(array.chunk) * size <= chunk_bytes or smallest
        for box in boxes(array.shape, array.chunk):
            array[box] = weights.read(name, box, array.dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "step" / "params"), params)
    opened = open_params(tmp_path / "step", TABLE)
    assert_same({name: np.asarray(array) for name, array in opened.items()}, params)


def test_types_stay_what_they_are(tmp_path, model, capsys):
    """bfloat16 stays bfloat16; the layers of one parameter share the type that holds them all."""
    norm = "model.language_model.layers.{}.input_layernorm.weight"

    def mix(tensors):
        for name in tensors:
            kind = np.float16 if name == norm.format(2) else jnp.bfloat16
            tensors[name] = tensors[name].astype(kind)

    change(model, mix)
    assert convert.main(["from-hf", str(model), str(tmp_path / "there")]) == 0
    kinds = {name: str(v.dtype) for name, v in open_params(tmp_path / "there", TABLE).items()}
    mixed = kinds.pop("text.sparse_layers.attention_norm.scale")
    assert mixed == "float32" and set(kinds.values()) == {"bfloat16"}
    assert convert.main(["to-hf", str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    one, other = stored_tensors(model), stored_tensors(tmp_path / "back")
    assert one.keys() == other.keys()
    for name in one:
        left, right = one[name][(slice(None),)], other[name][(slice(None),)]
        np.testing.assert_array_equal(left.astype(np.float32), right.astype(np.float32))
    assert other[HEAD].dtype == "BF16"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_run_lays_out_its_checkpoints_in_parts(tmp_path, params, monkeypatch):
    """One layer and one expert at most, whatever the chunk may hold; on a mesh too."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2048)
    names = ("text.embedding", "text.sparse_layers.mlp.gate_up", "text.layers.mlp.up.kernel")
    table = {name: TABLE[name] for name in names}
    homes = param_shardings(table, make_mesh(parse_mesh("fsdp:2,expert:2,tensor:2", 8)))
    placed = {name: jax.device_put(params[name], home) for name, home in homes.items()}
    step = jnp.zeros((), jnp.int32)
    state = TrainState(trainable=placed, frozen={}, optimizer={"count": step}, step=step)
    checkpoints = Checkpoints(tmp_path, keep=1, table=table)
    checkpoints.save(3, state)
    checkpoints.close()
    for name, stored in open_params(tmp_path / "3", table).items():
        pairs = zip(table[name].axes, stored.chunk, strict=True)
        assert all(size == 1 for axis, size in pairs if axis in ("layers", "expert")), name
        assert np.prod(stored.chunk) * 4 <= 2048, name
        np.testing.assert_array_equal(stored, params[name])


# Files beside the weights


def test_files_are_carried_and_weights_are_not(tmp_path, model, params):
    kept = ["tokenizer.json", "chat_template.jinja", "chat_template.json", "merges.txt",
            "preprocessor_config.json", "video_preprocessor_config.json",
            "generation_config.json"]  # fmt: skip
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5",
            "adapter_config.json"]  # fmt: skip
    for name in kept + left:
        (model / name).write_text(name)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("t")
    assert convert.main(["from-hf", str(model), str(tmp_path / "there")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    for folder in (tmp_path / "there" / "model", tmp_path / "back"):
        names = {path.name for path in folder.iterdir()}
        assert names >= {*kept, "config.json", "additional_chat_templates"}
        assert not names & set(left)
        assert (folder / "additional_chat_templates" / "tools.jinja").read_text() == "t"
    Qwen3VLPolicy(CONFIG).save_folder(params, tmp_path / "back", base=tmp_path / "back")
    assert (tmp_path / "back" / "additional_chat_templates").is_dir()


# Tied heads


def tie(folder, top, text):
    raw = json.loads((folder / "config.json").read_text())
    for part, value in ((raw, top), (raw["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        part.update({} if value is None else {"tie_word_embeddings": value})
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize("top", [None, False, True])
def test_the_value_of_the_whole_model_ties(model, top, text):
    """transformers 5 does not look at the one in text_config; see tests/parity for its logits."""
    tie(model, top, text)
    assert read_config(model).tie_word_embeddings == (top is True)


def test_a_tied_model_may_repeat_its_embedding(tmp_path, model, params):
    tie(model, True, None)
    tied = Qwen3VLPolicy(read_config(model)).table
    with pytest.raises(ValueError, match="set it to false to use the head that is there"):
        load_params(model, tied)
    change(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    loaded = load_params(model, tied)
    assert "head.kernel" not in loaded
    change(model, lambda tensors: tensors.pop(HEAD))
    assert_same(load_params(model, tied), loaded)
    Qwen3VLPolicy(read_config(model)).save_folder(loaded, tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is raw["text_config"]["tie_word_embeddings"] is True


# Damage: one line, exit code 1, nothing left behind


def truncate(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def corrupt(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"]" * 64)


def misshape(folder):
    norm = "model.language_model.norm.weight"
    change(folder, lambda tensors: tensors.update({norm: np.zeros(7, np.float32)}))


def rename(folder):
    """Missing and unexpected at once."""
    change(folder, lambda tensors: tensors.update({"stray": tensors.pop(HEAD)}))


def quantise(folder):
    change(folder, lambda tensors: tensors.update({HEAD: np.zeros((48, 32), np.int8)}))


def lose_shard(folder):
    (folder / "model-00003-of-00003.safetensors").unlink()


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def promise_more(folder):
    first = "model-00001-of-00003.safetensors"
    edit_index(folder, lambda index: index["weight_map"].update({"absent.weight": first}))


def point_to_pickle(folder):
    edit_index(folder, lambda index: index["weight_map"].update({HEAD: "evil.bin"}))


def point_outside(folder):
    edit_index(folder, lambda index: index["weight_map"].update({HEAD: "../x.safetensors"}))


def empty_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def only_pickled(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def other_architecture(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "llava"}))


def broken_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model-00002-of-00003.safetensors is damaged"),
        (corrupt, "model-00002-of-00003.safetensors is damaged"),
        (misshape, "norm.weight (7,) instead of (32,)"),
        (rename, f"missing [{HEAD}]; unexpected [stray]"),
        (quantise, f"of a type other than F32, F16, BF16 [{HEAD} I8]"),
        (lose_shard, "files that are not there: model-00003-of-00003.safetensors"),
        (promise_more, "absent.weight (model-00001-of-00003.safetensors)"),
        (point_to_pickle, "names evil.bin: only safetensors"),
        (point_outside, "names ../x.safetensors: only safetensors"),
        (empty_index, "holds no JSON object"),
        (only_pickled, "only pickled weights (pytorch_model.bin)"),
        (other_architecture, "model_type='llava'"),
        (broken_config, "is not JSON"),
    ],
)
def test_a_damaged_folder_is_one_line_and_leaves_nothing(tmp_path, model, capsys, damage, message):
    damage(model)
    assert convert.main(["from-hf", str(model), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damage_after_the_headers_were_read(tmp_path, model, capsys, monkeypatch):
    """A shard that vanishes while it is converted leaves no checkpoint."""
    original = FolderWeights.read

    def read(self, name, box, dtype):
        if name == "text.norm.scale":
            truncate(model)
            lose_shard(model)
        return original(self, name, box, dtype)

    monkeypatch.setattr(weights_module.FolderWeights, "read", read)
    assert convert.main(["from-hf", str(model), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(tmp_path, model, capsys):
    assert convert.main(["from-hf", str(model), str(tmp_path / "there")]) == 0
    largest = max((tmp_path / "there/params/d").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    capsys.readouterr()
    assert convert.main(["to-hf", str(tmp_path / "there"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "damaged" in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "target"
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    full = pytest.raises(OSError, match=r"could not write .*target: .*No space left")
    with full, whole_folder(target) as folder:
        (folder / "a").write_text("2")
        raise OSError(28, "No space left on device")
    assert (target / "a").read_text() == "1"
    with whole_folder(target) as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    shutil.rmtree(target)
