"""The released system's own inputs and outputs (commit cf55249), case by case.

`tests/data/reference_cases` was recorded by running the release: its parser, its rewards, its
advantages and its losses with their gradients.
"""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.advantages import AdvantageConfig, group_advantages, kl_to_go, shape_rewards, whiten
from paravt_jax.objectives import ObjectiveConfig, divergence, policy_loss
from paravt_jax.protocol import TURN_END, parse_tool_calls
from paravt_jax.rewards import RewardRules, reference, score

CASES = pathlib.Path(__file__).parents[1] / "data" / "reference_cases"


def read_lines(name):
    return [json.loads(line) for line in (CASES / name).read_text().splitlines()]


PARSER = [case for case in read_lines("parser_cases.jsonl") if "rl_parser" in case]
REWARDS = [case for case in read_lines("reward_cases.jsonl") if "completion" in case]
METRICS = [case for case in read_lines("reward_cases.jsonl") if "function" in case]
PPO = json.loads((CASES / "ppo_cases.json").read_text())
ARRAYS = np.load(CASES / "ppo_cases.npz")


def by_id(cases):
    return pytest.mark.parametrize("case", cases, ids=[case["id"] for case in cases])


def ppo(*prefixes):
    return pytest.mark.parametrize("name", [name for name in PPO if name.startswith(prefixes)])


def array(name, side, key):
    return ARRAYS[f"{name}/{side}/{key}"]


# --- Parser ---------------------------------------------------------------------------------------


@by_id(PARSER)
def test_parser(case):
    parsed = parse_tool_calls(case["text"], "reference")
    calls = [{"name": c.name, "arguments_json": c.arguments_json} for c in parsed.tool_calls]
    expected = case["rl_parser"]
    assert (parsed.tools_called, calls, parsed.content) == (
        expected["tools_called"],
        expected["tool_calls"],
        expected["content"],
    )


@by_id(PARSER)
def test_parseable_tool_call(case):
    assert reference.has_parseable_tool_call(case["text"]) == case["reward_has_parseable"]


# --- Rewards --------------------------------------------------------------------------------------


