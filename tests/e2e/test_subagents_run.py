"""Sub-agents in the loss through the real command."""

import numpy as np
import pytest

from tests.support.command import metrics, start

pytestmark = pytest.mark.study


def test_two_steps_with_sub_agents_in_the_loss(tmp_path):
    settings = (
        "rl.subagent_credit=share",
        # Another temperature than the main agent's: each is learned under its own.
        "agent.subagent_sampling.temperature=0.6",
        "data.question_types=oe",
        "evaluation.rows=0",
        "output.export_hf=false",
    )
    done = start(tmp_path / "run", tmp_path, "--steps", "2", settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sub-agents of" in done.stdout and "[0, 2, 4, 6, 8] rows per prompt" in done.stdout
    records = metrics(tmp_path / "run")
    assert len(records) == 2
    for record in records:
        assert record["subagents/rows"] > 0
        assert record["logprob/gap_max"] < 1e-4, "sampler and learner must agree on sub-agents too"
        assert all(np.isfinite(value) for value in record.values())
    assert abs(records[0]["kl"]) < 1e-6
