"""Devices and hosts that the environment promises and that are not there."""

from tests.contracts.mistakes import Mistake

ROWS = [
    Mistake(
        "--dry-run",
        ("JAX_PLATFORMS", "cuda", "jax[cuda13]"),
        environment={"JAX_PLATFORMS": "cuda"},
        fresh=True,
    ),
    Mistake(
        "--steps 1", ("JAX_PLATFORMS", "tpu"), environment={"JAX_PLATFORMS": "tpu"}, fresh=True
    ),
    Mistake(
        "--steps 2",
        ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"),
        environment={"JAX_COORDINATOR_ADDRESS": "localhost:1"},
    ),
    Mistake(
        "--steps 3",
        ("JAX_NUM_PROCESSES", "two"),
        environment={"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two"},
    ),
]