def number(text, default):
    """The release reads its knobs from the environment and takes the default for bad numbers."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return default


def rules_of(case):
    knobs = case["knobs"]
    return RewardRules(
        compat="reference",
        answer_suffix=knobs.get("ANSWER_SUFFIX") == "1",
        anchor_weight=number(knobs.get("ANCHOR_WEIGHT"), 0.0),
        format_weight=number(knobs.get("FORMAT_WEIGHT"), 0.5),
        mode=knobs.get("REWARD_MODE", "f1"),
    )


def question_of(prompt):
    """What the release shows to its judge: what follows the last picture."""
    after = prompt.rpartition("<|vision_end|>")
    return after[2].partition(TURN_END)[0].strip() if after[1] else ""


def scored(case, messages):
    def judge(message):
        messages.append(message)
        if case["judge_reply"] == "__RAISE__":
            raise ConnectionError("the judge is away")
        return case["judge_reply"]

    return score(
        case["completion"],
        case["answer"],
        case["question_type"],
        rules_of(case),
        question=question_of(case["prompt"]),
        judge=judge,
    )


@by_id([case for case in REWARDS if "total" in case["expected"]])
def test_reward(case):
    expected, messages = case["expected"], []
    result = scored(case, messages)
    np.testing.assert_allclose(
        [result.total, result.accuracy, result.format, result.tool],
        [expected[k] for k in ("total", "acc_reward", "format_reward", "tool_reward")],
        rtol=0,
        atol=1e-9,
    )
    if "judge_user_message" in expected:
        assert messages == [expected["judge_user_message"]]


@by_id([case for case in REWARDS if "error" in case["expected"]])
def test_reward_that_raises(case):
    with pytest.raises(ValueError, match="could not convert string to float"):
        scored(case, [])


@by_id([case for case in REWARDS if "extracted" in case["expected"]])
def test_parts_of_reward(case):
    expected, completion = case["expected"], case["completion"]
    assert reference.extract_answer(completion) == expected["extracted"]
    for name in ("has_substantive_think", "has_parseable_tool_call", "has_nonempty_answer"):
        assert getattr(reference, name)(completion) == expected[name], name
    assert reference.think_before_tool(completion) == expected["think_before_tool"]


@by_id(METRICS)
def test_metric(case):
    result = getattr(reference, case["function"])(*case["args"])
    if isinstance(result, str):
        assert result == case["expected"]
    else:
        assert result == pytest.approx(case["expected"], rel=0, abs=1e-9)


# --- Advantages -----------------------------------------------------------------------------------


@ppo("norm_reward", "norm_g1")
def test_reward_normalisation(name):
    params, x = PPO[name]["params"], array(name, "in", "x").astype(np.float64)
    size = params["group_size"] if params["mean_level"] == "group" else len(x)
    whole = len(x) // size * size  # Rows beyond the last full group cannot exist in [p, g].
    config = AdvantageConfig(leave_one_out=params["mean_leave1out"], eps=params["eps"])
    result = group_advantages(x[:whole].reshape(-1, size), config)
    np.testing.assert_allclose(
        result.reshape(-1), array(name, "out", "y")[:whole], rtol=0, atol=1e-6
    )


@ppo("norm_adv")
def test_token_normalisation(name):
    result = whiten(array(name, "in", "x"), array(name, "in", "mask"))
    np.testing.assert_allclose(result, array(name, "out", "y"), rtol=0, atol=1e-6)


def advantages_of(name):
    """Advantages at the index of the token; the release keeps them at the predicting position."""
    params = PPO[name]["params"]
    config = AdvantageConfig(
        reward_scale=params["reward_scaling"],
        reward_bias=params["reward_bias"],
        reward_clip=params["reward_clip"],
    )
    rewards = shape_rewards(array(name, "in", "rewards").reshape(-1, 8).astype(np.float64), config)
    assert params["discount"] == params["gae_lambda"] == 1.0
    generated = array(name, "in", "loss_mask") > 0
    # R6: the release puts the reward on the last token, and loses it if that was not generated.
    last = array(name, "in", "attention_mask").sum(axis=1) - 1
    kept = group_advantages(rewards).reshape(-1) * generated[np.arange(len(generated)), last]
    policies = array(name, "in", "logprobs"), np.roll(array(name, "in", "ref_logp"), 1, axis=1)
    penalty = kl_to_go(generated, *policies, params["kl_estimator"])
    advantages = kept[:, None].astype(np.float32) * generated - params["kl_ctl"] * penalty
    return whiten(advantages, generated) if params["adv_norm"] is not None else advantages


@ppo("adv_")
def test_token_advantages(name):
    trained = array(name, "out", "loss_mask") > 0
    result = np.roll(advantages_of(name), -1, axis=1)
    expected = np.where(trained, array(name, "out", "advantages"), 0)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


# --- Losses ---------------------------------------------------------------------------------------


@ppo("kl_k")
def test_divergence(name):
    result = divergence(
        jnp.asarray(array(name, "in", "log_probs")),
        jnp.asarray(array(name, "in", "log_probs_base")),
        PPO[name]["params"]["kl_estimator"],
    )
    np.testing.assert_allclose(result, array(name, "out", "kl"), rtol=0, atol=1e-5)


def objective_of(name):
    params = PPO[name]["params"]
    if "tau_pos" in params:
        tau = {"soft_positive": params["tau_pos"], "soft_negative": params["tau_neg"]}
        return ObjectiveConfig(surrogate="soft", behaviour_cap=None, **tau)
    return ObjectiveConfig(
        clip_low=params["eps_clip"],
        clip_high=params["eps_clip"],
        behaviour_cap=params["behav_imp_weight_cap"],
    )


def loss_inputs(name, piece=slice(None)):
    """The packed tokens of a case as one row; SAPO knows only one older policy."""
    keys = ["proximal_logprobs", "old_logprobs", "advantages", "loss_mask"]
    if f"{name}/in/proximal_logprobs" not in ARRAYS:
        keys[0] = "old_logprobs"
    return [array(name, "in", key)[None, piece] for key in ("logprobs", *keys)]


@jax.jit
def divide(sums, count):
    return sums / jnp.maximum(count, 1)


SINGLE_LOSSES = [n for n in PPO if n.startswith("loss_") and f"{n}/out/grad_logprobs" in ARRAYS]


@pytest.mark.parametrize("name", SINGLE_LOSSES)
def test_loss_gradient_and_statistics(name):
    log_probs, *others = loss_inputs(name)

    def loss(log_probs):
        total, count, metrics = policy_loss(log_probs, *others, objective_of(name))
        return divide(total, count), metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(log_probs)
    np.testing.assert_allclose(value, array(name, "out", "loss"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient[0], array(name, "out", "grad_logprobs"), rtol=0, atol=1e-6)
    if f"{name}/out/stat_clip_mask" in ARRAYS:
        trained = others[-1].sum()
        assert float(metrics.clipped) == array(name, "out", "stat_clip_mask").sum()
        assert (
            float(metrics.correction.dropped)
            == trained - array(name, "out", "stat_behave_mask").sum()
        )
        np.testing.assert_allclose(
            metrics.ratio, array(name, "out", "stat_importance_weight").sum(), rtol=1e-6
        )


@pytest.mark.slow
def test_micro_batches_add_up():
    name = "loss_microbatch_aggregate"
    edges = np.cumsum([0, *PPO[name]["params"]["split"]])
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    parts = [policy_loss(*loss_inputs(name, p), objective_of(name))[:2] for p in pieces]
    sums, counts = np.array(parts).T
    np.testing.assert_allclose(sums / counts, array(name, "out", "mb_losses"), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(counts, array(name, "out", "mb_weights"))
    whole = sums.sum() / counts.sum()
    np.testing.assert_allclose(whole, array(name, "out", "aggregate"), rtol=0, atol=1e-6)


def test_from_rewards_to_gradient():
    """Rewards to advantages to loss; the release packs rows, we keep them padded."""
    name, rows = "e2e_adv_paravt_packed_loss", "adv_paravt"
    inputs = {key: array(rows, "in", key) for key in ("logprobs", "loss_mask", "attention_mask")}
    proximal = np.roll(array(rows, "in", "prox_logp"), 1, axis=1)
    advantages = advantages_of(rows)
    others = proximal, inputs["logprobs"], advantages, inputs["loss_mask"]

    def loss(log_probs):
        return divide(*policy_loss(log_probs, *others, ObjectiveConfig())[:2])

    # The release trains once per batch, so the policy is still the proximal one.
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(proximal))
    packed = np.roll(gradient, -1, axis=1)[inputs["attention_mask"]]
    np.testing.assert_allclose(packed, array(name, "out", "grad_logprobs"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(value, array(name, "out", "loss"), rtol=0, atol=1e-6)
