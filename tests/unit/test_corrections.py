"""Correction of the sampler-learner mismatch, against float64 numpy that knows no array of ours."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import correction
from paravt_jax.corrections import CorrectionConfig, correct
from paravt_jax.objectives import ObjectiveConfig, policy_loss
from paravt_jax.params import initialise
from paravt_jax.settings import Refused
from paravt_jax.shared_rows import Bounds
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from tests.support.rollout_fakes import IM_END, PAD, VOCAB, text_prompt
from tests.support.tiny_models import QWEN
from train.batch import LearnerStream, row_starts, shared_batch
from train.recipes import get_recipe
from train.report.rollouts import DETAILS, FOLDER
from train.settings.override import based_on, override
from train.step import RlStep

ROWS, TOKENS = 8, 12
NONE = float("-inf"), float("inf")


def batch(seed=0, spread=0.4):
    """Three policies that differ by about `spread` per token; the last sequence has no tokens."""
    rng = np.random.default_rng(seed)
    learner = -rng.gamma(2.0, 0.5, (ROWS, TOKENS))
    # Some sequences agree better than others, so that bounds divide them.
    apart = spread * np.linspace(0.1, 2.0, ROWS)[:, None]
    behaviour = learner + apart * rng.normal(size=learner.shape)
    log_probs = learner + 0.3 * rng.normal(size=learner.shape)
    advantages = rng.normal(size=learner.shape)
    mask = rng.random(learner.shape) < 0.7
    mask[-1] = False
    arrays = log_probs, learner, behaviour, advantages, mask
    return tuple(np.asarray(x, np.float32) for x in arrays)


def bounds(low, high):
    return NONE[0] if low is None else low, NONE[1] if high is None else high


@dataclasses.dataclass
class ByNumpy:
    """The clipped loss of `batch`, sequence by sequence and token by token, and what it told."""

    own: CorrectionConfig
    cap: float | None = 5.0
    loss: float = 0.0
    count: int = 0
    told: dict = dataclasses.field(default_factory=dict)
    slope: dict = dataclasses.field(default_factory=dict)

    def of(self, arrays):
        arrays = [np.asarray(x, np.float64) for x in arrays]
        tokens = weights = squares = sequences = 0
        counts = dict.fromkeys(("dropped", "truncated", "rejected"), 0)
        rows = dict(counts)
        for row, (pi, learner, mu, advantage, mask) in enumerate(zip(*arrays, strict=True)):
            places = [int(t) for t in np.flatnonzero(mask)]
            if not places:
                continue
            sequences += 1
            ratios = {t: math.exp(learner[t] - mu[t]) for t in places}
            found = {name: set() for name in counts}
            for t in places:
                tokens += 1
                weight, fate = self.weight(ratios, t)
                if not self.accepts(ratios, t):
                    found["rejected"].add(t)
                if fate:
                    found[fate].add(t)
                if t in found["rejected"]:
                    continue
                bypass = self.own.proximal == "sampler"
                q = math.exp(pi[t] - (mu[t] if bypass else learner[t]))
                self.surrogate(row, t, q, advantage[t], 1.0 if bypass else weight)
                importance = ratios[t] if bypass else weight
                weights, squares = weights + importance, squares + importance**2
            for name, where in found.items():
                counts[name], rows[name] = counts[name] + len(where), rows[name] + bool(where)
        self.told = {
            "dropped_fraction": counts["dropped"] / tokens,
            "correction/dropped_sequences": rows["dropped"] / sequences,
            "correction/truncated": counts["truncated"] / tokens,
            "correction/truncated_sequences": rows["truncated"] / sequences,
            "correction/rejected": counts["rejected"] / tokens,
            "correction/rejected_sequences": rows["rejected"] / sequences,
            "correction/weight_mean": weights / tokens,
            "correction/effective_share": weights**2 / squares / tokens,
        }
        return self

    def surrogate(self, row, t, q, advantage, weight):
        clipped = min(max(q, 0.8), 1.2)
        free = -advantage * q >= -advantage * clipped
        self.loss += max(-advantage * q, -advantage * clipped) * weight
        self.slope[row, t] = -advantage * q * weight if free else 0.0
        self.count += 1

    def level(self, ratios, t, level):
        if level == "token":
            return ratios[t]
        product = math.prod(ratios.values())
        return product if level == "product" else product ** (1 / len(ratios))

    def weight(self, ratios, t):
        if self.own.proximal == "sampler" or self.own.weights == "none":
            return 1.0, None
        weight, (low, high) = (
            self.level(ratios, t, self.own.weights),
            bounds(self.own.floor, self.cap),
        )
        if low <= weight <= high:
            return weight, None
        if self.own.beyond == "mask":
            return 0.0, "dropped"
        return min(max(weight, low), high), "truncated"

    def accepts(self, ratios, t):
        if self.own.reject is None:
            return True
        low, high = bounds(self.own.reject_floor, self.own.reject_cap)
        if self.own.reject == "any":
            return all(low <= ratio <= high for ratio in ratios.values())
        return low <= self.level(ratios, t, self.own.reject) <= high


PLAIN = {"weights": "none"}
CASES = {
    "as released": ({}, 5.0),
    "no weights": (PLAIN, 5.0),
    "no bounds": ({}, None),
    "TIS": ({"beyond": "truncate"}, 1.5),
    "truncated on both sides": ({"beyond": "truncate", "floor": 0.7}, 1.5),
    "IcePop": ({"floor": 0.7}, 1.5),
    "Seq-TIS": ({"weights": "product", "beyond": "truncate"}, 2.0),
    "Seq-MIS": ({"weights": "product"}, 2.0),
    "geometric, truncated": ({"weights": "geometric", "beyond": "truncate", "floor": 0.9}, 1.1),
    "geometric, masked": ({"weights": "geometric", "floor": 0.9}, 1.1),
    "Geo-RS and TIS": (
        {"beyond": "truncate", "reject": "geometric", "reject_floor": 0.9, "reject_cap": 1.1},
        2.0,
    ),
    "tokens rejected": ({**PLAIN, "reject": "token", "reject_floor": 0.7, "reject_cap": 1.4}, 5.0),
    "sequences by product": ({"reject": "product", "reject_floor": 0.2, "reject_cap": 3.0}, 5.0),
    "veto": ({"reject": "any", "reject_floor": 0.5}, 5.0),
    "bypass": ({"proximal": "sampler"}, 5.0),
    "bypass, Geo-RS": (
        {"proximal": "sampler", "reject": "geometric", "reject_floor": 0.9, "reject_cap": 1.1},
        5.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_are_those_of_float64_numpy(case):
    settings, cap = CASES[case]
    own, arrays = CorrectionConfig(**settings), batch()
    config = ObjectiveConfig(correction=own, behaviour_cap=cap)
    want = ByNumpy(own, cap).of(arrays)

    def summed(log_probs):
        total, count, metrics = policy_loss(log_probs, *arrays[1:], config)
        return total, (count, metrics)

    (total, (count, metrics)), slope = jax.value_and_grad(summed, has_aux=True)(
        jnp.asarray(arrays[0])
    )
    assert float(total) == pytest.approx(want.loss, rel=2e-5, abs=1e-5)
    # A weight of 0 stays in the count, what is rejected does not.
    assert float(count) == want.count
    slopes = np.zeros(slope.shape)
    for place, value in want.slope.items():
        slopes[place] = value
    np.testing.assert_allclose(slope, slopes, rtol=1e-4, atol=1e-5)
    told = metrics.means()
    for name, value in want.told.items():
        assert float(told[name]) == pytest.approx(value, rel=1e-4), name
    assert_it_bites(own, cap, want)


def assert_it_bites(own, cap, want):
    """What a case is about occurs, and does not befall everything."""
    told = want.told
    if own.reject:
        assert 0 < told["correction/rejected"] < 1 and want.count
    weighed = own.proximal == "learner" and own.weights != "none" and cap != 5.0
    fate = "dropped_fraction" if own.beyond == "mask" else "correction/truncated"
    if weighed and cap is not None:
        assert 0 < told[fate] < 1


def test_the_default_is_the_cap_as_it_was():
    """Token by token, masked above 5, without a lower bound, and nothing rejected."""
    learner, behaviour = jnp.array([[-9.0, 0.0, 2.0]]), jnp.zeros((1, 3))
    found = correct(learner, behaviour, jnp.ones((1, 3)), CorrectionConfig(), 5.0)
    np.testing.assert_allclose(found.factors, [[np.exp(-9.0), 1.0, 0.0]], rtol=1e-6)
    assert found.dropped.tolist() == [[False, False, True]]
    assert found.accepted.all() and not found.truncated.any()


@pytest.mark.slow
def test_rejected_sequences_leave_group_statistics():
    """Reg-GRPO's mean and deviation are over what is left of a group."""
    config = ObjectiveConfig(
        surrogate="regression",
        ratio="trajectory",
        behaviour_cap=None,
        correction=CorrectionConfig(weights="none", reject="any", reject_floor=0.5),
    )
    arrays = [x[:4].copy() for x in batch(spread=0.0)]
    arrays[2][1, arrays[4][1] > 0] += 3.0  # the sampler found its tokens 20 times as likely
    total, count, metrics = policy_loss(*arrays, config, group_size=4)
    left = [x[[0, 2, 3]] for x in arrays]
    want, fewer, _ = policy_loss(*left, config, group_size=3)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert float(count) == float(fewer)
    assert float(metrics.means()["correction/rejected_sequences"]) == 0.25


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_rejection_of_everything_is_no_step(aggregation):
    own = CorrectionConfig(reject="geometric", reject_floor=1e6)
    config = ObjectiveConfig(correction=own, aggregation=aggregation, constant_length=TOKENS)
    log_probs, *others = batch()
    slope = jax.grad(lambda x: policy_loss(x, *others, config)[0])(jnp.asarray(log_probs))
    total, count, metrics = policy_loss(log_probs, *others, config)
    assert (float(total), float(count), float(jnp.abs(slope).max())) == (0.0, 0.0, 0.0)
    told = metrics.means()
    assert float(told["correction/rejected"]) == 1 and float(told["correction/weight_mean"]) == 0
    assert all(np.isfinite(float(value)) for value in told.values())


