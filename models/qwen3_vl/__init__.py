"""Qwen3-VL (dense), exact to transformers' `Qwen3VLForConditionalGeneration`."""

from models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.model import Qwen3VLPolicy

__all__ = ["Qwen3VLConfig", "Qwen3VLPolicy", "TextConfig", "VisionConfig"]
