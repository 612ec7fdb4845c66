"""Qwen3-VL, dense and with experts, exact to transformers."""

from models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.folder import copy_model_files, read_config
from models.qwen3_vl.model import Qwen3VLPolicy
from models.qwen3_vl.pretrained import Pretrained, from_pretrained
from models.qwen3_vl.weights import load_params, save_folder

__all__ = [
    "Pretrained",
    "Qwen3VLConfig",
    "Qwen3VLPolicy",
    "TextConfig",
    "VisionConfig",
    "copy_model_files",
    "from_pretrained",
    "load_params",
    "read_config",
    "save_folder",
]
