"""Host arrays onto the mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from paravt_jax.mesh import partition


def to_mesh(tree: Any, mesh: Mesh) -> Any:
    """Put host arrays on the mesh, leading dimension split over the batch axes."""

    def put(x: np.ndarray) -> jax.Array:
        axes = ("batch", *(None,) * (np.ndim(x) - 1))
        spec = partition(dict(mesh.shape), axes, np.shape(x))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)
