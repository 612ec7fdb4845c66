"""What must hold of the policy whatever the reference: cache, frames, grids, configuration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import attention, layers
from models.common.layers import KEPT, lookup
from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy, TextConfig, VisionConfig
from models.qwen3_vl.config import NUMERICALLY_SILENT, ExpertsConfig
from models.qwen3_vl.inputs import from_processor
from models.qwen3_vl.vision import DctBasis
from paravt_jax.kv_cache import KVCache
from paravt_jax.params import initialise
from paravt_jax.rope_index import mrope_positions, vision_index

pytestmark = pytest.mark.slow

CONFIG = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=5e3,
        mrope_section=(3, 3, 2),
        initializer_range=0.3,
    ),
    vision=VisionConfig(
        depth=3,
        hidden_size=24,
        intermediate_size=40,
        num_heads=3,
        patch_size=4,
        out_hidden_size=32,
        num_position_embeddings=25,
        deepstack_visual_indexes=(0, 2),
        initializer_range=0.3,
    ),
    image_token_id=60,
    video_token_id=61,
)
POLICY = Qwen3VLPolicy(CONFIG)
FRAMES, PATCHES = 3, 16
GRIDS = np.array([[4, 4], [2, 6], [2, 2]], np.int32)


@pytest.fixture(scope="module")
def params():
    return initialise(POLICY.table, jax.random.key(0))


def random_patches(seed=0, frames=FRAMES):
    return np.random.default_rng(seed).normal(size=(1, frames, PATCHES, 96)).astype(np.float32)


def prompt():
    """One row: every frame between two text tokens."""
    visual = []
    for rows, cols in GRIDS:
        visual += [False, False, *[True] * (rows * cols // 4)]
    visual = np.array([*visual, *[False] * 4])
    tokens = np.where(visual, 61, np.arange(len(visual)) % 50).astype(np.int32)
    return (
        tokens[None],
        mrope_positions(visual, GRIDS, 2)[None],
        vision_index(visual, GRIDS, 2, PATCHES)[None],
    )


@jax.jit
def encode(params, patches, grids):
    return POLICY.encode(params, jnp.asarray(patches), jnp.asarray(grids))


@jax.jit
def full_logits(params, tokens, positions, index, features):
    hidden = POLICY.hidden(params, tokens, positions, index, features)
    return POLICY.logits(params, hidden)


@jax.jit
def append_step(params, tokens, positions, index, cache, lengths, rows):
    cache = dataclasses.replace(cache, lengths=lengths)
    hidden, (cache,) = POLICY.append(params, tokens, positions, index, None, (cache,), rows)
    return POLICY.logits(params, hidden), cache


def prefill(params, arrays, features, split) -> KVCache:
    """Two prompts of these lengths, each with two rows."""
    _, keys, values = jax.jit(POLICY.prefill)(params, *arrays, features)
    cache = POLICY.init_cache(2, 2, 24, 16).with_prompts(jnp.arange(2), keys, values)
    return dataclasses.replace(cache, prompt_lengths=jnp.asarray(split, jnp.int32))


@pytest.mark.parametrize("chosen", [None, [2, 1]])
def test_prefill_and_append_equal_the_full_forward(params, chosen):
    """Prompts of different lengths, blocks of several tokens, rows that pause, chosen rows."""
    arrays = [np.repeat(array, 2, axis=0) for array in prompt()]
    features = encode(params, np.repeat(random_patches(), 2, 0), np.repeat(GRIDS[None], 2, 0))
    expected = np.asarray(full_logits(params, *arrays, features))
    # Behind all vision tokens, so that what follows is text.
    first = int(np.flatnonzero(arrays[2][0] >= 0)[-1]) + 1
    split = np.array([first, first + 1])
    cache = prefill(params, [array[:, : first + 1] for array in arrays], features, split)
    numbers = np.arange(4) if chosen is None else np.array(chosen)
    done = np.zeros(4, np.int32)
    for width in (2, 1):
        at = split[numbers // 2] + done[numbers]
        block = [
            np.stack([array[n // 2, i : i + width] for n, i in zip(numbers, at, strict=True)])
            for array in arrays
        ]
        rows = None if chosen is None else jnp.asarray(chosen)
        logits, cache = append_step(params, *block, cache, jnp.asarray(done), rows)
        for place, (number, start) in enumerate(zip(numbers, at, strict=True)):
            own = expected[number // 2, start : start + width]
            np.testing.assert_allclose(logits[place], own, atol=2e-5)
        done[numbers] += width


def test_later_frames_do_not_change_earlier_ones(params):
    patches = random_patches()
    before = encode(params, patches, GRIDS[None])
    changed = patches.copy()
    changed[:, 2] += 1
    after = encode(params, changed, np.concatenate([GRIDS[:2], [[4, 2]]])[None])
    for name in ("tokens", "deepstack"):
        old, new = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        np.testing.assert_array_equal(old[..., :8, :], new[..., :8, :])
        assert np.abs(old[..., 8:9, :] - new[..., 8:9, :]).max() > 1e-3


def test_padding_frames_and_patches_mean_nothing(params):
    patches = random_patches()
    wide = np.full((1, FRAMES + 1, PATCHES + 4, 96), 7.0, np.float32)
    wide[:, :FRAMES, :PATCHES] = patches
    grids = np.concatenate([GRIDS, [[0, 0]]])[None].astype(np.int32)
    narrow, padded = encode(params, patches, GRIDS[None]), encode(params, wide, grids)
    narrow, padded = np.asarray(narrow.tokens[0]), np.asarray(padded.tokens[0])
    assert np.isfinite(padded).all()
    for frame, (rows, cols) in enumerate(GRIDS):
        count = rows * cols // 4
        own, same = narrow[4 * frame :][:count], padded[5 * frame :][:count]
        assert np.abs(own - same).max() < 1e-5 * np.abs(own).max()


def test_deepstack_reaches_the_logits(params):
    arrays, patches = prompt(), random_patches()
    before = full_logits(params, *arrays, encode(params, patches, GRIDS[None]))
    name = "vision.deepstack.down.kernel"
    for level in range(2):
        changed = params | {name: params[name].at[level].multiply(1.1)}
        after = full_logits(params, *arrays, encode(changed, patches, GRIDS[None]))
        first_vision = int(np.flatnonzero(arrays[2][0] >= 0)[0])
        difference = np.abs(np.asarray(before - after)).max(axis=-1)[0]
        assert difference[first_vision:].max() > 1e-4
        assert difference[:first_vision].max() == 0


def test_ten_grids_compile_once(params):
    compiled = jax.jit(lambda params, patches, grids: POLICY.encode(params, patches, grids).tokens)
    results = [
        compiled(params, random_patches(frames=1), np.array([[[rows, cols]]], np.int32))
        for rows in (2, 4, 6, 8)
        for cols in (2, 4, 6, 8)
        if rows * cols <= PATCHES
    ] + [compiled(params, random_patches(frames=1), np.array([[grid]], np.int32))
         for grid in ((0, 0), (2, 8))]  # fmt: skip
    assert len(results) == 8 + 2
    assert compiled._cache_size() == 1
    assert len({np.asarray(result)[0, 0].tobytes() for result in results[:8]}) == 8


EXPERTS = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
CHANGES = {
    "vision": {
        "depth": 4,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_heads": 2,
        "hidden_act": "gelu",
        "in_channels": 1,
        "patch_size": 2,
        "temporal_patch_size": 1,
        "spatial_merge_size": 1,
        "out_hidden_size": 40,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": (1, 2),
        "rope_theta": 100.0,
    },
    "text": {
        "vocab_size": 65,
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 4,
        "head_dim": 18,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-2,
        "rope_theta": 100.0,
        "mrope_section": (4, 2, 2),
        "attention_bias": True,
        "experts": EXPERTS,
    },
    "experts": {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 20,
        "decoder_sparse_step": 2,
        "mlp_only_layers": (0,),
    },
    "": {"image_token_id": 59, "video_token_id": 59, "tie_word_embeddings": True},
}


PARTS = {"vision": VisionConfig, "text": TextConfig, "experts": ExpertsConfig, "": Qwen3VLConfig}


def fields_that_matter():
    for part, cls in PARTS.items():
        for field in dataclasses.fields(cls):
            if field.name not in NUMERICALLY_SILENT and field.name not in PARTS:
                yield part, field.name


def changed_config(config, part, field, value):
    """`config` with one field changed, and the other tower's width along with it."""
    if part == "":
        return dataclasses.replace(config, **{field: value})
    if part == "experts":
        field, value, part = "experts", dataclasses.replace(EXPERTS, **{field: value}), "text"
    change = {part: dataclasses.replace(getattr(config, part), **{field: value})}
    if field == "out_hidden_size":
        change["text"] = dataclasses.replace(config.text, hidden_size=value)
    if (part, field) == ("text", "hidden_size"):
        change["vision"] = dataclasses.replace(config.vision, out_hidden_size=value)
    return dataclasses.replace(config, **change)


