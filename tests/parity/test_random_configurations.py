"""Random configurations equal transformers: logits in float32 and bfloat16, and the gradients of
log-probabilities with respect to the language model's weights.

Every subset of three vision blocks occurs as DeepStack layout; heads, groups, widths, patch
sizes, frames per patch, merge sizes and experts are drawn. Weights are bfloat16 values, as the
released ones are, so that bfloat16 measures the computation.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from models.qwen3_vl import from_pretrained
from models.qwen3_vl.inputs import from_processor
from paravt_jax.log_probs import gathered_log_probs, preceding
from tests.support.qwen3_vl_torch import IMAGE, START, VIDEO, gap, torch_logits

pytestmark = pytest.mark.slow

LAYOUTS = [list(s) for n in range(4) for s in itertools.combinations(range(3), n)]
SEEDS = range(12)
"""Every third has experts."""


def has_experts(seed: int) -> bool:
    return seed % 3 == 2


def draw(seed: int) -> tuple[dict, dict]:
    """Text and vision configuration of one seed."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    groups, head_dim = pick(1, 2, 3, 5), pick(8, 12, 18)
    sections = rng.multinomial(head_dim // 2, [0.4, 0.3, 0.3])
    text = {
        "vocab_size": 128,
        "hidden_size": pick(32, 40, 44),
        "intermediate_size": pick(36, 60),
        "num_hidden_layers": 3,
        "num_key_value_heads": (keys := pick(1, 2, 3)),
        "num_attention_heads": keys * groups,
        "head_dim": head_dim,
        "hidden_act": pick("silu", "gelu_pytorch_tanh"),
        "rms_norm_eps": pick(1e-6, 1e-5),
        "attention_bias": bool(pick(0, 1)),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": pick(1e3, 5e6),
            "mrope_section": sections.tolist(),
        },
        "initializer_range": 0.1,
    }
    if has_experts(seed):
        text |= {
            "num_experts": (experts := pick(3, 4, 7)),
            "num_experts_per_tok": pick(1, 2, experts),
            "moe_intermediate_size": pick(12, 20),
            "decoder_sparse_step": pick(1, 1, 2),
            "mlp_only_layers": pick([], [], [1]),
        }
    heads = pick(1, 2, 3)
    vision = {
        "depth": 3,
        "hidden_size": heads * pick(4, 8, 12),
        "intermediate_size": pick(20, 28),
        "num_heads": heads,
        "hidden_act": pick("gelu_pytorch_tanh", "silu"),
        "in_channels": pick(1, 3),
        "patch_size": pick(2, 4),
        "temporal_patch_size": pick(1, 2),
        "spatial_merge_size": pick(1, 2, 3),
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": pick(9, 16, 36),
        "deepstack_visual_indexes": LAYOUTS[seed % len(LAYOUTS)],
        "initializer_range": 0.1,
    }
    return text, vision


