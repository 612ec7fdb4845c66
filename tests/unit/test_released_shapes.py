"""The six released shapes: their config.json gives the tensors and parameters of their weights.

Configurations and counts are those of the public repositories `Qwen/Qwen3-VL-*-Instruct` on the
Hugging Face hub (4.57 style); the hub counts parameters and tensors from the safetensors headers.
Models are abstract: nothing is allocated.
"""

import math

import pytest

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy

SMALL_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}


def released(width, mlp, layers, heads, keys, expert_width=None, tied=False, vision=None):
    """What differs between the released config.json files."""
    dense = expert_width is None
    text = {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 5000000,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
    }
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return {
        "model_type": "qwen3_vl" if dense else "qwen3_vl_moe",
        "tie_word_embeddings": tied,
        "text_config": text if dense else text | experts,
        "vision_config": {"out_hidden_size": width, **(vision or {})},
    }


MODELS = {
    # config.json, parameters, tensors
    "2B": (
        released(2048, 6144, 28, 16, 8, tied=True, vision=SMALL_VISION),
        2_127_532_032,
        625,
    ),
    "4B": (
        released(2560, 9728, 36, 32, 8, tied=True, vision=SMALL_VISION),
        4_437_815_808,
        713,
    ),
    "8B": (released(4096, 12288, 36, 32, 8), 8_767_123_696, 750),
    "32B": (released(5120, 25600, 64, 64, 8), 33_357_390_064, 1058),
    "30B-A3B": (released(2048, 6144, 48, 32, 4, expert_width=768), 31_070_754_032, 882),
    "235B-A22B": (released(4096, 12288, 94, 64, 4, expert_width=1536), 235_670_022_896, 1388),
}


def table_of(name):
    return Qwen3VLPolicy(Qwen3VLConfig.from_dict(MODELS[name][0])).table


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_tensors_are_as_many_as_released(name):
    _, parameters, tensors = MODELS[name]
    table = table_of(name)
    assert sum(math.prod(spec.shape) for spec in table.values()) == parameters
    assert len({hf_name for spec in table.values() for hf_name in spec.hf_names}) == tensors


def test_tensors_of_experts_lie_as_released():
    """One layer of 30B-A3B: projections are `[out, in]`, experts `[in, out]`."""
    shapes = {
        hf_name.partition("layers.47.")[2]: spec.hf_shapes[0]
        for spec in table_of("30B-A3B").values()
        for hf_name in spec.hf_names
        if ".layers.47." in hf_name
    }
    assert shapes == {
        "input_layernorm.weight": (2048,),
        "mlp.experts.down_proj": (128, 768, 2048),
        "mlp.experts.gate_up_proj": (128, 2048, 1536),
        "mlp.gate.weight": (128, 2048),
        "post_attention_layernorm.weight": (2048,),
        "self_attn.k_norm.weight": (128,),
        "self_attn.k_proj.weight": (512, 2048),
        "self_attn.o_proj.weight": (2048, 4096),
        "self_attn.q_norm.weight": (128,),
        "self_attn.q_proj.weight": (4096, 2048),
        "self_attn.v_proj.weight": (512, 2048),
    }
