"""Convert a random model in the shape of Qwen3-VL-8B there and back: memory, time, every bit.

    nice python benchmarks/convert.py [--layers N] [--folder DIR]

Writes a folder of random bfloat16 weights in several shards, runs `models/convert.py from-hf` and
`to-hf` on it as a user would, and compares every tensor. All three copies together take three
times the size of the model on disk (53 GB for 8B) below DIR; they are removed afterwards.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from models.common.safetensors_io import (  # noqa: E402
    TensorSpec,
    stored_tensors,
    write_tensors,
)
from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy, TextConfig, VisionConfig  # noqa: E402
from models.qwen3_vl.folder import write_config  # noqa: E402
from paravt_jax.array_store import boxes  # noqa: E402

QWEN_8B = Qwen3VLConfig(
    text=TextConfig(
        intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8, rope_theta=5e6
    ),
    vision=VisionConfig(out_hidden_size=4096),
)
GIB = 2**30
PART_ROWS = 8192


def shrink(config: Qwen3VLConfig, layers: int) -> Qwen3VLConfig:
    """The same model with fewer language layers."""
    text = dataclasses.replace(config.text, num_hidden_layers=layers)
    return dataclasses.replace(config, text=text)


def random_rows(specs: list[TensorSpec]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Random finite bfloat16 values of all tensors, in parts."""
    generator = np.random.default_rng(0)
    for spec in specs:
        for box in boxes(spec.shape, (PART_ROWS, *spec.shape[1:])):
            shape = tuple(part.stop - part.start for part in box)
            bits = generator.integers(0, 2**16, shape, dtype=np.uint16)
            # With its highest bit cleared, no exponent is the one of infinities and NaN.
            yield spec.name, box[0].start, (bits & 0xBFFF).view(jnp.bfloat16)


def write_random_folder(config: Qwen3VLConfig, folder: Path, max_shard_bytes: int) -> int:
    """Write it; the bytes of its weights."""
    folder.mkdir(parents=True)
    table = Qwen3VLPolicy(config).table
    specs = [
        TensorSpec(name, spec.hf_shapes[0], np.dtype(jnp.bfloat16))
        for spec in table.values()
        for name in spec.hf_names
    ]
    write_config(config, "bfloat16", None, folder)
    write_tensors(folder, specs, random_rows(specs), max_shard_bytes)
    return sum(spec.nbytes for spec in specs)


LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""A process inherits the peak of the one that starts it, so a small one must start it."""


def peak_of(command: list[str]) -> tuple[int, float]:
    """Run a command in a process of its own; its peak resident bytes and its seconds.

    Raises:
      CalledProcessError: it failed.
    """
    began = time.monotonic()
    launch = [sys.executable, "-S", "-c", LAUNCHER, *command]
    peak = subprocess.run(launch, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    return int(peak) * unit, time.monotonic() - began


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not equal bit by bit, or stand in one folder only."""
    left, right = stored_tensors(one), stored_tensors(other)
    both = [name for name in left if name in right]
    unlike = [name for name in both if not _equal(left[name], right[name])]
    return sorted(set(left) ^ set(right)) + unlike


def _equal(one, other) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    parts = boxes(one.shape, (PART_ROWS, *one.shape[1:]))
    return all(one[part].tobytes() == other[part].tobytes() for part in parts)


def measure(config: Qwen3VLConfig, folder: Path, max_shard_bytes: int) -> dict[str, float]:
    """Bytes of the weights, peak bytes and seconds of an empty process and of both commands.

    Raises:
      CalledProcessError: a command failed.
      RuntimeError: a bit was lost.
    """
    size = write_random_folder(config, folder / "model", max_shard_bytes)
    door = [sys.executable, str(ROOT / "models" / "convert.py")]
    idle, _ = peak_of([*door, "--help"])
    there, there_seconds = peak_of([*door, "from-hf", str(folder / "model"), str(folder / "there")])
    back, back_seconds = peak_of([*door, "to-hf", str(folder / "there"), str(folder / "back")])
    lost = differing(folder / "model", folder / "back")
    if lost:
        raise RuntimeError(f"{len(lost)} tensors differ: {lost[:8]}")
    return {
        "weights": size, "idle": idle,
        "from-hf": there, "from-hf seconds": there_seconds,
        "to-hf": back, "to-hf seconds": back_seconds,
    }  # fmt: skip


def commit() -> str:
    """The checkout's commit, marked if the tree differs from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Print one row of `results.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=QWEN_8B.text.num_hidden_layers)
    parser.add_argument("--folder", help="where the copies are made; default: a temporary folder")
    parser.add_argument("--max-shard-bytes", type=int, default=5 * GIB)
    arguments = parser.parse_args()
    config = shrink(QWEN_8B, arguments.layers)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=arguments.folder) as folder:
        found = measure(config, Path(folder), arguments.max_shard_bytes)
    print(json.dumps(found))
    cells = [
        commit(),
        f"`python benchmarks/convert.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        f"{platform.machine()}, {os.cpu_count()} cores",
        f"{found['weights'] / GIB:.1f}",
        *(f"{found[name] / GIB:.2f}" for name in ("idle", "from-hf", "to-hf")),
        *(f"{found[f'{name} seconds']:.0f}" for name in ("from-hf", "to-hf")),
    ]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