def test_what_the_sampler_could_not_draw_is_rejected_and_not_nan():
    """Log-probabilities of -inf: of one policy, and of both."""
    learner = np.array([[-1.0, -1.0], [-np.inf, -1.0], [-1.0, -1.0]], np.float32)
    behaviour = np.array([[-np.inf, -1.0], [-np.inf, -1.0], [-1.0, -1.0]], np.float32)
    own = CorrectionConfig(reject="product", reject_floor=0.5, reject_cap=2.0)
    found = correct(jnp.asarray(learner), jnp.asarray(behaviour), jnp.ones((3, 2)), own, 5.0)
    assert found.accepted[:, 0].tolist() == [False, False, True]


# --- Caches in int8 -------------------------------------------------------------------------------

PROMPTS = [text_prompt("what is it?"), text_prompt("and where, a longer question?")]
PARAMS = initialise(QWEN.table, jax.random.key(0))


def drawn_with_int8_caches() -> list[LearnerStream]:
    """Four sequences of up to 24 tokens, two to a prompt, with the sampler's log-probabilities."""
    policy = dataclasses.replace(QWEN, cache_dtype="int8")
    pool = SlotPool(prompts=2, copies=2, prompt_tokens=64, suffix=64, page=8)
    contents = [bytes([n]) if n < 128 else b"" for n in range(VOCAB)]
    engine = Engine(policy, {"main": pool}, automata=TokenAutomata(contents, [IM_END]), pad_id=PAD)
    session = Session(engine, PARAMS)
    streams = [s for at, p in enumerate(PROMPTS) for s in session.open("main", p, [at, at + 9])]
    for stream in streams:
        session.generate(stream, [], SamplingConfig(temperature=1.0), 24)
    turns = {}
    while session.generating:
        turns |= dict(session.step())
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    return [recorded(*x) for x in zip(prompts, map(turns.get, streams), strict=True)]


