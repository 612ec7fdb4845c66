"""What the released config.json files hold, and how large those models are.

Configurations and counts are those of the public repositories `Qwen/Qwen3-VL-*-Instruct` on the
Hugging Face hub (4.57 style); the hub counts parameters and tensors from the safetensors headers.
"""

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
