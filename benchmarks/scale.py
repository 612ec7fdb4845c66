"""What the programs of ParaVT's recipe would cost on real chips, by the compiler's word.

    python benchmarks/scale.py [--folder QWEN3_VL] [--minutes 40] [--only 8B@v5p:2x2x2 ...]

No chip is needed, but libtpu is (`make scale` installs it). Each case is a `--compile-only` of
`paravt_rl` at its own settings for a released model, of which config.json is all that is needed:
tokenizer and processor are those of `--folder`, or, without one, of the needle model, whose prompts
differ by a few words beside the frames. A case that takes longer than `--minutes` keeps what was
compiled until then. Writes `benchmarks/scale.md` and, beside it, the figures as JSON.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.support.released_models import MODELS
from train.recipes.needle import COLD_START

ROOT = Path(__file__).resolve().parents[1]
TABLE, FIGURES = ROOT / "benchmarks" / "scale.md", ROOT / "benchmarks" / "scale.json"
GIB = 2**30
TOKENS = {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
"""What the tokenizer's folder says, whatever the model."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a topology. A micro-batch has a row, or several, for each device that splits
    rows."""

    model: str
    topology: str
    mesh: str
    micro_groups: int

    @property
    def name(self) -> str:
        """As `--only` has it."""
        return f"{self.model}@{self.topology}"

    def command(self, folder: Path, workdir: Path) -> list[str]:
        """What compiles it."""
        return [
            *(sys.executable, "train/main.py", "--recipe", "paravt_rl", "--model", str(folder)),
            *("--mesh", self.mesh, "--set", f"rl.micro_groups={self.micro_groups}"),
            *("--compile-only", self.topology, "--workdir", str(workdir)),
        ]


CASES = (
    Case("8B", "v5p:2x2x2", "fsdp:8", 1),
    Case("8B", "v6e:4x4", "fsdp:16", 2),
    Case("8B", "v5e:4x8", "fsdp:32", 4),
    Case("8B", "v5p:4x4x4", "fsdp:64", 8),
    Case("32B", "v5p:4x4x8", "fsdp:64,tensor:2", 8),
    Case("30B-A3B", "v5p:4x4x8", "fsdp:16,expert:4,tensor:2", 8),
)


def model_folder(model: str, source: Path, target: Path) -> Path:
    """A folder with the released sizes and the other files of `source`, without weights."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    own = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in own.items() if name in TOKENS}
    (target / "config.json").write_text(json.dumps(MODELS[model][0] | kept, indent=2))
    return target


def compile_case(case: Case, source: Path, minutes: float) -> tuple[dict[str, Any] | None, str]:
    """The figures of a case as far as it got, and what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(case.model, source, Path(scratch) / case.model)
        workdir = Path(scratch) / "run"
        error = ""
        # No devices of this machine are needed, and no metadata server of a TPU is there to ask.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        command = case.command(folder, workdir)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=60 * minutes, stderr=subprocess.PIPE
            )
            error = done.stderr.decode().strip().splitlines()[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            error = f"stopped after {minutes:.0f} minutes"
        found = None
        with contextlib.suppress(OSError):
            found = json.loads((workdir / "compile.json").read_text())[0]
        return found, error.replace(str(scratch), "...")


def table(case: Case, found: dict[str, Any] | None, error: str) -> str:
    """A case in Markdown."""
    lines = [f"## {case.model} on {case.topology}, `--mesh {case.mesh}`", ""]
    lines += [f"`--set rl.micro_groups={case.micro_groups}`", ""]
    if found is not None:
        lines += [
            "| program | calls | GiB arguments | temporaries | together | TFLOP | GB moved "
            "| GB sent | seconds | bound | compiled in |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|",
            *(_row(name, own) for name, own in found["programs"].items()),
            "",
        ]
        lines += [
            f"* At {share} of the rollouts' limits: {own['seconds']:.1f} s a step, of which "
            f"rollouts {own['rollout']:.1f} s and learner {own['learner']:.1f} s; "
            f"{own['generated_per_second_and_chip']:.1f} tokens generated per second and chip; "
            f"MFU {own['mfu']:.2%}, of the learner {own['learner_mfu']:.1%}"
            for share, own in found["step_by_share_of_limits"].items()
            if error == ""
        ]
    return "\n".join([*lines, *([f"* {error}"] if error else []), ""])


def _row(name: str, own: dict[str, Any]) -> str:
    calls, compiled = f"{own['calls']:,.0f}", f"{own['seconds_to_compile']:.0f} s"
    if "memory" not in own:
        needed = f"needs {own['needed_bytes'] / GIB:.1f}" if own["needed_bytes"] else "too much"
        return f"| {name} | {calls} | | | **{needed}** | | | | | | {compiled} |"
    memory, limits = own["memory"], own["seconds_by_limit"]
    together = f"{memory['together'] / GIB:.2f}"
    sent = sum(traffic["sent"] for traffic in own["collectives"].values())
    cells = (
        *(name, calls, f"{memory['arguments'] / GIB:.2f}", f"{memory['temporaries'] / GIB:.2f}"),
        *(together if own["fits"] else f"**{together}**", f"{own['flops'] / 1e12:.3g}"),
        *(f"{own['bytes'] / 1e9:.3g}", f"{sent / 1e9:.3g}", f"{own['seconds']:.2e}"),
        *(max(limits, key=limits.__getitem__), compiled),
    )
    return f"| {' | '.join(cells)} |"


def page(results: dict[str, tuple[Case, dict[str, Any] | None, str]]) -> str:
    """All cases in Markdown."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    head = [
        "# What the recipe would cost on chips",
        "",
        f"Written by `make scale` at {commit} with {versions}: compiled, not run. `paravt_rl` at "
        "its own settings (8 prompts x 8 rollouts, 64 frames, 3 rounds, turns of 2,048 tokens). "
        "Bytes and operations are the compiler's, per chip and call, decoding per token; seconds "
        "are those of the resource that takes longest, at its peak: a lower limit. Bold: more than "
        "the chip has.",
        "",
    ]
    return "\n".join([*head, *(table(*result) for result in results.values())])


def main() -> None:
    """Compile the cases and write the page after each of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=COLD_START, help="tokenizer and processor")
    parser.add_argument("--minutes", type=float, default=40, help="limit of one case")
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES])
    arguments = parser.parse_args()
    results = {}
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        print(f"{case.name}: {case.mesh}", flush=True)
        results[case.name] = (
            case,
            *compile_case(case, arguments.folder, arguments.minutes),
        )
        TABLE.write_text(page(results))
        figures = {name: found for name, (_, found, _) in results.items()}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