@pytest.mark.parametrize(("part", "field"), list(fields_that_matter()))
def test_every_config_field_changes_the_output(part, field):
    """Either other parameters, or other features or hidden states from the same ones."""
    base = CONFIG
    if part == "experts":
        base = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, experts=EXPERTS))
    changed = changed_config(base, part, field, CHANGES[part][field])
    before, after = Qwen3VLPolicy(base), Qwen3VLPolicy(changed)
    if {n: s.shape for n, s in before.table.items()} != {
        n: s.shape for n, s in after.table.items()
    }:
        return
    if field.endswith("_token_id"):
        assert vision_places(base) != vision_places(changed)
        return
    params = initialise(before.table, jax.random.key(0))
    gaps = [
        jnp.abs(old - new).max()
        for old, new in zip(
            *(everything(policy, params) for policy in (before, after)), strict=True
        )
    ]
    assert max(gaps) > 1e-4


def vision_places(config) -> list[int]:
    """Where a frame of one merged block is put among all token ids."""
    ids = np.arange(config.text.vocab_size)[None]
    pixels, grid = np.zeros((4, 96), np.float32), np.array([[1, 2, 2]])
    inputs = from_processor(config, ids, None, pixels, grid, pixels, grid)
    return np.flatnonzero(inputs.vision_index[0] >= 0).tolist()


