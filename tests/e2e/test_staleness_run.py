"""The real command with rollouts that are drawn ahead: killed in the midst and resumed, it is the
uninterrupted run."""

import json
import signal

import numpy as np
import pytest

from tests.support.command import logged, metrics, send, start, untimed

pytestmark = pytest.mark.study
SETTINGS = [
    "evaluation.rows=0",
    "output.export_hf=false",
    "agent.turn_tokens=64",
    "rl.staleness=2",
    "optimizer.learning_rate=1e-4",
]
APART = [
    "evaluation.rows=0",
    "output.export_hf=false",
    "agent.turn_tokens=48",
    "rl.staleness=1",
    "output.checkpoint_every=0",
]
IN_FLIGHT = ["rl.in_flight_updates=1", "rl.in_flight_calls=2"]
SAME = ("loss", "grad_norm", "kl", "reward/total", "logprob/gap_mean", "format/score")
STEPS = ("--steps", "4")


def told(workdir):
    """Figures of all steps, and which version of the weights said what."""
    files = sorted((workdir / "rollouts").glob("*.jsonl"))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    kept = ("policy_version", "tokens", "log_probs", "versions")
    said = [tuple(own[name] for name in kept) for own in lines]
    return [untimed(record) for record in metrics(workdir)], said


def test_rollouts_under_way_go_on_with_the_weights_that_learn_from_them(tmp_path, cache):
    # The shapes of the other short runs, whose programs are compiled already.
    settings = [text for text in APART if not text.startswith("agent.")]
    done = start(tmp_path, cache, "--steps", "2", settings=[*settings, *IN_FLIGHT])
    assert done.returncode == 0, done.stderr[-3000:]
    figures, said = told(tmp_path)
    versions = [set(version) - {-1} for *_, version in said]
    assert versions[:4] == [{0}] * 4 and set().union(*versions[4:]) == {0, 1}
    assert [record["rollout/staleness_max"] for record in figures] == [0, 1]
    assert 0 < figures[1]["rollout/staleness"] < 1


@pytest.mark.parametrize("in_flight", [[], IN_FLIGHT], ids=["", "in flight"])
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, cache, in_flight):
    whole, cut, settings = tmp_path / "whole", tmp_path / "cut", [*SETTINGS, *in_flight]
    done = start(whole, cache, *STEPS, settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    figures, said = told(whole)
    assert [record["rollout/staleness_max"] for record in figures] == [0, 1, 2, 2]
    assert [version for version, *_ in said] == [0] * 12 + [1] * 4
    # Drawn by the weights that learn, samples agree with the learner; by older ones they do not.
    assert figures[0]["logprob/gap_max"] < 1e-4 < figures[1]["logprob/gap_max"]
    assert all(record["time/overlap"] > 0 for record in metrics(whole)[1:3])

    code, said_by_kill = send(
        signal.SIGTERM, lambda: logged(cut) >= 2, cut, cache, *STEPS, settings=settings
    )
    assert code == 0 and "SIGTERM" in said_by_kill
    assert 2 <= logged(cut) < 4
    done = start(cut, cache, *STEPS, "--resume", "must", settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert told(cut) == (figures, said)


@pytest.mark.parametrize("in_flight", [[], IN_FLIGHT], ids=["", "in flight"])
def test_rollouts_on_devices_of_their_own_change_no_result(tmp_path, cache, in_flight):
    runs, settings = {}, [*APART, *in_flight]
    for name, devices, flags in (
        ("shared", 1, ()),
        ("apart", 3, ("--rollout-devices", "1", "--mesh", "fsdp:2")),
    ):
        done = start(
            tmp_path / name, cache, "--steps", "2", *flags, settings=settings, devices=devices
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = metrics(tmp_path / name)
    for one, two in zip(runs["shared"], runs["apart"], strict=True):
        assert two["time/hand_over"] > 0 and "time/hand_over" not in one
        for name in SAME:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
