"""What chips can do: the limits that compiled programs are compared with."""

from __future__ import annotations

import dataclasses

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one chip."""

    name: str
    flops: float
    """Peak of products in bfloat16, per second."""
    memory: float
    """Bytes of main memory that a program can have."""
    bandwidth: float
    """Bytes of main memory per second."""
    links: float
    """Bytes per second that a chip sends in a collective over one axis of the mesh."""


# A TPU's interconnect is given in both directions together. A collective sends in one of them, and
# over one axis of the mesh it uses the links of about half of the torus: a quarter of the figure.
# Memory is what libtpu's compiler (0.0.42) says that a program has, a little less than is sold.
CHIPS = {
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s, 400 GB/s of interconnect.
    "TPU v5 lite": Chip("v5e", 197e12, 15.75 * GIB, 819e9, 400e9 / 4),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB at 2,765 GB/s, 1,200 GB/s of interconnect.
    "TPU v5": Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 1200e9 / 4),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB at 1,638 GB/s, 800 GB/s of interconnect.
    "TPU v6 lite": Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 800e9 / 4),
}
"""By the `device_kind` of JAX."""
HERE = "here"
"""Names the devices of this process where others name a topology."""
