"""What a run needs of a model besides `Policy`: its parameters, adapters and sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

from jaxtyping import Array

from paravt_jax.array_store import StoredArray
from paravt_jax.interfaces import RoutedPolicy, TrainablePolicy
from paravt_jax.lora import LoraConfig, Merged
from paravt_jax.params import Table


class ModelPolicy(RoutedPolicy, TrainablePolicy, Protocol):
    """A model as its config.json describes it, without weights. Hashable."""

    @property
    def lora(self) -> LoraConfig:
        """Its adapters; rank 0 for none."""
        ...

    @property
    def table(self) -> Table:
        """The parameter table.

        Raises:
          ValueError: a projection that `lora` targets does not occur in this model.
        """
        ...

    @property
    def without_lora(self) -> ModelPolicy:
        """The same model without adapters."""
        ...

    def merge(self, params: Mapping[str, Array | StoredArray]) -> Merged:
        """Weights for `without_lora` that compute the same: adapters added to their kernels."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def splits(self) -> tuple[int, int, int]:
        """How finely a mesh can split the model: heads of queries, heads of keys, and experts, 0
        for a dense model."""
        ...

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        ...

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        """Pixels of a patch's side, patches of a vision token's side, frames of a patch."""
        ...

    @property
    def deepstack_levels(self) -> int:
        """Language layers that vision features are added to besides the embedding; see
        `VisionFeatures.deepstack`."""
        ...

    def save_folder(
        self,
        params: Mapping[str, Array | StoredArray],
        folder: str | os.PathLike,
        base: str | os.PathLike | None = None,
    ) -> None:
        """Write merged weights as a Hugging Face folder, with the other files of `base`.

        Raises:
          ValueError: `folder` holds something that is no model, or `base` does not exist.
          OSError: the disk is full.
        """
        ...
