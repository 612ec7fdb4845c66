"""Models of Qwen3-VL's architecture that are too small to be slow."""

import json

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy, TextConfig, VisionConfig
from models.qwen3_vl.config import ExpertsConfig
from tests.support.rollout_fakes import VOCAB
from train.recipes.needle import COLD_START

NEEDLE_MODEL = json.loads((COLD_START / "config.json").read_text())
"""config.json of the needle model."""

QWEN = Qwen3VLPolicy(
    Qwen3VLConfig(
        text=TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mrope_section=(2, 1, 1),
            # Large weights, so that the model has opinions and an error shows.
            initializer_range=0.3,
        ),
        vision=VisionConfig(
            depth=1,
            hidden_size=32,
            intermediate_size=24,
            num_heads=2,
            patch_size=4,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=(0,),
            initializer_range=0.3,
        ),
        tie_word_embeddings=True,
    )
)

EXPERTS = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mrope_section=(2, 1, 1),
        initializer_range=0.3,
        experts=ExpertsConfig(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            decoder_sparse_step=2,
            mlp_only_layers=(3,),
        ),
    ),
    vision=VisionConfig(
        depth=1,
        hidden_size=8,
        num_heads=2,
        intermediate_size=8,
        out_hidden_size=16,
        patch_size=4,
        num_position_embeddings=4,
        deepstack_visual_indexes=(0,),
    ),
)

SPARSE = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=48, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, mrope_section=(3, 3, 2),
        experts=ExpertsConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=(1,)
        ),
    ),
    vision=VisionConfig(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4,
        out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=(1,),
    ),
)  # fmt: skip

SPARSE_TABLE = Qwen3VLPolicy(SPARSE).table
