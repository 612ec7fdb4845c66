"""What the host work of a step takes of each host: overviews, crops and rewards, shared by hosts.

    python benchmarks/hosts.py [--hosts 1 2 4] [--steps 3]

Every host is a process here. They join as those of a run do, take the prompts of each step from one
stream, run every rollout's crops, look at those that their devices would hold and score every
rollout, as a run does, without a model between.
Seconds are processor time of the host that spent most, the median of all steps but the first; so
they say the same with fewer cores than hosts.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from paravt_jax.records import Row
from paravt_jax.rewards import RewardRules, score
from pipelines.decode import video_ref
from pipelines.loader import prompt_stream
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from rollout.workers import Workers
from train.hosts import cluster
from train.hosts.exchange import EXCHANGE
from train.hosts.share import WORK, RowsOfHosts, busiest, by_share, shared_job, work_metrics
from train.recipes.needle import COLD_START

PROMPTS, COPIES, CROPS, FRAMES = 8, 4, 2, 32
"""Of a step; rollouts of each prompt; crops of each rollout; frames of each overview."""
SECONDS, SIZE = 60, (640, 360)
"""Of each video."""
SAID = "<think>It is the red one, I saw it.</think><answer>red</answer>" * 20


def write_videos(folder: Path) -> None:
    """Videos that are no two frames alike."""
    noise = np.random.default_rng(0).integers(0, 255, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)
    still = cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)
    for number in range(PROMPTS):
        path = str(folder / f"{number}.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 25.0, SIZE)
        for frame in range(25 * SECONDS):
            writer.write(np.roll(still, (frame, number * 40), axis=(1, 0)))
        writer.release()


def work(folder: Path, steps: int) -> None:
    """One host: the host work of some steps, told by the first."""
    cluster.start()
    paths = sorted(folder.glob("*.mp4"))
    rows = [Row(path.stem, video_ref(str(path)), "Which colour?", "red") for path in paths]
    renderer = ChatRenderer.from_folder(str(COLD_START), pixels=(784, 50176))
    # Nothing is kept, as in a run whose videos are more than fit the memory.
    reader = VideoReader(cache_bytes=0, spec=renderer.spec)
    counts, seed = (FRAMES,), 0
    share, ahead = RowsOfHosts(), {"tools": False, "steps_ahead": 1}
    prompts = prompt_stream(rows, reader, renderer, counts, PROMPTS, seed, share=share, **ahead)
    spent = [_step(prompts, reader, renderer) for _ in range(steps)][1:]
    prompts.close()
    if cluster.is_first():
        print({name: round(statistics.median(own[name] for own in spent), 2) for name in spent[0]})


def _step(prompts, reader, renderer) -> dict[str, float]:
    """The host work of one step, and what it took of the host with most of it."""
    cpu, wall = time.process_time(), time.perf_counter()
    items = next(prompts)
    with Workers(4, share=shared_job) as workers:
        jobs = [_crop(workers, reader, renderer, item.row, at) for item, at in _rollouts(items)]
        crops = [job.result() for job in jobs]
    # A crop becomes a row where a slot is free next; a prompt's row lies on its own host.
    for crop in crops[EXCHANGE.number :: EXCHANGE.count]:
        np.asarray(crop.patches.values)
    by_share(range(PROMPTS * COPIES), _rewards)
    spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return busiest(spent) | work_metrics(reader.take_metrics())


def _rollouts(items):
    """The crops of all rollouts of a step: which prompt, and the crop's place among all of them."""
    count = COPIES * CROPS
    return [(item, place * count + at) for place, item in enumerate(items) for at in range(count)]


def _crop(workers, reader, renderer, row, at):
    """Watch a window of 4 seconds; of those of a group, no two are the same."""
    start = at % (COPIES * CROPS) * (SECONDS - 4) / (COPIES * CROPS)

    def crop():
        return renderer.subagent_prompt(reader.clip(row.video, start, start + 4), start, start + 4)

    place = at // CROPS, PROMPTS * COPIES
    return workers.submit((row.row_id, start), crop, 60.0, place)


def _rewards(own) -> list[float]:
    with WORK.doing("rewards", len(own)):
        return [score(SAID, "red", "oe", RewardRules()).total for _ in own]


def run(hosts: int, steps: int, folder: str) -> None:
    """Processes that join as hosts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    whole = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    command = [sys.executable, __file__, "--folder", folder, "--steps", str(steps)]
    started = [
        subprocess.Popen(command, env={**os.environ, **whole, "JAX_PROCESS_ID": str(number)})
        for number in range(hosts)
    ]
    if any([own.wait() for own in started]):
        raise SystemExit("a host failed")


def main() -> None:
    """Run the benchmark, or be one of its hosts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", help="of videos; makes this process a host")
    args = parser.parse_args()
    if args.folder:
        return work(Path(args.folder), args.steps)
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder))
        for hosts in args.hosts:
            print(f"{hosts} hosts:", flush=True)
            run(hosts, args.steps, folder)
    return None


if __name__ == "__main__":
    main()
