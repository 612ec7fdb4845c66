"""The real command: short runs on the needle world, and what they leave."""

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.forked import ROOT, Running, Server
from tests.support.xla_flags import quick_compile
from train.config import Config
from train.recipes import RECIPES, get_recipe
from train.workdir.config_file import read_settings

SMALL = (
    "data.train_videos=12",
    "data.held_out_videos=4",
    "data.frame_budgets=4",
    "rl.prompts_per_step=2",
    "rl.group_size=2",
    "rl.micro_groups=1",
    "agent.turn_tokens=80",
    "agent.sampling.temperature=0.9",
    "agent.subagent_batch=8",
    "evaluation.rows=4",
    "evaluation.batch=4",
    "output.checkpoint_every=1",
    "output.keep_checkpoints=4",
    "optimizer.warmup_steps=0",
)
CONTRACT = set(
    """step loss grad_norm kl reward/total reward/accuracy reward/format reward/tool
    format/compliance format/score tool/calls_per_rollout tool/rollouts_with_call
    tool/parallel_max tool/success_rate frames/budget_mean logprob/gap_mean logprob/gap_max
    clip_fraction group/zero_std time/rollout time/learn time/data tokens_per_second
    data/wait data/bad_rows frames/cache_hits frames/decode_seconds""".split()  # noqa: SIM905
)
"""What every line of `metrics.jsonl` of an RL run holds."""
READING = ("data/wait", "frames/asked", "frames/cache", "frames/decode", "hosts/frames")
HOSTS = ("hosts/seconds", "hosts/sent")
TIMED = ("time/", "tokens_per_second", "compile/", "memory/", *READING, *HOSTS)
"""Beginnings of the names of figures that a second run does not repeat."""


def command(workdir: Path | str, *arguments: str, sets: Sequence[str]) -> list[str]:
    """`python train/main.py --workdir ... --set ...`."""
    door = [sys.executable, str(ROOT / "train" / "main.py"), "--workdir", str(workdir)]
    return [*door, *arguments, *(part for text in sets for part in ("--set", text))]


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """That of the tests; all runs share what they compile (see conftest)."""
    return {**os.environ, "XLA_FLAGS": quick_compile(devices), **extra}


def small(workdir: Path, arguments: Sequence[str]) -> list[str]:
    """`SMALL`, as far as it acts in the recipe of these arguments, or of the run in the workdir."""
    recipe = arguments[arguments.index("--recipe") + 1] if "--recipe" in arguments else "needle_rl"
    try:
        held = None if "--recipe" in arguments else read_settings(workdir, Config)
    except ValueError:
        held = None  # what the command says of it is the test's matter
    config = held or get_recipe(recipe if recipe in RECIPES else "needle_rl")
    idle = ["rl."] * (config.stage == "sft")
    idle += ["agent.subagent_batch"] * (config.agent.evidence == "frames")
    return [text for text in SMALL if not text.startswith(tuple(idle))]


@functools.cache
def server() -> Server:
    """What forks the commands of this process; it ends when nobody can ask it any more."""
    return Server(environment())


def run(arguments: Sequence[str], cwd: Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `python door ...` from a foreign directory to its end, in a forked child."""
    _, door, *rest = map(str, arguments)
    done = server().start(door, rest, cwd, environment(devices)).wait()
    return subprocess.CompletedProcess(arguments, done.code, done.stdout, done.stderr)


def run_anew(
    arguments: Sequence[str], cwd: Path, devices: int = 1
) -> subprocess.CompletedProcess[str]:
    """The same, started as a user starts it: with an interpreter and imports of its own."""
    return subprocess.run(
        arguments, cwd=cwd, env=environment(devices), capture_output=True, text=True, timeout=900
    )


def start(workdir: Path, cache: Path, *arguments: str, settings: Sequence[str] = (), devices=1):
    """A small run on the needle world, whose videos are in `cache`."""
    sets = [*small(workdir, arguments), f"data.cache_dir={cache}", *settings]
    return run(command(workdir, *arguments, sets=sets), cache, devices)


def send(
    number: int,
    when: Callable[[], bool],
    workdir: Path,
    cache: Path,
    *arguments: str,
    settings: Sequence[str] = (),
) -> tuple[int, str]:
    """Start the same, send it a signal when something holds; its exit code, and what it said."""

    def kill(process: Running) -> None:
        process.send_signal(number)

    return disturb(kill, when, workdir, cache, *arguments, settings=settings)


def disturb(
    act: Callable[[Running], None],
    when: Callable[[], bool],
    workdir: Path,
    cache: Path,
    *arguments: str,
    settings: Sequence[str] = (),
) -> tuple[int, str]:
    """Start the same, do something to it when something holds; its exit code, and what it said."""
    sets = [*small(workdir, arguments), f"data.cache_dir={cache}", *settings]
    _, door, *rest = command(workdir, *arguments, sets=sets)
    process = server().start(door, rest, cache, environment(), together=True)
    while not process.ended and not when():
        time.sleep(0.005)
    act(process)
    done = process.wait()
    return done.code, done.stdout


def is_saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written (Orbax names its folder last of all)."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def logged(workdir: Path) -> int:
    """Steps in `metrics.jsonl` so far."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saved(workdir: Path, step: int) -> dict[str, int]:
    """Checksums of all weights and moments of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())[
        "arrays"
    ]


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def documented(name: str) -> bool:
    """Whether `docs/metrics.md` explains this metric, or its family."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = set(re.findall("`([^`]+)`", " ".join(cells)))
    families = {"reward/": "reward/*", "evaluation/": "evaluation/MODE/NAME"}
    return name in names or any(
        name.startswith(beginning) and family in names for beginning, family in families.items()
    )


def untimed(record: dict[str, float]) -> dict[str, float]:
    """What a second run repeats: nothing that was timed, compiled or waited for."""
    return {name: value for name, value in record.items() if not name.startswith(TIMED)}
