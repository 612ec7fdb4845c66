"""A step of 8B on 8 to 1,024 v5p chips: compiled programs, and host costs that are measured here.

    python benchmarks/pods.py [--threads 4] [--share 0.125]

Overviews and crops of a video are made by the run's own reader and renderer, a rollout is scored,
and prompts go from one process to another as between hosts. Writes `benchmarks/pods.json`;
`section` puts it beside the programs of `benchmarks/scale.json`, and `benchmarks/scale.py --only`
writes the page with both.

Up to 64 chips the batch is the recipe's; its rows cannot be split further, so beyond that it grows
with the chips. A program's seconds are a + b / chips through the two meshes that are compiled, and
stay as on 64 chips beyond. All rollouts take the same share of their limits, and only overviews are
made beside anything else: ahead.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import json
import math
import pickle
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

from paravt_jax.blocks import text_block
from paravt_jax.records import Prompt, Row
from paravt_jax.rewards import RewardRules, score
from pipelines.decode import video_ref
from pipelines.loader import overviews
from pipelines.video import VideoReader
from rollout.engine.engine import DecodeOutput
from rollout.engine.session import collect, generating_rows
from rollout.engine.slots import PromptGroup, StreamId, StreamState
from train import setup
from train.compile.step import Step
from train.hosts.channel import Channel
from train.hosts.exchange import Exchange
from train.recipes.paravt import paravt_rl

COSTS = Path(__file__).with_suffix(".json")
CASES = "8B@v5p:2x2x2", "8B@v5p:4x4x4"
CHIPS = 8, 16, 32, 64, 128, 256, 512, 1024
PER_HOST = 4
"""Chips of a v5p machine; its network has 200 Gbit/s (cloud.google.com/tpu/docs/v5p: 50 a chip)."""
ROW_HOSTS = 2
"""Hosts that hold a row of rollouts, on the 8 chips of `tensor:8`."""
NETWORK = 25e9
"""Bytes per second."""
MINUTES, SIZE = 5, "1280x720"
SAID = "<think>It is the red one, I saw it.</think><answer>red</answer>" * 40
MESSAGES = 40
ROWS, STEPS = 1024, 16
"""Of a call that decodes."""
THREADS = paravt_rl().data.decode_threads


@dataclasses.dataclass(frozen=True)
class HostCosts:
    """Processor seconds of one piece of host work, and what is told of it."""

    overview: float
    crop: float
    reward: float
    overview_told: int
    """Bytes that all hosts are told of an overview, without its pixels."""
    crop_told: int
    overview_pixels: int
    """Bytes of its pixels, for which few hosts ask."""
    crop_pixels: int
    send_byte: float
    """Seconds to send a byte to one host, and those of one that receives it."""
    receive_byte: float
    receive_message: float
    """Of a message that holds a reward."""
    row_call: float
    """Of a row between two calls that decode: where it stands before, what it drew after."""
    commit: str


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a step of the recipe."""

    prompts: int
    group: int
    crops: int
    """Most of a rollout."""

    @classmethod
    def of_recipe(cls) -> "Sizes":
        config = paravt_rl()
        rl, agent = config.rl, config.agent
        return cls(rl.prompts_per_step, rl.group_size, agent.rounds * agent.calls_run)


