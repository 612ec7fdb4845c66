"""Model folders that are no Qwen3-VL, damaged, or lack something."""

import json
import shutil
from pathlib import Path

from tests.contracts.mistakes import Mistake
from train.recipes.needle import COLD_START


def broken(*removed: str, config: dict | None = None, **files: str):
    """Makes `m/`, a copy of the demo's model without some files, others replaced and fields of its
    config.json changed (`text_config.hidden_size`, None removes)."""

    def prepare(folder: Path) -> None:
        target = folder / "m"
        shutil.copytree(COLD_START, target)
        for name in removed:
            (target / name).unlink()
        for name, content in files.items():
            (target / name.replace("__", ".")).write_text(content)
        if config:
            _change(target / "config.json", config)

    return prepare


def _change(path: Path, changes: dict) -> None:
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, name = key.split(".")
        section = raw
        for part in outer:
            section = section[part]
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    path.write_text(json.dumps(raw))


def at_the_door(name: str, prepare, *more: str) -> Mistake:
    return Mistake("--model m", (name, *more), prepare=prepare)


def while_loading(name: str, prepare, *more: str) -> Mistake:
    return Mistake("{small} --model m", (name, *more), code=1, prepare=prepare)


def empty(folder: Path) -> None:
    (folder / "m").mkdir()


def cut_weights(folder: Path) -> None:
    """Half of the download."""
    broken()(folder)
    weights = folder / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def pickled(folder: Path) -> None:
    broken("model.safetensors")(folder)
    (folder / "m" / "pytorch_model.bin").write_bytes(b"pickle")


def index_without_files(folder: Path) -> None:
    broken("model.safetensors")(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "m" / "model.safetensors.index.json").write_text(json.dumps(index))


MARKED_AT_RANDOM = json.dumps(
    json.loads((Path(COLD_START) / "video_preprocessor_config.json").read_text())
    | {"video_marks": "random"}
)

ROWS = [
    at_the_door("m/config.json", empty),
    at_the_door("config.json", broken("config.json")),
    at_the_door("config.json", broken(config__json="{")),
    at_the_door("config.json", broken(config__json="[]")),
    at_the_door("model_type", broken(config={"model_type": "llama"})),
    at_the_door("model_type", broken(config={"model_type": None})),
    at_the_door("num_heads", broken(config={"vision_config.num_heads": 7})),
    at_the_door("num_key_value_heads", broken(config={"text_config.num_key_value_heads": 3})),
    at_the_door("hidden_act", broken(config={"text_config.hidden_act": "swish"})),
    at_the_door("out_hidden_size", broken(config={"vision_config.out_hidden_size": 64})),
    at_the_door("attention_dropout", broken(config={"text_config.attention_dropout": 0.1})),
    at_the_door(
        "deepstack_visual_indexes", broken(config={"vision_config.deepstack_visual_indexes": [9]})
    ),
    while_loading("safetensors", broken("model.safetensors")),
    while_loading("model.safetensors", cut_weights),
    while_loading("pytorch_model.bin", pickled),
    while_loading("model-00001-of-00002.safetensors", index_without_files),
    while_loading("mlp.down_proj", broken(config={"text_config.intermediate_size": 100}), "m"),
    at_the_door("tokenizer.json", broken("tokenizer.json")),
    Mistake(
        "{small} --model m --set data.frames_as=video",
        ("m/video_preprocessor_config.json", "video_marks", "outer"),
        prepare=broken(video_preprocessor_config__json=MARKED_AT_RANDOM),
    ),
    Mistake("--model {model} --set model.lora.rank=4 --set model.adapter=no/such", "no/such"),
    Mistake(
        "--model {model} --set model.lora.rank=4 --set model.adapter=a",
        ("model.lora.rank", "a"),
        files={"a/adapter_config.json": '{"r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]}'},
    ),
    Mistake(
        "--model {model} --set model.lora.rank=4 --set model.adapter=a",
        "use_dora",
        files={"a/adapter_config.json": '{"r": 8, "lora_alpha": 32, "use_dora": true}'},
    ),
]
