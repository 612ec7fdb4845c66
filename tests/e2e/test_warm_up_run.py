"""After `rl.warm_up` the real command compiles nothing, whatever its rollouts do."""

import pytest

from tests.support.command import metrics, start

pytestmark = pytest.mark.study

SETTINGS = (
    "rl.warm_up=true",
    "rl.prompts_per_step=1",
    "data.train_videos=6",
    "data.crop_frames=2",
    "agent.subagent_batch=2",
    "agent.turn_tokens=48",
    "agent.response_tokens=16",
    # Neither a grammar nor an end of its own has a shape of its own.
    "agent.sampling.constrain=calls",
    "agent.sampling.stop=</tool_call>",
    "evaluation.rows=0",
    "output.export_hf=false",
)


def test_nothing_compiles_after_the_warm_up(tmp_path):
    done = start(tmp_path / "run", tmp_path, "--steps", "5", settings=SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shapes of rollouts" in done.stdout
    first, *later = metrics(tmp_path / "run")
    assert first["compile/programs"] > 10
    assert [record["compile/programs"] for record in later] == [0] * 4
    assert max(record["tool/calls_per_rollout"] for record in later) > 0
