"""The real command with rollouts on a mesh of their own, and a resume that takes another one."""

import numpy as np
import pytest

from tests.support.command import metrics, start

pytestmark = pytest.mark.study
SETTINGS = ["evaluation.rows=0", "output.export_hf=false", "agent.turn_tokens=48"]
SAME = ("loss", "grad_norm", "kl", "reward/total", "logprob/gap_mean", "format/score")


def steps(workdir, cache, count, *arguments):
    given = "--mesh", "fsdp:2", "--steps", str(count), *arguments
    done = start(workdir, cache, *given, settings=SETTINGS, devices=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return " ".join(done.stdout.split()), metrics(workdir)  # lines end at 80 columns


def check_same(one, two):
    assert two["time/hand_over"] > 0
    for name in SAME:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_mesh_of_rollouts_changes_no_result(tmp_path):
    said, (plain,) = steps(tmp_path / "plain", tmp_path, 1)
    assert "on mesh" not in said and "time/hand_over" not in plain
    said, (other,) = steps(tmp_path / "other", tmp_path, 1, "--rollout-mesh", "tensor:2")
    assert "on mesh data:1,fsdp:1,expert:1,context:1,tensor:2" in said
    check_same(plain, other)


def test_a_resume_may_take_another(tmp_path):
    _, plain = steps(tmp_path / "plain", tmp_path, 2)
    steps(tmp_path / "other", tmp_path, 1, "--rollout-mesh", "tensor:2")
    arguments = "--resume", "must", "--rollout-mesh", "data:2"
    said, other = steps(tmp_path / "other", tmp_path, 2, *arguments)
    assert "rollout_mesh was 'tensor:2' and is 'data:2' from now on" in said
    assert "on mesh data:2,fsdp:1,expert:1,context:1,tensor:1" in said
    for one, two in zip(plain, other, strict=True):
        check_same(one, two)
