"""Eight CPU devices for every test, so that sharding is exercised, not skipped.

Tests compile far longer than they compute, so XLA optimises as little as it can, which halves
their time. `e2e/test_needle_run.py` leaves the command its own settings.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled functions are kept beside pytest's own cache: a second run compiles little.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