def build(seed: int) -> torch.nn.Module:
    """The model of one seed in torch; every parameter differs from its usual start."""
    text, vision = draw(seed)
    dense = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    sparse = Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
    config_class, model_class = sparse if has_experts(seed) else dense
    tied = seed % 4 == 0
    torch.manual_seed(seed)
    config = config_class(
        text_config={**text, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=tied,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return model


def inputs(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """One row: text, an image, a video of two frames, text."""
    vision, rng = model.config.vision_config, np.random.default_rng(seed)
    merge = vision.spatial_merge_size
    image, video = np.array([[1, merge, 2 * merge]]), np.array([[2, 2 * merge, merge]])
    row = [*rng.integers(0, 119, 5), START, *[IMAGE] * 2, 9]
    row += [7, START, *[VIDEO] * 2, 8, START, *[VIDEO] * 2, *rng.integers(0, 119, 6)]
    size = vision.temporal_patch_size * vision.in_channels * vision.patch_size**2
    pixels = rng.normal(size=(2, 4 * merge**2, size)).astype(np.float32)
    return {
        "input_ids": np.array([row], np.int64),
        "pixel_values": pixels[0, : 2 * merge**2],
        "image_grid_thw": image,
        "pixel_values_videos": pixels[1],
        "video_grid_thw": video,
    }


def torch_gradients(model: torch.nn.Module, given: dict) -> dict[str, np.ndarray]:
    """Of the sum of log-probabilities of all tokens but the first."""
    ids = given["input_ids"]
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    arguments = {name: torch.tensor(value) for name, value in given.items()}
    logits = model(**arguments, mm_token_type_ids=torch.tensor(kinds)).logits
    log_probs = logits[:, :-1].log_softmax(-1)
    log_probs.gather(-1, torch.tensor(ids)[:, 1:, None]).sum().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


compiled = functools.partial(jax.jit, static_argnums=0)


def compute(policy, params, batch):
    """Logits and hidden states."""
    features = policy.encode(params, batch["patches"], batch["grids"])
    index = (batch["tokens"], batch["positions"], batch["vision_index"])
    hidden = policy.hidden(params, *index, features)
    return policy.logits(params, hidden), hidden


@compiled
@functools.partial(jax.grad, argnums=1, has_aux=True)
def gradients_and_logits(policy, language, vision, batch):
    """Of the sum of log-probabilities, with respect to the language weights."""
    params = {**language, **vision}
    logits, hidden = compute(policy, params, batch)
    log_probs, _ = gathered_log_probs(
        preceding(hidden),
        batch["tokens"],
        jnp.ones(batch["tokens"].shape, bool).at[:, 0].set(False),
        lambda h: policy.logits(params, h),
        temperature=1.0,
        budget=batch["tokens"].shape[1],
    )
    return jnp.sum(log_probs), logits


def study(seed):
    """Every second one is left to a study: they take long to compile."""
    return pytest.param(seed, marks=pytest.mark.study)


@pytest.mark.parametrize("seed", [*SEEDS[::2], *(study(seed) for seed in SEEDS[1::2])])
def test_random_configuration(seed, tmp_path):
    reference = build(seed)
    reference.save_pretrained(tmp_path)
    given = inputs(reference, seed)
    expected = torch_logits(reference, given)
    full, half = (from_pretrained(tmp_path, dtype) for dtype in ("float32", "bfloat16"))
    batch = dataclasses.asdict(from_processor(full.config, **given))
    vision = {k: v for k, v in full.params.items() if k.startswith("vision.")}
    language = {k: v for k, v in full.params.items() if k not in vision}
    gradients, logits = gradients_and_logits(full.policy, language, vision, batch)
    half_logits, _ = compiled(compute)(half.policy, half.params, batch)
    slopes = gradient_gaps(full.policy.table, gradients, torch_gradients(reference, given))
    gaps = gap(logits, expected), gap(half_logits, expected), max(slopes.values())
    print("seed {}: float32 {:.1e}, bfloat16 {:.1e}, gradients {:.1e}".format(seed, *gaps))
    assert gaps[0] < 1e-5
    assert 0 < gaps[1] < 2e-2
    assert gaps[2] < 1e-4, max(slopes, key=slopes.__getitem__)


def gradient_gaps(table, gradients, theirs) -> dict[str, float]:
    """Of each tensor under its Hugging Face name."""
    gaps = {}
    largest = max(np.abs(slope).max() for slope in theirs.values())
    for name, own in gradients.items():
        spec = table[name]
        layers = np.asarray(own) if spec.layers else [np.asarray(own)]
        for hf_name, slope in zip(spec.hf_names, layers, strict=True):
            # In our layout: torch keeps experts transposed with respect to released files.
            expected = spec.from_hf(theirs[hf_name])
            # A gradient that is all rounding (an unused expert, a key's bias) has no scale.
            if np.abs(expected).max() > 1e-5 * largest:
                gaps[hf_name] = gap(slope, expected)
    return gaps