def everything(policy, params) -> list[jax.Array]:
    """Vision features and hidden states."""
    features = jax.jit(policy.encode)(params, random_patches(), GRIDS[None])
    hidden = jax.jit(policy.hidden)(params, *map(jnp.asarray, prompt()))
    return [*jax.tree.leaves(features), hidden]


def test_configuration_survives_both_dialects():
    raw = CONFIG.to_dict()
    assert Qwen3VLConfig.from_dict(raw) == CONFIG
    old = {
        **raw,
        "text_config": dict(raw["text_config"]),
        "vision_config": dict(raw["vision_config"]),
    }
    del old["vision_config"]["rope_parameters"]
    old["vision_config"]["rope_theta"] = CONFIG.vision.rope_theta
    assert Qwen3VLConfig.from_dict(old) == CONFIG
    experts = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, experts=EXPERTS))
    raw_experts = experts.to_dict()
    assert Qwen3VLConfig.from_dict(raw_experts) == experts
    raw_experts["text_config"]["num_local_experts"] = raw_experts["text_config"].pop("num_experts")
    assert Qwen3VLConfig.from_dict(raw_experts) == experts
    new = {**raw, "text_config": dict(raw["text_config"])}
    section = new["text_config"].pop("rope_scaling")
    theta = new["text_config"].pop("rope_theta")
    new["text_config"]["rope_parameters"] = section | {"rope_theta": theta}
    assert Qwen3VLConfig.from_dict(new) == CONFIG


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llama", "model_type"),
        ("text_config.attention_dropout", 0.1, "attention_dropout"),
        ("text_config.rope_parameters", {"rope_type": "yarn"}, "rope_parameters.rope_type"),
        ("text_config.rope_scaling", {"rope_type": "yarn"}, "rope_scaling.rope_type"),
        ("text_config.rope_scaling", {"type": "yarn"}, "rope_scaling.rope_type"),
        ("text_config.rope_parameters", {"mrope_section": [2, 3, 3]}, "keep one of the two"),
        ("text_config.rope_parameters", {"rope_theta": 7.0}, "rope_theta"),
        ("quantization_config", {"quant_method": "awq"}, "quantised weights"),
        ("text_config.quantization_config", {"quant_method": "fp8"}, "quantised weights"),
        ("text_config", [1], "text_config"),
        ("text_config.num_key_value_heads", 3, "num_key_value_heads"),
        ("text_config.hidden_size", 48, "out_hidden_size"),
        ("text_config.hidden_act", "tanh", "hidden_act"),
        ("vision_config.num_position_embeddings", 24, "square"),
        ("vision_config.deepstack_visual_indexes", [2, 0], "increasing"),
        ("vision_config.patch_size", [4, 8], "patch_size"),
    ],
)
def test_configuration_refuses_what_it_cannot_honour(path, value, message):
    raw = CONFIG.to_dict()
    *outer, last = path.split(".")
    (raw[outer[0]] if outer else raw)[last] = value
    with pytest.raises(ValueError, match=message):
        Qwen3VLConfig.from_dict(raw)


