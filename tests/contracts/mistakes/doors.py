"""The other two commands: model folders and checkpoints that are damaged on the way."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from models.common.weights import load_params
from models.qwen3_vl import Qwen3VLPolicy, read_config
from tests.contracts.mistakes import Mistake
from tests.contracts.mistakes.model import broken
from train.recipes.needle import COLD_START
from train.state import TrainState
from train.workdir.checkpoints import Checkpoints

NORM = "text.norm.scale"
NO_TEMPLATE = {"chat_template__jinja": "{% if"}
DEAF_TEMPLATE = {"chat_template__jinja": "Hello."}
BLIND_TEMPLATE = {
    "chat_template__jinja": "{% for m in messages %}{{ m.content if m.content is string else "
    "m.content[-1].text }}{% endfor %}"
}


@functools.cache
def _run() -> tempfile.TemporaryDirectory:
    """A run's folder with a checkpoint of the demo's model, made once."""
    folder = tempfile.TemporaryDirectory()
    table = Qwen3VLPolicy(read_config(COLD_START)).table
    step = jnp.asarray(1, jnp.int32)
    checkpoints = Checkpoints(Path(folder.name) / "checkpoints", keep=1, table=table)
    params = load_params(COLD_START, table)
    checkpoints.save(1, TrainState(dict(params), {}, {"count": step}, step))
    checkpoints.close()
    jax.clear_caches()
    shutil.copytree(COLD_START, Path(folder.name) / "model")
    (Path(folder.name) / "model" / "model.safetensors").unlink()
    return folder


def damaged(*what: Callable[[Path], object]) -> Callable[[Path], None]:
    """Makes `run/`, a copy of that run whose checkpoint, or rather its folder, is damaged."""

    def prepare(folder: Path) -> None:
        shutil.copytree(_run().name, folder / "run")
        for damage in what:
            damage(folder / "run" / "checkpoints" / "1")

    return prepare


def flip(step: Path) -> None:
    store = ts.open(f"file://{step}/params/|ocdbt:{NORM}/|auto:", open=True).result()
    values = store.read().result().copy()
    values.view(np.uint32)[3] ^= 1 << 22
    store.write(values).result()


def cut(name: str) -> Callable[[Path], None]:
    """Half of a file below the checkpoint is lost."""

    def damage(step: Path) -> None:
        path = step / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def cut_largest(step: Path) -> None:
    """Half of the file of most bytes, which holds values."""
    files = (path for path in (step / "params").rglob("*") if path.is_file())
    cut(str(max(files, key=lambda path: path.stat().st_size).relative_to(step)))(step)


def rewritten(name: str, text: str) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        (step / name).parent.mkdir(exist_ok=True)
        (step / name).write_text(text)

    return damage


def another_position(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 7}))


def converted(named: str | tuple[str, ...], prepare, arguments: str = "to-hf run out") -> Mistake:
    door = "models/convert.py"
    return Mistake(arguments, named, 1, prepare=prepare, door=door, prefix=f"{door}: ")


def taken(named: str | tuple[str, ...], prepare) -> Mistake:
    """From a folder of Hugging Face."""
    return converted(named, prepare, "from-hf m out")


def described(named: str | tuple[str, ...], prepare, more: str = "") -> Mistake:
    arguments = f"{{questions}} --model m {more}".strip()
    return Mistake(arguments, named, code=1, prepare=prepare, door="pipelines/describe.py")


def processor(name: str, **changes: object) -> Callable[[Path], None]:
    raw = json.loads((Path(COLD_START) / name).read_text()) | changes
    return broken(**{name.replace(".", "__"): json.dumps(raw)})


narrow = broken(config={"text_config.intermediate_size": 100})

ROWS = [
    converted((NORM, "run/checkpoints/1", "1 of ", "older checkpoint"), damaged(flip)),
    converted(("run/checkpoints/1/params", "older"), damaged(cut("params/manifest.ocdbt"))),
    converted(("run/checkpoints/1/params", "older"), damaged(cut("params/_METADATA"))),
    converted(("damaged at ", "another"), damaged(cut_largest)),
    converted("1/meta", damaged(cut("meta/metadata"))),
    converted("1/meta", damaged(rewritten("meta/metadata", "[]"))),
    converted("1/meta", damaged(another_position)),
    converted("model/config.json", damaged(rewritten("../../model/config.json", "{"))),
    converted(
        ("another model", "mlp.down"),
        lambda folder: (damaged()(folder), narrow(folder)),
        "to-hf run out --base m",
    ),
    converted(
        "adapter/adapter_config.json",
        damaged(rewritten("../../model/adapter/adapter_config.json", "{")),
    ),
    taken(("m/config.json", "fetch it again"), broken(config={"text_config.rope_scaling": 7})),
    taken(("m/config.json", "text_config"), broken(config={"text_config": 5})),
    taken(("m/config.json", "model_type"), broken(config__json="{}")),
    taken("model.safetensors", broken(model__safetensors="short")),
    converted(
        "file/out", lambda folder: (folder / "file").write_text(""), "from-hf {model} file/out"
    ),
    described("m/generation_config.json", broken(generation_config__json="{")),
    described("m/generation_config.json", broken(generation_config__json="[]")),
    described(
        ("m/generation_config.json", "eos_token_id"),
        broken(generation_config__json='{"eos_token_id": "end"}'),
    ),
    described(("chat template of m", "chat_template.json"), broken(**NO_TEMPLATE)),
    described(("chat template of m", "what users say"), broken(**DEAF_TEMPLATE)),
    described(("chat template", "0 of 4 frames"), broken(**BLIND_TEMPLATE)),
    described(
        ("m/preprocessor_config.json", "patch_size"),
        processor("preprocessor_config.json", patch_size=0),
    ),
    described(
        ("m/video_preprocessor_config.json", "temporal_patch_size"),
        processor("video_preprocessor_config.json", temporal_patch_size="two"),
        "--frames-as video",
    ),
    described(
        ("m/video_preprocessor_config.json", "size.shortest_edge"),
        processor("video_preprocessor_config.json", size={"shortest_edge": -1, "longest_edge": 5}),
        "--frames-as video",
    ),
    Mistake("--cache c", "c", 1, files={"c": "a file"}, door="pipelines/describe.py"),
    # The same folders before a run.
    Mistake("--model m", "m/generation_config.json", prepare=broken(generation_config__json="{")),
    Mistake("--model m", "chat template of ", prepare=broken(**NO_TEMPLATE)),
    Mistake("--model m", "chat template of ", prepare=broken(**DEAF_TEMPLATE)),
    Mistake(
        "--model m",
        ("m/preprocessor_config.json", "merge_size"),
        prepare=processor("preprocessor_config.json", merge_size=0),
    ),
]
