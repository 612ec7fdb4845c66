"""Eight CPU devices for every test, so that sharding is exercised, not skipped."""

import os
from pathlib import Path

from tests.xla_flags import quick_compile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", quick_compile(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled functions are kept beside pytest's own cache: a second run compiles little.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
