"""What the programs of ParaVT's recipe would cost on real chips, by the compiler's word.

    python benchmarks/scale.py [--only 8B@v5p:2x2x2 ...] [--programs step] [--folder QWEN3_VL]

No chip is needed, but libtpu is (`make scale` installs it). Each case is a `--compile-only` of
`paravt_rl` at its own settings for a released model, of which config.json is all that is needed:
tokenizer and processor are those of `--folder`, or, without one, of the needle model, whose prompts
differ by a few words beside the frames. A case that takes longer than `--minutes` keeps what was
compiled until then. Writes `benchmarks/scale.json` and, from all that stands there,
`benchmarks/scale.md`: a case can be compiled a few programs at a time, and `--only` without a case
writes the page anew.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import pods
from tests.support.released_models import MODELS
from train.compile.report import expected_text
from train.compile.step import SHARES, Step, step_by_share
from train.recipes.needle import COLD_START

ROOT = Path(__file__).resolve().parents[1]
TABLE, FIGURES = ROOT / "benchmarks" / "scale.md", ROOT / "benchmarks" / "scale.json"
OTHERS = ".", ":!benchmarks/scale.*"
GIB = 2**30
Figures = dict[str, Any]
"""Of a case, as `compile.json` has them, and where they come from."""
TOKENS = {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
"""What the tokenizer's folder says, whatever the model."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a topology, with the settings with which it is compiled."""

    model: str
    topology: str
    mesh: str
    rollout_mesh: str | None
    """None for the default, the one with the fastest token."""
    settings: tuple[str, ...] = ()
    differs: str = ""
    """In what it differs from the case of the same model and topology, if it does."""

    @property
    def name(self) -> str:
        """As `--only` has it."""
        return ",".join([f"{self.model}@{self.topology}", *([self.differs] * bool(self.differs))])

    @property
    def flags(self) -> list[str]:
        """What is given to `train/main.py` besides the recipe and the model."""
        rollouts = ["--rollout-mesh", self.rollout_mesh] if self.rollout_mesh else []
        settings = [word for own in self.settings for word in ("--set", own)]
        return ["--mesh", self.mesh, *rollouts, *settings, "--compile-only", self.topology]

    def command(self, folder: Path, workdir: Path, programs: str | None) -> list[str]:
        """What compiles it."""
        named = ["--programs", programs] if programs else []
        return [
            *(sys.executable, "train/main.py", "--recipe", "paravt_rl", "--model", str(folder)),
            *(*self.flags, *named, "--workdir", str(workdir)),
        ]


CASES = (
    Case("8B", "v5p:2x2x2", "fsdp:8", "tensor:8"),
    Case("8B", "v5p:4x4x4", "fsdp:64", "data:8,tensor:8", ("rl.micro_groups=8",)),
    Case(
        *("8B", "v5e:4x8", "fsdp:8,context:4", "data:4,tensor:8"),
        ("rl.micro_groups=1", "optimizer.moments=int8"),
    ),
    Case(
        *("8B", "v6e:4x4", "fsdp:16", "data:2,tensor:8"),
        ("rl.micro_groups=2", "model.remat_block=6"),
    ),
    Case(
        *("30B-A3B", "v5p:4x4x8", "fsdp:16,expert:4,tensor:2", "data:2,expert:16,tensor:4"),
        ("rl.micro_groups=8",),
    ),
    Case("32B", "v5p:4x4x8", "fsdp:64,tensor:2", "data:16,tensor:8", ("rl.micro_groups=8",)),
    Case(
        *("235B-A22B", "v5p:4x8x8", "fsdp:16,expert:4,tensor:4", "data:4,expert:16,tensor:4"),
        # A sub-agent for each of the 64 parts of a batch; else experts would be gathered.
        ("rl.micro_groups=8", "model.remat_block=2", "agent.subagent_batch=64"),
    ),
    Case(
        *("8B", "v5p:4x4x4", "fsdp:8,context:8", "data:8,tensor:8"),
        ("rl.micro_groups=8", "data.frame_budgets=2048", "data.max_pixels=52224"),
        "prompts of 128k tokens",
    ),
)
TURNS = "agent.turn_tokens={0}", "agent.answer_tokens={0}"


def _changed(differs: str, *settings: str, rollout_mesh: str = "tensor:8") -> Case:
    return Case("8B", "v5p:2x2x2", "fsdp:8", rollout_mesh, settings, differs)