def measure(repeats: int) -> HostCosts:
    """The costs on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        source = f"testsrc2=size={SIZE}:rate=25:duration={60 * MINUTES}"
        # `make scale` reads what was measured in an environment without the tests' packages.
        from tests.support.ffmpeg import ffmpeg

        ffmpeg("-f", "lavfi", "-i", source, "-preset", "veryfast", "-pix_fmt", "yuv420p", video)
        watching = _Watching(video)
        overview, prompt = _processor_seconds(watching.overview, repeats)
        crop, seen = _processor_seconds(watching.crop, repeats)
    reward, _ = _processor_seconds(lambda at: score(SAID, "red", "oe", RewardRules()), 100)
    sent, received = _exchange(pickle.dumps(prompt, protocol=5))
    _, small = _exchange(pickle.dumps(1.0))
    told, also = (len(Exchange().loans.dumps(own)) for own in (prompt, seen))
    pixels, its = (_pixels(own) for own in (prompt, seen))
    rates = sent / (told + pixels), received / (told + pixels)
    sizes = told, also, pixels, its
    between, _ = _processor_seconds(_Decoding(ROWS), repeats)
    costs = overview, crop, reward, *sizes, *rates, small, between / ROWS
    return HostCosts(*costs, commit=_commit())


def _pixels(prompt: Prompt) -> int:
    """Bytes of its pixels."""
    return 0 if prompt.patches is None else np.asarray(prompt.patches.values).nbytes


class _Watching:
    """Overviews and crops of one video, as the recipe shows them."""

    def __init__(self, path: Path) -> None:
        self.config = paravt_rl().data
        self.renderer = setup.Parts(paravt_rl()).renderer
        self.row = Row("0", video_ref(str(path)), "Which colour?", "red")
        self.reader = self._reader()

    def _reader(self) -> VideoReader:
        """Keeps no frames: as with videos that are more than fit the memory."""
        rate, frames = self.config.crop_fps, self.config.crop_frames
        return VideoReader(rate, frames, cache_bytes=0, spec=self.renderer.spec)

    def overview(self, _: int) -> Prompt:
        """Of a video that was not opened before."""
        shown = overviews(self._reader(), self.row, max(self.config.frame_budgets))
        return self.renderer.main_prompt(self.row, shown, True)

    def crop(self, number: int) -> Prompt:
        """Another one each time."""
        start = 40.0 * number
        shown = self.reader.clip(self.row.video, start, start + 16)
        return self.renderer.subagent_prompt(shown, start, start + 16)


class _Decoding:
    """The host's part of a call of which each row draws all tokens that it may."""

    def __init__(self, rows: int) -> None:
        group = PromptGroup(text_block([0]))
        self.rows = [StreamState(StreamId(n), n, group, n, remaining=2**30) for n in range(rows)]
        integers = np.zeros((rows, STEPS), np.int32)
        floats, counts = integers.astype(np.float32), np.full(rows, STEPS, np.int32)
        states, ended = np.zeros((rows, 2), np.int32), np.zeros(rows, bool)
        drawn = integers, floats, counts, integers > 0, floats, integers, states, ended
        self.output = DecodeOutput(*drawn)

    def __call__(self, _: int) -> None:
        generating_rows(self.rows)
        for number, row in enumerate(self.rows):
            collect(row, number, self.output, [1], None)


def _processor_seconds(work: Callable[[int], Any], repeats: int) -> tuple[float, Any]:
    """The least of all calls but the first, which imports and opens; and what the last gave."""
    taken, given = [], work(0)
    for number in range(1, repeats + 1):
        began = time.process_time()
        given = work(number)
        taken.append(time.process_time() - began)
    return min(taken), given


def _exchange(message: bytes) -> tuple[float, float]:
    """Processor seconds to send a message to another process, and of that one to take it in."""
    with Listener(("127.0.0.1", 0)) as listener, ProcessPoolExecutor(1) as pool:
        received = pool.submit(_receive, listener.address)
        with listener.accept() as peer:
            channel, began = Channel(peer), time.process_time()
            for _ in range(MESSAGES):
                channel.send(message)
            sent = time.process_time() - began
        return sent / MESSAGES, received.result() / MESSAGES


def _receive(address: Any) -> float:
    with Client(address) as peer:
        assert isinstance(peer, Connection)
        channel, room, began = Channel(peer), bytearray(), time.process_time()
        for _ in range(MESSAGES):
            with channel.receive(room) as message:
                pickle.loads(message)
        return time.process_time() - began


