"""Load a model folder, compute logits, save a model folder: the public contract."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.common.kernels import Kernels
from models.common.weights import load_params
from models.qwen3_vl.config import Qwen3VLConfig
from models.qwen3_vl.folder import read_config
from models.qwen3_vl.inputs import PolicyInputs, from_processor
from models.qwen3_vl.model import Qwen3VLPolicy
from paravt_jax.lora import NO_LORA, LoraConfig
from paravt_jax.params import Params
from paravt_jax.shapes import bucket


class Pretrained:
    """Weights, their configuration, and the policy that computes with them."""

    def __init__(
        self,
        params: Params,
        config: Qwen3VLConfig,
        policy: Qwen3VLPolicy,
        mesh: Mesh | None = None,
        base: str | os.PathLike | None = None,
    ):
        self.params, self.config, self.policy = params, config, policy
        self.mesh, self.base = mesh, base

    def logits(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
    ) -> np.ndarray:
        """Float32 logits `[b, t, vocab]` of what a Hugging Face processor returned, as numpy.

        Padding may be left or right; logits at padding are 0. Lengths, frame counts and frame
        sizes are padded to a few shapes (`bucket`), each of which compiles once.

        Raises:
          ValueError: inputs that do not belong together; see `from_processor`.
        """
        images, videos = (pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)
        inputs = from_processor(
            self.config, input_ids, attention_mask, *images, *videos, size=bucket
        )
        with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
            computed = np.asarray(_logits(self.policy, self.params, inputs))
        logits = np.zeros((*np.shape(input_ids), computed.shape[-1]), np.float32)
        row, column = np.nonzero(inputs.places >= 0)
        logits[row, inputs.places[row, column]] = computed[row, column]
        return logits

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a folder that transformers loads, with the tokenizer and processor files of the
        folder that this model came from; see `Qwen3VLPolicy.save_folder`."""
        self.policy.save_folder(self.params, folder, base=self.base)


def from_pretrained(
    folder: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None
) -> Pretrained:
    """Load a Hugging Face folder of a Qwen3-VL, dense or with experts.

    Args:
      folder: config.json and safetensors, in one file or several with an index.
      dtype: of weights and matrix products, "float32" or "bfloat16".
      mesh: devices over which the weights are split; None for the first device.

    Raises:
      ValueError: no such folder, another kind of model, or weights that do not fit.
    """
    config = read_config(folder)
    policy = Qwen3VLPolicy(config, compute_dtype=dtype)
    params = load_params(folder, policy.table, mesh, dtype)
    return Pretrained(params, config, policy, mesh, base=folder)


def open_policy(
    config: Mapping[str, Any],
    *,
    compute_dtype: str = "float32",
    remat: bool = False,
    lora: LoraConfig = NO_LORA,
    cache_dtype: str = "compute",
    gradient_dtype: str = "compute",
    remat_keeps: str = "nothing",
    remat_block: int = 1,
    attention: Kernels = "auto",
) -> Qwen3VLPolicy:
    """The policy of a config.json; see `models.open_policy`."""
    parsed = Qwen3VLConfig.from_dict(config)
    types, remat_options = (cache_dtype, gradient_dtype), (remat_keeps, remat_block)
    return Qwen3VLPolicy(parsed, compute_dtype, remat, lora, *types, *remat_options, attention)


@functools.partial(jax.jit, static_argnums=0)
def _logits(policy: Qwen3VLPolicy, params: Params, inputs: PolicyInputs) -> jax.Array:
    features = None
    if inputs.patches is not None and inputs.grids is not None:
        features = policy.encode(params, inputs.patches, inputs.grids)
    where = inputs.positions, inputs.vision_index
    return policy.logits(params, policy.hidden(params, inputs.tokens, *where, features))