GROWTH = (
    CASES[0],
    *(_changed(f"{k} frames", f"data.frame_budgets={k}") for k in (16, 32, 128)),
    *(_changed(f"turns of {t}", *(own.format(t) for own in TURNS)) for t in (256, 1024)),
    _changed("4 rollouts a prompt", "rl.group_size=4", "rl.micro_groups=2"),
    _changed("16 rollouts a prompt", "rl.group_size=16"),
    _changed("rollouts on data:8", rollout_mesh="data:8"),
    Case("8B", "v5p:2x2x4", "fsdp:16", "data:2,tensor:8", ("rl.micro_groups=2",)),
    CASES[1],
)
"""One thing changed at a time; of those that are no cases, these programs are compiled:"""
GROWING = "decode main,step"


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


def compile_case(
    case: Case, source: Path, minutes: float, programs: str | None
) -> tuple[Figures, str]:
    """The figures of a case as far as it got, and what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(case.model, source, Path(scratch) / case.model)
        workdir = Path(scratch) / "run"
        error = ""
        # No devices of this machine are needed, and no metadata server of a TPU is there to ask.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        command = case.command(folder, workdir, programs)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=60 * minutes, stderr=subprocess.PIPE
            )
            told = done.stderr.decode().strip().splitlines()
            error = told[-1] if told and done.returncode else ""
        except subprocess.TimeoutExpired:
            print(f"{case.name}: stopped after {minutes:.0f} minutes", flush=True)
        found = {"programs": {}}
        with contextlib.suppress(OSError):
            found = json.loads((workdir / "compile.json").read_text())[0]
        return found, error.replace(str(scratch), "...")


def merged(case: Case, before: Figures | None, found: Figures, asked: str, error: str) -> Figures:
    """The figures of a case with those that were just found, each with its origin."""
    if before is None or before["flags"] != case.flags:
        before = {"flags": case.flags, "calls": {}, "programs": {}, "errors": {}}
    origin = {"commit": _commit(), "versions": _versions()}
    known = before["programs"] | {name: own | origin for name, own in found["programs"].items()}
    errors = {name: text for name, text in before["errors"].items() if name != asked}
    together = before | found
    return together | {
        "programs": {name: known[name] for name in together["calls"] if name in known},
        "errors": errors | ({asked: error} if error else {}),
    }


def _commit() -> str:
    """The commit, marked if anything but what is written here differs from it."""
    told = ["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno", "--", *OTHERS]
    head, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for command in told
    )
    return f"{head} and changes" if changed else head


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


def table(case: Case, found: Figures) -> str:
    """A case in Markdown."""
    title = ", ".join([f"{case.model} on {case.topology}", *([case.differs] * bool(case.differs))])
    lines = [f"## {title}", "", f"`{' '.join(found['flags'])}`", ""]
    if found["programs"]:
        mesh = found["rollout_mesh"].items()
        sizes = ",".join(f"{axis}:{size}" for axis, size in mesh if size > 1)
        lines += [
            f"Rollouts on `{sizes}`.",
            "",
            "| program | calls | GiB arguments | temporaries | together | TFLOP | GB moved "
            "| GB sent | seconds | bound | compiled in | at |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|---|",
            *(_row(name, own) for name, own in found["programs"].items()),
            "",
            *_steps(found),
        ]
    missing = [name for name in found["calls"] if name not in found["programs"]]
    lines += [f"* Not compiled: {', '.join(missing)}."] if missing else []
    lines += [f"* {error}" for error in found["errors"].values()]
    return "\n".join([*lines, ""])


def _steps(found: Figures) -> Iterator[str]:
    """A step at shares of the limits; a lower limit where programs are missing."""
    whole = step_by_share(found)
    least = "" if whole else "at least "
    for share in SHARES:
        own = whole[share] if whole else Step.of(found).summary(share)
        yield (
            f"* Rollouts of {share * found['generated']:,.0f} tokens: {least}"
            f"{own['seconds']:.1f} s a step at the roofline, rollouts {own['rollout']:.1f} s and "
            f"learner {own['learner']:.1f} s; MFU {own['mfu']:.2%}, of the learner "
            f"{own['learner_mfu']:.1%}."
        )
        yield f"  {least}{expected_text(own)}."


def _row(name: str, own: dict[str, Any]) -> str:
    calls = f"{own['calls']:,.3g}" if own["calls"] < 1 else f"{own['calls']:,.0f}"
    compiled = f"{own['seconds_to_compile']:.0f} s"
    if "memory" not in own:
        needed = f"needs {own['needed_bytes'] / GIB:.1f}" if own["needed_bytes"] else "too much"
        return f"| {name} | {calls} | | | **{needed}** | | | | | | {compiled} | {own['commit']} |"
    memory, limits = own["memory"], own["seconds_by_limit"]
    together = f"{memory['together'] / GIB:.2f}"
    sent = sum(traffic["sent"] for traffic in own["collectives"].values())
    cells = (
        *(name, calls, f"{memory['arguments'] / GIB:.2f}", f"{memory['temporaries'] / GIB:.2f}"),
        *(together if own["fits"] else f"**{together}**", f"{own['flops'] / 1e12:.3g}"),
        *(f"{own['bytes'] / 1e9:.3g}", f"{sent / 1e9:.3g}", f"{own['seconds']:.2e}"),
        *(max(limits, key=limits.__getitem__), compiled, own["commit"]),
    )
    return f"| {' | '.join(cells)} |"


def growth(results: Mapping[str, Figures]) -> list[str]:
    """How decoding and the step grow, one thing changed at a time."""
    known = [case for case in GROWTH if case.name in results]
    rows = [row for row in (_grown(case, results[case.name]) for case in known) if row]
    if not rows:
        return []
    return [
        "## Growth",
        "",
        f"The first case, and others that differ from it in one thing. Compiled: {GROWING}.",
        "",
        "| case | tokens of a step | GB a token | its seconds | its GiB together | TFLOP of a step "
        "| GB moved | GB sent | its seconds | its GiB together | at |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        *rows,
        "",
    ]


def _grown(case: Case, found: Figures) -> str:
    decode, step = (found["programs"].get(name, {}) for name in GROWING.split(","))
    if "memory" not in decode or "memory" not in step:
        return ""
    sent = sum(traffic["sent"] for traffic in step["collectives"].values())
    cells = (
        *(case.name, f"{step['tokens']:,}", f"{decode['bytes'] / 1e9:.3g}"),
        *(f"{decode['seconds']:.2e}", f"{decode['memory']['together'] / GIB:.1f}"),
        *(f"{step['flops'] / 1e12:,.0f}", f"{step['bytes'] / 1e9:,.0f}", f"{sent / 1e9:,.0f}"),
        *(f"{step['seconds']:.1f}", f"{step['memory']['together'] / GIB:.1f}", step["commit"]),
    )
    return f"| {' | '.join(cells)} |"


def page(results: Mapping[str, Figures]) -> str:
    """All cases in Markdown."""
    programs = [own for found in results.values() for own in found["programs"].values()]
    versions = " and with ".join(sorted({own["versions"] for own in programs}))
    head = [
        "# What the recipe would cost on chips",
        "",
        f"Written by `make scale` with {versions}: compiled, not run. `paravt_rl` at its own "
        "settings (8 prompts x 8 rollouts, 64 frames, 3 rounds, turns of 2,048 tokens). Bytes and "
        "operations are the compiler's, per chip and call, decoding per token with full caches; "
        "seconds are those of the resource that takes longest, at its peak: a lower limit. "
        "Together: with what else the run holds then. Bold: more than the chip has. The learner's "
        "programs are those of the longest rollouts, whatever share of it rollouts take; programs "
        "of main and crop together are counted where each stands alone.",
        "",
    ]
    known = [case for case in CASES if case.name in results]
    tables = [table(case, results[case.name]) for case in known]
    return "\n".join([*head, *tables, *growth(results), *pods.section(results)])


def main() -> None:
    """Compile the cases and write the page after each of them."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, default=COLD_START, help="tokenizer and processor")
    parser.add_argument("--minutes", type=float, default=40, help="limit of one case")
    parser.add_argument("--programs", help="names, separated by commas (default: all)")
    cases = {case.name: case for case in (*CASES, *GROWTH)}
    parser.add_argument("--only", nargs="*", choices=cases, default=cases, help="cases")
    arguments = parser.parse_args()
    results = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name, case in cases.items():
        if name in arguments.only:
            print(f"{name}: {' '.join(case.flags)}", flush=True)
            asked = arguments.programs or (None if case in CASES else GROWING)
            found, error = compile_case(case, arguments.folder, arguments.minutes, asked)
            results[name] = merged(case, results.get(name), found, asked or "all", error)
            FIGURES.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text(page(results))


if __name__ == "__main__":
    main()
