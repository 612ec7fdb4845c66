"""What ends one of two hosts, and what becomes of the other: the table of `docs/pods.md`, timed
(`pytest -s` tells the seconds)."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.command import TIMED, logged, metrics, saved
from tests.support.hosts import Ended, Hosts, on_hosts, steps_of
from tests.support.videos import write_video

pytestmark = pytest.mark.study
STEPS = 4
FEW_WORDS = (
    "agent.max_tool_rounds=0",
    "agent.turn_tokens=24",
    "agent.answer_tokens=16",
    "rl.prompts_per_step=2",
    "output.details_mb=0",
)
"""Settings of runs that are started often."""
REWARD = """
import os
from paravt_jax.rewards import Attempt, reward_terms


@reward_terms(accuracy=(0, 1))
def own(attempt: Attempt) -> dict[str, float]:
    if os.environ["JAX_PROCESS_ID"] == "1":
        raise OSError("the disk of the reward is gone")
    return {"accuracy": attempt.accuracy()}
"""

TOOL = '''
import os
from paravt_jax.records import Frames
from rollout.tools import ToolContext


def crop_video(start_time: float, end_time: float, context: ToolContext) -> Frames:
    """Watch a part of the video.

    Args:
        start_time: Its start, in seconds.
        end_time: Its end, in seconds.
    """
    if os.environ.get("JAX_PROCESS_ID") == "1":
        raise OSError("the disk of the tool is gone")
    return context.clip(start_time, end_time).frames
'''


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> Path:
    """A run that nothing has ended."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    on_hosts(steps_of(workdir, cache, steps=STEPS, settings=FEW_WORDS))
    return workdir


def started(workdir: Path, cache: Path, before: int) -> Hosts:
    """Hosts that have made a step beyond those `before`, and are within the next one."""
    saving = [*FEW_WORDS, "output.checkpoint_every=1"]
    hosts = Hosts(steps_of(workdir, cache, steps=STEPS, settings=saving))
    while logged(workdir) <= before:
        assert all(process.poll() is None for process in hosts.processes)
        time.sleep(0.05)
    return hosts


def tell(what: str, ends: list[Ended]) -> None:
    print(f"\n{what}: " + ", ".join(f"{end.seconds:.1f} s with {end.code}" for end in ends))


def lines(end: Ended) -> list[str]:
    return [line for line in end.errors.splitlines() if line.startswith("error")]


def agrees(one: Path, other: Path) -> None:
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for name in ours:
            if not name.startswith((*TIMED, "hosts/", "rollout/cache")):
                np.testing.assert_allclose(ours[name], theirs[name], 1e-4, 1e-6, err_msg=name)


def test_a_run_survives_its_hosts(tmp_path, cache, whole):
    """SIGTERM to one, later SIGKILL to it: what is resumed is the run that nothing ended."""
    workdir = tmp_path / "run"
    hosts = started(workdir, cache, before=1)
    hosts.processes[1].send_signal(signal.SIGTERM)
    ends = hosts.end()
    tell("SIGTERM to host 1", ends)
    assert [end.code for end in ends] == [0, 0]
    stood = logged(workdir)
    assert sorted(int(own.name) for own in (workdir / "checkpoints").iterdir())[-1] == stood

    hosts = started(workdir, cache, before=stood)
    hosts.processes[1].kill()
    ends = hosts.end()
    tell("SIGKILL to host 1", ends)
    assert ends[0].code == 1 and ends[0].seconds < 120
    assert len(lines(ends[0])) == 1 and "host 1 is gone" in ends[0].errors, ends[0].errors[-3000:]

    tell("resumed", on_hosts(steps_of(workdir, cache, steps=STEPS, settings=FEW_WORDS)))
    agrees(whole, workdir)
    assert saved(whole, STEPS) == saved(workdir, STEPS), "the same weights, to the bit"


@pytest.fixture
def own(tmp_path, cache):
    """Eight videos of each host's own: the folder of the second, and the commands of a run."""
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
        names = [f"{number}.mp4" for number in range(8)]
        for name in names:
            write_video(folder / name)
        rows = [f"{name},What {name}?,red,oe\n" for name in names]
        (folder / "own.csv").write_text("video,question,answer,question_type\n" + "".join(rows))

    sheets = [("--data", str(folder / "own.csv")) for folder in folders]
    return folders[1], [steps_of(tmp_path / "run", cache, *sheet) for sheet in sheets]


def test_a_video_that_one_host_lacks(own):
    """Noticed before anything is computed."""
    there, commands = own
    (there / "5.mp4").unlink()
    ends = Hosts(*commands).end()
    tell("absent on host 1", ends)
    for end in ends:
        (line,) = lines(end)
        assert end.code == 1 and line.startswith("error on host 1: ")
        assert "there/own.csv: 1 of 8 rows cannot be used" in line


def test_a_tool_that_fails_on_one_host(tmp_path, cache):
    """The model reads that its call has failed, as on one host, and that host alone says why; the
    run goes on."""
    (tmp_path / "own.py").write_text(TOOL)
    workdir, tool = tmp_path / "run", f"agent.tools={tmp_path / 'own.py'}:crop_video"
    ends = on_hosts(steps_of(workdir, cache, settings=[tool]))
    tell("tool", ends)
    (record,) = metrics(workdir)
    assert 0 < record["tool/success_rate"] < 1
    said = "".join(path.read_text() for path in (workdir / "rollouts").glob("*.jsonl"))
    assert "Error: crop_video failed" in said
    assert ["the disk of the tool is gone" in end.errors for end in ends] == [False, True]


def test_host_0_is_killed(tmp_path, cache):
    """With it JAX's key-value store goes: the other ends too, and says so."""
    hosts = started(tmp_path / "run", cache, before=0)
    hosts.processes[0].kill()
    ends = hosts.end()
    tell("SIGKILL to host 0", ends)
    assert ends[1].code != 0 and ends[1].seconds < 120
    assert "host 0 is gone" in ends[1].errors, ends[1].errors[-6000:]


def test_a_reward_that_fails_on_one_host(tmp_path, cache):
    """Both end, with the line of the host."""
    (tmp_path / "own.py").write_text(REWARD)
    reward = f"rewards.scheme={tmp_path / 'own.py'}:own"
    settings = [*FEW_WORDS, reward, "objective.anchor=sequence"]
    ends = Hosts(steps_of(tmp_path / "run", cache, settings=settings)).end()
    tell("reward", ends)
    for end in ends:
        (line,) = lines(end)
        assert end.code == 1 and line.startswith("error on host 1: ")
        assert "the disk of the reward is gone" in line
