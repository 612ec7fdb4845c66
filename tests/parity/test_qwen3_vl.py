"""Qwen3-VL equals transformers' `Qwen3VLForConditionalGeneration`: logits, layers, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3VLForConditionalGeneration

from models.qwen3_vl import Qwen3VLPolicy, from_pretrained, pretrained
from models.qwen3_vl.inputs import from_processor
from models.qwen3_vl.model import _blueprint
from models.qwen3_vl.text import AttentionContext, add_deepstack, mrope
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import Blueprint
from tests.support.qwen3_vl_torch import (
    IMAGE,
    VIDEO,
    gap,
    image_inputs,
    image_tokens,
    mixed_inputs,
    random_pixels,
    text_inputs,
    torch_logits,
    torch_model,
    video_inputs,
)

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Largest difference over largest value, float32."""

INPUTS = {
    "text": text_inputs,
    "image": image_inputs,
    "video": video_inputs,
    "right padded": lambda: mixed_inputs("right"),
}
VARIANTS = {
    "untied": {},
    "odd heads": {
        "text": {"num_attention_heads": 5, "num_key_value_heads": 5, "attention_bias": True},
        "vision": {"deepstack_visual_indexes": [], "num_position_embeddings": 9},
    },
    "one key head": {"text": {"num_attention_heads": 7, "num_key_value_heads": 1}},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """The same weights in transformers and here."""
    return load_pair(tmp_path_factory.mktemp("model"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_pair(tmp_path_factory.mktemp("model"))


def load_pair(folder, **variant):
    reference = torch_model(**variant)
    reference.save_pretrained(folder)
    return reference, from_pretrained(folder)


def where_seen(logits, inputs):
    mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
    return logits[mask > 0]


def test_logits_of_every_variant(pair):
    check_logits(*pair, mixed_inputs())


@pytest.mark.parametrize("kind", INPUTS)
def test_logits_of_every_input(plain, kind):
    check_logits(*plain, INPUTS[kind]())


def check_logits(reference, model, inputs):
    ours = where_seen(model.logits(**inputs), inputs)
    found = gap(ours, where_seen(torch_logits(reference, inputs), inputs))
    print(f"logits differ by {found:.1e} of the largest")
    assert found < TOLERANCE


def test_ten_grids_of_processor_inputs_compile_once(plain):
    """Prompts with an image of another size each, within one bucket of tokens and patches."""
    reference, model = plain
    narrow = [(2, 26), (2, 28), (4, 14), (6, 10), (4, 16)]
    grids = narrow + [grid[::-1] for grid in narrow]
    before = pretrained._logits._cache_size()
    for grid in grids:
        grid_thw = np.array([[1, *grid]])
        ids = np.array([[1, *image_tokens(grid), 3, 4, 5, 6]])
        inputs = {"pixel_values": random_pixels(grid_thw, 1), "image_grid_thw": grid_thw}
        check_logits(reference, model, {"input_ids": ids, **inputs})
    assert pretrained._logits._cache_size() == before + 1


@pytest.mark.parametrize("kind", ["image", "video", "mixed"])
def test_positions(plain, kind):
    reference, model = plain
    inputs = {"image": image_inputs, "video": video_inputs, "mixed": mixed_inputs}[kind]()
    ids, mask = inputs["input_ids"], inputs["attention_mask"] > 0
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    grids = {name: torch.tensor(inputs[name]) for name in inputs if name.endswith("thw")}
    arrays = {"mm_token_type_ids": kinds, "attention_mask": inputs["attention_mask"]}
    theirs, _ = reference.model.get_rope_index(
        torch.tensor(ids), **{k: torch.tensor(v) for k, v in arrays.items()}, **grids
    )
    ours = from_processor(model.config, **inputs)
    for row in range(2):
        own = ours.positions[row, : mask[row].sum()]
        np.testing.assert_array_equal(own, theirs[:, row, mask[row]].numpy().T)


def record_outputs(reference, inputs) -> dict[str, np.ndarray]:
    """What every named module of the reference returned, batch dimension dropped."""
    outputs, hooks = {}, []
    for name, module in reference.named_modules():

        def keep(module, arguments, output, name=name):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                outputs[name] = output.detach().numpy()

        hooks.append(module.register_forward_hook(keep))
    torch_logits(reference, inputs)
    for hook in hooks:
        hook.remove()
    return outputs


def bound(model):
    return _blueprint(model.policy).bind(model.params)


def layer_of(stacked, number):
    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[number], state))


def one_row(inputs):
    """The first row of `video_inputs`: two videos, 72 patches."""
    kept = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    pixels, grids = inputs["pixel_values_videos"][:72], inputs["video_grid_thw"][:2]
    return kept | {"pixel_values_videos": pixels, "video_grid_thw": grids}


def vision_layers(model, patches, grids):
    """Outputs of the parts of the vision tower, under transformers' names."""
    tower = bound(model).vision
    rope, counts = tower.rope(grids, patches.shape[1]), grids[:, 0] * grids[:, 1]
    outputs = {"patch_embed": tower.patch_embedding(patches)}
    x = tower.embed(patches, grids)
    for number in range(model.config.vision.depth):
        x = outputs[f"blocks.{number}"] = layer_of(tower.blocks, number)(x, rope, counts)
    _, tapped = tower.walk(patches, grids)
    outputs["merger"] = tower.merger(x)
    for level in range(2):
        name = f"deepstack_merger_list.{level}"
        outputs[name] = layer_of(tower.deepstack, level)(tapped[level])
    return outputs


def test_vision_tower_layer_by_layer(plain):
    reference, model = plain
    inputs = one_row(video_inputs())
    theirs = record_outputs(reference, inputs)
    ours = from_processor(model.config, **inputs)
    patches, grids = ours.patches[0], ours.grids[0]
    outputs = jax.jit(lambda patches, grids: vision_layers(model, patches, grids))(patches, grids)
    real = np.arange(patches.shape[1])[None] < np.prod(grids, axis=1)[:, None]
    for name, output in outputs.items():
        seen = real if output.shape[1] == patches.shape[1] else real[:, ::4]
        assert gap(np.asarray(output)[seen], theirs[f"model.visual.{name}"]) < TOLERANCE, name
    assert len(outputs) == 1 + 3 + 1 + 2


def decoder_layers(model, tokens, positions, index, patches, grids):
    """Outputs of the decoder layers, before DeepStack adds to them, and of the last norm."""
    tower = bound(model).text
    features = model.policy.encode(model.params, patches, grids)
    x, rope = tower.embed(tokens, index, features), mrope(positions, model.config.text)
    outputs = {}
    for number in range(model.config.text.num_hidden_layers):
        layer = jnp.int32(number)
        x, *_ = layer_of(tower.layers, number)(x, rope, AttentionContext(), layer)
        outputs[f"layers.{number}"] = x
        x = add_deepstack(x, index, features, layer)
    outputs["norm"] = tower.norm(x)
    return outputs


def test_decoder_layer_by_layer(plain):
    reference, model = plain
    inputs = one_row(video_inputs())
    theirs = record_outputs(reference, inputs)
    ours = from_processor(model.config, **inputs)
    arrays = (ours.tokens, ours.positions, ours.vision_index, ours.patches, ours.grids)
    outputs = jax.jit(lambda *arrays: decoder_layers(model, *arrays))(*arrays)
    for name, output in outputs.items():
        assert gap(output, theirs[f"model.language_model.{name}"]) < TOLERANCE, name


def test_gradients(plain):
    """Of every parameter, through both towers."""
    reference, model = plain
    inputs = one_row(video_inputs())
    arrays = {name: torch.tensor(value) for name, value in inputs.items()}
    kinds = torch.tensor(np.where(inputs["input_ids"] == 121, 2, 0))
    reference.zero_grad()
    reference(**arrays, mm_token_type_ids=kinds).logits.square().mean().backward()
    ours = jax.tree.map(jnp.asarray, vars(from_processor(model.config, **inputs)))

    @jax.jit
    @jax.grad
    def gradient(params):
        features = model.policy.encode(params, ours["patches"], ours["grids"])
        hidden = model.policy.hidden(
            params, ours["tokens"], ours["positions"], ours["vision_index"], features
        )
        return jnp.mean(model.policy.logits(params, hidden) ** 2)

    gradients, theirs = gradient(model.params), dict(reference.named_parameters())
    for name, spec in model.policy.table.items():
        for number, hf_name in enumerate(spec.hf_names):
            own = (
                np.asarray(gradients[name])[number] if spec.layers else np.asarray(gradients[name])
            )
            assert gap(spec.to_hf(own), theirs[hf_name].grad.numpy()) < 1e-4, hf_name
    reference.zero_grad()


@pytest.mark.parametrize("max_shard_bytes", [2**30, 50_000])
def test_saved_folder_loads_in_transformers(plain, tmp_path, max_shard_bytes):
    reference, model = plain
    folder = tmp_path / "saved"
    Qwen3VLPolicy(model.config).save_folder(model.params, folder, model.base, max_shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes < 2**30)
    assert (folder / "generation_config.json").exists()
    again, information = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not information["missing_keys"] and not information["unexpected_keys"]
    inputs = mixed_inputs()
    np.testing.assert_array_equal(torch_logits(again, inputs), torch_logits(reference, inputs))
    np.testing.assert_array_equal(from_pretrained(folder).logits(**inputs), model.logits(**inputs))


def test_tied_model_and_its_saved_folder_loads_in_transformers(tmp_path):
    reference, model = load_pair(tmp_path / "base", tie=True)
    assert "head.kernel" not in model.params
    check_logits(reference, model, image_inputs())
    model.save_pretrained(tmp_path / "saved")
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    inputs = text_inputs()
    np.testing.assert_array_equal(torch_logits(again, inputs), torch_logits(reference, inputs))


def test_sharded_equals_unsharded(plain):
    _, model = plain
    mesh = make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8))
    sharded = from_pretrained(model.base, mesh=mesh)
    kernel = sharded.params["text.layers.mlp.up.kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 24, 40)
    inputs = mixed_inputs()
    found = gap(sharded.logits(**inputs), model.logits(**inputs))
    print(f"sharded and unsharded logits differ by {found:.1e} of the largest")
    assert found < TOLERANCE


def test_bfloat16_is_close(plain):
    _, model = plain
    half = from_pretrained(model.base, dtype="bfloat16")
    assert {str(value.dtype) for value in half.params.values()} == {"bfloat16"}
    assert 0 < gap(half.logits(**text_inputs()), model.logits(**text_inputs())) < 0.05


def test_blueprint_refuses_nothing_silently(plain):
    """A missing parameter is an error, not an abstract leftover."""
    _, model = plain
    with pytest.raises(KeyError, match=r"text\.norm\.scale"):
        short = {k: v for k, v in model.params.items() if k != "text.norm.scale"}
        blueprint: Blueprint = _blueprint(model.policy)
        blueprint.bind(short)