def recorded(prompt, turn) -> LearnerStream:
    tokens, log_probs = np.asarray(turn.tokens, np.int32), np.asarray(turn.log_probs, np.float32)
    chosen = np.ones(len(tokens), bool)
    return LearnerStream(prompt, tokens, chosen.astype(np.float32), log_probs, (), chosen)


@pytest.mark.slow
def test_int8_caches_are_corrected_as_float64_numpy_says():
    """From the engine to the loss of a step, in rows of a prompt and two sequences."""
    streams = drawn_with_int8_caches()
    lengths = [len(p.tokens) for p in PROMPTS], [len(s.tokens) for s in streams]
    slots = max(row_starts(*lengths, 1)[1])
    sizes = {"group_size": 2, "per_row": 2, "frames": 0, "frame_patches": 0}
    rows = shared_batch(streams, slots=slots, bounds=Bounds(64, 24), pad_id=PAD, **sizes)
    rng = np.random.default_rng(0)
    rows = dataclasses.replace(rows, advantages=rng.normal(size=(4, 24)).astype(np.float32))
    own = CorrectionConfig(
        **{"weights": "product", "beyond": "truncate", "floor": 0.97},
        **{"reject": "geometric", "reject_floor": 0.99, "reject_cap": 1.0038},
    )
    config = ObjectiveConfig(correction=own, behaviour_cap=1.06)
    step = RlStep(QWEN, optax.sgd(0.0), config, 1.0, 1, 24, group_size=2)
    learner = np.asarray(jax.jit(step.log_probs)(PARAMS, rows))
    behaviour, trained = np.asarray(rows.behaviour_log_probs), rows.loss_weights > 0
    # Neither the same numbers, nor those of other tokens.
    assert 1e-3 < np.abs(learner - behaviour)[trained].max() < 0.2
    arrays = learner, learner, behaviour, rows.advantages, trained.astype(np.float32)
    total, count, metrics = policy_loss(*arrays, config)
    want = ByNumpy(own, 1.06).of(arrays)
    assert float(total / count) == pytest.approx(want.loss / want.count, rel=1e-4)
    for name, value in want.told.items():
        assert float(metrics.means()[name]) == pytest.approx(value, rel=1e-4), name
    assert 0 < want.told["correction/rejected"] < 1 and want.told["correction/truncated"]


