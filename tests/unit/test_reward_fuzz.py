"""Random and mutated completions through the rewards of every scheme: nothing raises, and no term
leaves the range that its scheme documents.

`make test` draws a few thousand; the study draws 100,000 for each scheme:
`python -m pytest tests/unit/test_reward_fuzz.py -m study`.
"""

import builtins
import math
import random

import pytest

from paravt_jax.protocol import STRUCTURAL_TAGS, SYNTAXES
from paravt_jax.rewards import RewardRules, ranges, scheme_names, score

THINK = "<think>At <t>5</t>s the <obj>door</obj><box>[1,2,3,4]</box> opens.</think>"
CALL = (
    '<tool_call>{"name": "crop_video", "arguments": {"start_time": 1, "end_time": 5}}</tool_call>'
)
GROUNDING = (
    '<grounding>{"temporal_segment": [1, 5.5], "sampling_strategy": "fine"}</grounding><|im_end|>'
)
WHOLE = (
    f"{THINK}\n{CALL}<|im_end|>{THINK}<answer>B. From <t>2</t>s to <t>6</t>s</answer><|im_end|>",
    f"{THINK}{GROUNDING}{THINK}\n{GROUNDING}{THINK}\n<answer>(B) the door</answer><|im_end|>",
    f"{THINK}{CALL}{CALL}<|im_end|>{THINK}<answer>the red door</answer>",
    f"{THINK}<answer>0:36 to 1 min 40 s</answer>",
    "The answer is B, between 3 and 1e3 seconds.",
)
PIECES = (
    *STRUCTURAL_TAGS,
    *("<grounding>", "</grounding>", "<tool_code>crop_video(1, 2)</tool_code>", "<tool_response>"),
    *("<|im_end|>", "<|im_start|>", "<t>", "</t>s", "<obj>", "<box>", "\n", " ", "door", "the"),
    *("B", "(C)", "answer is ", "-", ",", "to", ":", ".", "0", "7", "36.5", "1e309", "9" * 400),
    *('{"', '"}', "[", "]", "{", "null", "NaN", "-1", "\0", "\ud800", "é", "٣", "½", "🎬"),
    *('"temporal_segment": ', '"sampling_strategy": "coarse"', '"start_time": "1:05"', "[" * 200),
)
KINDS = ("oe", "mcq", "tvg", "counting", "clue_single_wo_tool", "temporal_grounding")
TRUTHS = ("B", "door", "the red door", "4, 8", "1:05 - 1:30", "", "A", "nobody knows", "1e9, 1e10")
SPANS = (
    (),
    ((4.0, 8.0),),
    ((40.0, 90.0),),
    ((4.0, 4.0), (1e6, 2e6)),
    ((0.0, 1e-300), (3.0, 9.0)),
    ((8.0, 4.0),),
)


def rules_of(scheme):
    """The settings of a scheme that change what is computed."""
    variants = [{}, {"format_weight": 0.25}]
    variants += {
        "paravt": [
            {"anchor_weight": 7.0, "mode": "precise", "fresh_seconds": 1.0},
            {"answer_suffix": False, "mode": "exact"},
        ],
        "longvt": [{"window_term": "recall"}, {"compat": "reference"}],
        "vital": [
            {"grounded": True, "fresh_seconds": 1.0},
            {"grounded": True, "compat": "reference"},
        ],
        "deepvideo_r1": [{"grounded": True}],
        "video_o3": [{"mode": "exact"}, {"compat": "reference"}],
        "visd": [{"grounded": True}],
    }.get(scheme, [])
    return [RewardRules(scheme=scheme, **variant) for variant in variants]


def completion(draw):
    """A whole rollout with a few cuts, swaps and insertions, or pieces in any order."""
    if draw.random() < 0.3:
        return "".join(draw.choices(PIECES, k=draw.randrange(30)))
    text = draw.choice(WHOLE)
    for _ in range(draw.randrange(5)):
        here, there = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        middle = draw.choice(
            (text[here:there] * 2, "", draw.choice(PIECES), text[here:there][::-1])
        )
        text = text[:here] + middle + text[there:]
    return text


def check(scheme, count, seed):
    """`count` completions through one scheme; returns how often each term was above 0."""
    draw, variants = random.Random(f"{scheme} {seed}"), rules_of(scheme)
    allowed = [ranges(rules) for rules in variants]
    seen = dict.fromkeys(allowed[0], 0)
    for _ in range(count):
        text, which = completion(draw), draw.randrange(len(variants))
        terms = score(
            text,
            draw.choice(TRUTHS),
            draw.choice(KINDS),
            variants[which],
            executed_calls=draw.choice((None, 0, 1, 3)),
            call_syntax=draw.choice(tuple(SYNTAXES)),
            evidence=draw.choice(SPANS),
            progress=draw.random(),
        ).as_dict()
        assert set(terms) == set(allowed[which]), text
        for name, value in terms.items():
            low, high = allowed[which][name]
            inside = low - 1e-9 <= value <= high + 1e-9 and math.isfinite(value)
            assert inside, f"{name}={value} is outside [{low}, {high}] for {text!r}"
            seen[name] = seen.get(name, 0) + (value > 0)
    return seen


@pytest.fixture
def no_files(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"a reward opens {arguments}")

    monkeypatch.setattr(builtins, "open", refuse)


@pytest.mark.parametrize("scheme", scheme_names())
def test_no_text_raises_or_leaves_its_range(scheme, no_files):
    seen = check(scheme, count=1_000, seed=0)
    constant = {"paravt": set(), "deepvideo_r1": {"tool"}, "visd": {"tool"}}.get(scheme, set())
    constant |= {"anchor"} if scheme != "paravt" else set()
    assert all(seen[name] or name in constant for name in seen), "the texts reach every term"


@pytest.mark.study
@pytest.mark.parametrize("scheme", scheme_names())
def test_100_000_texts(scheme, no_files):
    check(scheme, count=100_000, seed=1)
