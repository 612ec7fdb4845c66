"""Qwen3-VL, dense and with experts, exact to transformers."""

from models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.folder import read_config
from models.qwen3_vl.model import Qwen3VLPolicy
from models.qwen3_vl.pretrained import Pretrained, from_pretrained, open_policy

__all__ = [
    "Pretrained",
    "Qwen3VLConfig",
    "Qwen3VLPolicy",
    "TextConfig",
    "VisionConfig",
    "from_pretrained",
    "open_policy",
    "read_config",
]