# --- What each method would do to a run -----------------------------------------------------------


def test_a_run_is_read_back_and_methods_compared(tmp_path):
    """`benchmarks/correction.py`: two rollouts, of which one token is 8 times as likely now."""
    for folder in (FOLDER, DETAILS):
        (tmp_path / folder).mkdir()
    drawn = {
        "generated": [0, 1, 1, 1],
        "chosen": [0, 1, 0, 1],
        "log_probs": [0.0, -1.0, -9.0, -3.0],
    }
    learner = [[-1.0, 0.0, -3.0], [-1.0, 0.0, round(-3.0 + math.log(8), 5)]]
    for step in (0, 1):
        name = f"step_{step:06d}.jsonl"
        told = [json.dumps({"values": {"log_probs": values}}) for values in learner]
        (tmp_path / DETAILS / name).write_text("\n".join(told))
        (tmp_path / FOLDER / name).write_text("\n".join([json.dumps(drawn)] * 2))
    assert len(list(correction.sequences(tmp_path, 0))) == 4
    pairs = list(correction.sequences(tmp_path, 1))
    lines = correction.table(pairs).splitlines()
    assert len(lines) == 2 + len(correction.METHODS)
    rows = {name.strip(): cells for _, name, *cells, _ in (line.split("|") for line in lines[2:])}
    shares = {name: [x.strip() for x in cells] for name, cells in rows.items()}
    assert shares["as released"] == ["0.2500, 0.5000", "0.0000, 0.0000", "0.0000, 0.0000", "0.7500"]
    assert shares["TIS"][:2] == ["0.0000, 0.0000", "0.2500, 0.5000"]
    assert shares["Seq-MIS"][0] == "0.5000, 0.5000"
    assert shares["Geo-RS, TIS"][2] == "0.5000, 0.5000"
    assert shares["veto"][2] == "0.0000, 0.0000"


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"reject": "any"}, r"\.reject=any has nothing to reject by; set .*reject_floor"),
        ({"reject": "any", "reject_floor": 2, "reject_cap": 1}, r"\.reject_floor=2 is above"),
        ({"floor": 6.0}, r"\.correction\.floor=6 is above .*\.behaviour_cap=5"),
        ({"floor": 0.0}, r"\.floor=0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, named):
    with pytest.raises(Refused, match=named):
        ObjectiveConfig(correction=CorrectionConfig(**settings))


def test_truncation_needs_a_bound():
    own = CorrectionConfig(beyond="truncate")
    with pytest.raises(Refused, match=r"beyond=truncate has nothing to truncate at; set .*cap"):
        ObjectiveConfig(correction=own, behaviour_cap=None)
    ObjectiveConfig(correction=dataclasses.replace(own, floor=0.5), behaviour_cap=None)


BYPASS = "objective.correction.proximal=sampler"


@pytest.mark.parametrize(
    "settings",
    [
        [BYPASS, "objective.behaviour_cap=5"],
        [BYPASS, "objective.correction.weights=token"],
        [BYPASS, "objective.correction.floor=0.5"],
        ["objective.correction.weights=none", "objective.behaviour_cap=2"],
        ["objective.correction.weights=none", "objective.correction.beyond=truncate"],
        ["objective.correction.reject_cap=2"],
    ],
)
def test_what_does_not_act_is_refused_by_name(settings):
    with pytest.raises(ValueError) as refusal:
        override(get_recipe("needle_rl"), settings)
    assert str(refusal.value).startswith(f"{settings[-1]} has no effect ")


def test_with_ratios_to_the_sampler_clips_act_in_a_single_update():
    with pytest.raises(ValueError, match=r"or objective\.correction\.proximal=sampler"):
        override(get_recipe("needle_rl"), ["objective.clip_high=0.28"])
    config = override(get_recipe("needle_rl"), [BYPASS, "objective.clip_high=0.28"])
    assert config.ratio_moves and not config.objective.computes_proximal(config.rl.updates)
    several = based_on(get_recipe("needle_rl"), {"rl.epochs": 2})
    assert several.ratio_moves and several.objective.computes_proximal(several.rl.updates)