def section(results: Mapping[str, Any], threads: int = THREADS, share: float = 0.125) -> list[str]:
    """The page's part about pods; nothing where costs or the greater part of a step are unknown."""
    if not COSTS.exists():
        return []
    costs = HostCosts(**json.loads(COSTS.read_text()))
    known = [results[name] for name in CASES if results.get(name, {}).get("programs")]
    steps = {found["chips"]: Step.of(found) for found in known}
    needed = {"decode main", "decode crop", "step"}
    if len(steps) < 2 or any(needed - {own.name for own in step.terms} for step in steps.values()):
        return []
    points = [point(chips, steps, costs, threads, share) for chips in CHIPS]
    return [*_head(costs, threads, share), *map(_line, points), "", *_verdict(points), ""]


def point(
    chips: int, steps: Mapping[int, Step], costs: HostCosts, threads: int, share: float
) -> dict[str, float]:
    """Seconds of a step on so many chips, by who takes them."""
    sizes, hosts = Sizes.of_recipe(), chips // PER_HOST
    prompts = sizes.prompts * max(1, chips // max(steps))
    rollouts = prompts * sizes.group
    crops = rollouts * sizes.crops * share
    told = costs.overview_told * prompts + costs.crop_told * crops
    # A prompt's own host holds its row; a crop's row lies where a slot was free.
    asked = min(ROW_HOSTS, hosts) - 1, min(ROW_HOSTS, hosts - 1)
    pixels = asked[0] * costs.overview_pixels * prompts + asked[1] * costs.crop_pixels * crops
    return {
        "chips": chips,
        "hosts": hosts,
        "rollouts": rollouts,
        **_device_seconds(min(chips, max(steps)), steps, share),
        "between calls": _calls(steps[max(steps)], share) * rollouts * costs.row_call,
        "crops, rewards": _host_work(crops / hosts, rollouts / hosts, costs, threads),
        "exchange": _exchange_seconds(told, rollouts + 2 * (crops + prompts), hosts, costs),
        "pixels": pixels / hosts * max(costs.receive_byte, 1 / NETWORK),
        "ahead": math.ceil(prompts / hosts) * costs.overview / threads,
        "unshared": _host_work(crops, rollouts, costs, threads)
        + prompts * costs.overview / threads,
    }


def _device_seconds(chips: int, steps: Mapping[int, Step], share: float) -> dict[str, float]:
    """Expected of rollouts and of the learner: a + b / chips through the two that are known."""
    (few, one), (many, other) = sorted(steps.items())
    weight = (1 / chips - 1 / many) / (1 / few - 1 / many)
    found = {"rollouts": 0.0, "learner": 0.0}
    parts = {own.name: own.part for own in one.terms}
    here, there = one.expected(share), other.expected(share)
    for name in here.keys() & there.keys():
        seconds = weight * here[name] + (1 - weight) * there[name]
        found["learner" if parts[name] == "learner" else "rollouts"] += seconds
    return {f"{name} s": seconds for name, seconds in found.items()}


def _calls(step: Step, share: float) -> float:
    """That decode, in a step."""
    decoding = (own for own in step.terms if own.name in ("decode main", "decode crop"))
    return sum((own.called(share) / STEPS for own in decoding), 0.0)


def _host_work(crops: float, rollouts: float, costs: HostCosts, threads: int) -> float:
    return math.ceil(crops) * costs.crop / threads + math.ceil(rollouts) * costs.reward


def _exchange_seconds(told: float, messages: float, hosts: int, costs: HostCosts) -> float:
    """A host sends its part to each of the others by one thread, and takes theirs in by another;
    the slower of the two, or the network. Each of the others says of a prompt or a crop that it
    asks for the pixels, or will not."""
    others = hosts - 1
    sending = told / hosts * others * max(costs.send_byte, 1 / NETWORK)
    taking = told * others / hosts * max(costs.receive_byte, 1 / NETWORK)
    return max(sending, taking + messages * others / hosts * costs.receive_message)


SUMMED = {
    "rollouts s": "decoding and prompts",
    "learner s": "learner",
    "crops, rewards": "crops, rewards",
    "exchange": "told to other hosts",
    "pixels": "pixels from other hosts",
    "between calls": "rows of all hosts, between calls",
}
"""Parts of a step that follow one another, and what the page calls them."""


def _head(costs: HostCosts, threads: int, share: float) -> list[str]:
    return [
        "## From 8 to 1,024 chips",
        "",
        f"8B on v5p, rollouts that take {share:g} of their limits, host work of each host on "
        f"{threads} threads, as the settings have it. Simulated by `benchmarks/pods.py` from the "
        "programs above where both meshes have them, decoding at 40% of its limit and the rest at "
        "50%, and from host costs measured on an x86-64 core with other jobs beside at "
        f"{costs.commit}: "
        f"{costs.overview:.2f} s an overview of 64 frames of {MINUTES} minutes in 1280 x 720, "
        f"{costs.crop:.2f} s a crop, {1e3 * costs.reward:.2f} ms a reward, "
        f"{costs.overview_told / 1e3:.0f} and {costs.crop_told / 1e3:.0f} kB told to all of the "
        f"first two, {costs.overview_pixels / 1e6:.1f} and {costs.crop_pixels / 1e6:.1f} MB of "
        f"pixels to the {ROW_HOSTS} hosts that hold the row, {1e-9 / costs.send_byte:.2f} GB/s "
        f"sent and {1e-9 / costs.receive_byte:.2f} taken in by one thread, "
        f"{1e6 * costs.row_call:.1f} us between two calls of {STEPS} tokens for a row, of which "
        "every host keeps all. Up to 64 chips the batch is the recipe's 64 rollouts, which is a "
        "row for each chip; beyond, it grows with the chips. Not in it: rollouts of different "
        "lengths, of which all wait for the longest, the latency of collectives, and what the host "
        "does between calls but for keeping rows.",
        "",
        f"| chips | hosts | rollouts | {', s | '.join(SUMMED.values())}, s "
        "| step, s | rollouts a second and chip "
        "| overviews, made ahead, s | host work if each host did all, s |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]


def _line(own: Mapping[str, float]) -> str:
    seconds = sum(own[name] for name in SUMMED)
    cells = (
        *(f"{own[name]:,.0f}" for name in ("chips", "hosts", "rollouts")),
        *(f"{own[name]:.2f}" for name in SUMMED),
        f"{seconds:.1f}",
        f"{own['rollouts'] / seconds / own['chips']:.4f}",
        *(f"{own[name]:.2f}" for name in ("ahead", "unshared")),
    )
    return f"| {' | '.join(cells)} |"


def _verdict(points: list[dict[str, float]]) -> Iterator[str]:
    """What grows most where the batch grows with the chips."""
    before = next(own for own in points if own["chips"] == 64)
    grown = {name: points[-1][name] - before[name] for name in SUMMED}
    name = max(grown, key=grown.__getitem__)
    whole = sum(points[-1][part] for part in SUMMED)
    yield (
        f'What stops scaling next is "{SUMMED[name]}": {before[name]:.2f} s on 64 chips and '
        f"{points[-1][name]:.2f} s, {points[-1][name] / whole:.0%} of a step, on "
        f"{points[-1]['chips']:,.0f}."
    )


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    root = Path(__file__).parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, keep, and print the section."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS, help="of each host")
    parser.add_argument("--share", type=float, default=0.125, help="of the limits of a rollout")
    arguments = parser.parse_args()
    costs = measure(arguments.repeats)
    COSTS.write_text(json.dumps(dataclasses.asdict(costs), indent=1) + "\n")
    results = json.loads(COSTS.with_name("scale.json").read_text())
    print("\n".join(section(results, arguments.threads, arguments.share)))


if __name__ == "__main__":
    main()