@pytest.mark.parametrize("queries", [1, 5, 200])
def test_every_attention_path_equals_the_reference(queries):
    keys = 200
    query, key, value = (
        jax.random.normal(jax.random.key(seed), (2, length, heads, 8))
        for seed, length, heads in ((0, queries, 6), (1, keys, 3), (2, keys, 3))
    )
    cases = {
        "causal": {"causal": True},
        "frame": {"key_lengths": jnp.array([7, 150])},
    }
    for name, case in cases.items():
        last = np.arange(queries) if case.get("causal") else np.full(1, keys)
        visible = np.arange(keys) <= last[None, :, None]
        visible = visible & (
            np.arange(keys) < np.asarray(case.get("key_lengths", [keys] * 2))[:, None, None]
        )
        expected = jax.jit(attention.reference)(query, key, value, jnp.asarray(visible))
        ours = jax.jit(functools.partial(attention.attend, **case))(query, key, value)
        np.testing.assert_allclose(ours, expected, atol=2e-6, err_msg=name)


def test_reference_attention_is_softmax_over_visible_keys():
    query, key, value = (np.random.default_rng(0).normal(size=(1, 3, 2, 4)) for _ in range(3))
    visible = np.tril(np.ones((1, 3, 3), bool))
    ours = attention.reference(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)),
                               jnp.asarray(visible))  # fmt: skip
    for head in range(2):
        for i in range(3):
            scores = np.exp(key[0, : i + 1, head] @ query[0, i, head] / 2)
            expected = scores / scores.sum() @ value[0, : i + 1, head]
            np.testing.assert_allclose(ours[0, i, head], expected, atol=1e-5)


@pytest.mark.parametrize("rows", [7, 3000])
def test_lookup_has_the_gradient_of_indexing(rows):
    table = jax.random.normal(jax.random.key(0), (rows, 3))
    index = jnp.array([[0, 2, 2], [6, 0, 2]])
    weights = jax.random.normal(jax.random.key(1), (2, 3, 3))
    ours = jax.grad(lambda t: jnp.sum(weights * lookup(t, index)))(table)
    np.testing.assert_allclose(
        ours, jax.grad(lambda t: jnp.sum(weights * t[index]))(table), atol=1e-6
    )


def test_remat_changes_nothing(params, monkeypatch):
    arrays = [jnp.asarray(array) for array in prompt()]
    saving = [dataclasses.replace(POLICY, remat=True, remat_keeps=kept) for kept in KEPT]

    def gradient(policy):
        slope = jax.jit(jax.grad(lambda p: jnp.sum(policy.hidden(p, *arrays) ** 3)))
        compiled = slope.lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    here, *others = map(gradient, [POLICY, *saving])
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    plain, most = gradient(POLICY)
    for saved, _ in (here, *others):
        for name in plain:
            np.testing.assert_allclose(plain[name], saved[name], rtol=1e-4, atol=1e-4, err_msg=name)
    nothing, projections, products = (size for _, size in others)
    assert nothing < min(projections, products) and max(projections, products) < most
    assert here[1] == projections, "a CPU does so by itself"


def test_patch_embedding_starts_as_a_cosine_transform():
    kernel = np.asarray(DctBasis(3, 2, 4)(jax.random.key(0), (96, 60), jnp.dtype("float32")))
    flat = np.broadcast_to(np.array([1.0, 2.0, 3.0])[:, None, None, None], (3, 2, 4, 4))
    np.testing.assert_allclose((flat.reshape(-1) @ kernel)[:3], [1, 2, 3], atol=1e-6)
    np.testing.assert_allclose((flat.reshape(-1) @ kernel)[3:48], 0, atol=1e-6)
    basis = kernel[:, :48]
    gram = basis.T @ basis
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-7)
    assert np.std(kernel[:, 48:]) == pytest.approx(0.02, rel=0.1)
