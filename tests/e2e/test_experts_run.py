"""A model with experts through the real command, on a mesh that splits them."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from transformers import Qwen3VLMoeForConditionalGeneration  # noqa: E402

from models.qwen3_vl import Qwen3VLPolicy, from_pretrained, read_config  # noqa: E402
from models.qwen3_vl.config import ExpertsConfig  # noqa: E402
from paravt_jax.params import initialise  # noqa: E402
from tests.support.command import TIMED, command, metrics, small, start  # noqa: E402
from tests.support.hosts import on_hosts  # noqa: E402
from train.recipes.needle import COLD_START  # noqa: E402

pytestmark = pytest.mark.study

EXPERTS = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
SETTINGS = [
    "model.router_balance=0.01",
    "rl.routing_replay=true",
    "evaluation.rows=0",
    "rl.prompts_per_step=1",
    "rl.group_size=4",
    "agent.turn_tokens=24",
    "agent.answer_tokens=8",
    "agent.max_tool_rounds=0",
    "data.frame_budgets=2",
    "data.train_videos=4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two RL steps from random weights, beside the needle world's tokenizer and processor."""
    root = tmp_path_factory.mktemp("experts")
    dense = read_config(COLD_START)
    text = dataclasses.replace(dense.text, num_hidden_layers=2, experts=EXPERTS)
    config = dataclasses.replace(dense, text=text)
    params = initialise(Qwen3VLPolicy(config).table, jax.random.key(0))
    Qwen3VLPolicy(config).save_folder(params, root / "model", base=COLD_START)
    done = start(root / "run", root, *steps_of(root), settings=SETTINGS, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "run"


def steps_of(root):
    """The flags of both steps."""
    return ["--model", str(root / "model"), "--steps", "2", "--mesh", "fsdp:2,expert:2,tensor:2"]


def test_sampler_learner_and_reference_agree(run):
    first, second = metrics(run)
    gap = max(first["logprob/gap_max"], second["logprob/gap_max"])
    print(f"sampler and learner differ by {gap:.1e}")
    assert gap < 1e-4
    assert abs(first["kl"]) < 1e-6 and second["kl"] > 1e-6


def test_routing_is_replayed(run):
    """In float32 few choices differ where weights are the same; each is one of 2 of 4 experts."""
    for record in metrics(run):
        assert 0 <= record["router/choices_differ"] < 0.01
        assert record["router/tokens_differ"] < 0.02


def test_two_hosts_route_and_replay_as_one_does(run, tmp_path):
    root, workdir = run.parent, tmp_path / "run"
    sets = [*small(workdir, steps_of(root)), f"data.cache_dir={root}", *SETTINGS]
    on_hosts(command(workdir, *steps_of(root), sets=sets), devices=4)
    for one, two in zip(metrics(run), metrics(workdir), strict=True):
        for name, value in one.items():
            if not name.startswith((*TIMED, "hosts/")):
                np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_balance_of_the_experts_is_watched(run):
    """1 where all experts are used alike, 4 / 2 where two of them serve every token."""
    assert all(1 <= record["router/balance"] < 2 for record in metrics(run))


def test_the_exported_folder_loads_in_transformers(run):
    theirs, report = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        run / "hf", output_loading_info=True
    )
    assert not any(report.values())
    ids = np.arange(5, 45)[None]
    with torch.no_grad():
        want = theirs.eval()(input_ids=torch.tensor(ids)).logits.numpy()
    got = from_pretrained(run / "hf").logits(ids)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
