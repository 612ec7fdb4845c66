"""The six released shapes: their config.json gives the tensors and parameters of their weights.

Configurations and counts are those of the public repositories `Qwen/Qwen3-VL-*-Instruct` on the
Hugging Face hub (4.57 style); the hub counts parameters and tensors from the safetensors headers.
Models are abstract: nothing is allocated.
"""

import math

import pytest

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from tests.support.released_models import MODELS


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
