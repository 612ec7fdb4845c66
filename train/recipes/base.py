"""What recipes on a Qwen3-VL folder share."""

from train.config import Config, Stage
from train.model import ModelSettings


def own_videos() -> Config:
    """RL on a Qwen3-VL folder of yours and questions about your videos: products in bfloat16,
    layers recomputed in the backward pass, everything else as the settings' defaults say."""
    return Config(
        recipe="own_videos",
        needs=("--model", "--data"),
        stage=Stage.RL,
        steps=1,
        model=ModelSettings(compute_dtype="bfloat16", remat=True),
    )
