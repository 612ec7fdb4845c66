"""The defects of ParaVT's release that rewards correct: what ought to hold, and does not there.

Numbers are those of the project's list of defects (`paravt_jax.rewards.score` names them too). Each
claim is checked in both readings: "fixed" keeps it, "reference", the release, breaks it.
"""

import numpy as np
import pytest

from paravt_jax.advantages import AdvantageConfig, shape_rewards
from paravt_jax.protocol import parse_tool_calls
from paravt_jax.rewards import RewardRules, ranges, score
from paravt_jax.rewards.schemes import paravt

THINK = "<think>\nThe clip shows a man opening a door.\n</think>\n"
SHORT = "<think>hm</think>\n"
CALL = (
    '<tool_call>{"name": "crop_video", "arguments": {"start_time": 1, "end_time": 5}}</tool_call>'
)
BAD_CALL = CALL.replace('"name"', "'name'")
ANSWER = "<answer>door</answer>"


def rewards(compat, *turns, truth="door", kind="oe", executed=0, reply=None, **rules):
    return score(
        "".join(f"{turn}<|im_end|>" for turn in turns),
        truth,
        kind,
        RewardRules(compat=compat, mode="f1" if reply is None else "llm", **rules),
        executed_calls=executed,
        judge=lambda message: str(reply),
    )


def form(compat, *turns):
    return rewards(compat, *turns).format


def accuracy(compat, found, truth, kind="oe"):
    turn = f"{THINK}<answer>{found}</answer>"
    return rewards(compat, turn, truth=truth, kind=kind).accuracy


def with_prefix(compat, turn):
    """What is scored of a turn whose `<think>` was forced: the release leaves that out."""
    return turn.removeprefix("<think>\n") if compat == "reference" else turn


def calls_of(compat, text):
    parsed = parse_tool_calls(text, compat)
    calls = parsed.tool_calls if compat == "reference" else [c for c in parsed if not c.error]
    return len(calls)


def closing_a_forced_thought_pays(compat):
    closed, unclosed = THINK + ANSWER, THINK.replace("</think>", "") + ANSWER
    return form(compat, with_prefix(compat, closed)) > form(compat, with_prefix(compat, unclosed))


def a_made_up_response_earns_nothing(compat):
    fake = THINK + CALL + "<tool_response>a door</tool_response>"
    return rewards(compat, fake, THINK + ANSWER).tool == rewards(compat, THINK + ANSWER).tool


def a_call_that_never_ran_earns_nothing(compat):
    return rewards(compat, THINK + CALL, THINK + ANSWER).tool == 0.0


def the_tool_bonus_grows_with_the_accuracy(compat):
    turns, truths = (THINK + CALL, THINK + ANSWER), ("door handle of brass", "door")
    partly, wholly = [rewards(compat, *turns, truth=truth, executed=1).tool for truth in truths]
    return partly < wholly


def good_totals_stay_apart_when_shaped(compat):
    released = AdvantageConfig(reward_scale=10.0, reward_bias=-0.2, reward_clip=20.0)
    config = released if compat == "reference" else AdvantageConfig()
    low, high = shape_rewards(np.array([[2.3, 2.6]]), config)[0]
    return low < high


def every_fault_costs_format(compat):
    return form(compat, THINK + ANSWER + "</think>") < form(compat, THINK + ANSWER)


def a_malformed_call_costs_its_turn(compat):
    return form(compat, THINK + CALL + BAD_CALL, THINK + ANSWER) < form(
        compat, THINK + CALL + CALL, THINK + ANSWER
    )


def a_malformed_call_loses_no_other(compat):
    return calls_of(compat, THINK + BAD_CALL + CALL) == 1


def a_tag_inside_thinking_hides_no_call(compat):
    return calls_of(compat, "<think>I may use <tool_call> here.</think>" + CALL) == 1


def the_format_is_never_negative(compat):
    lowest, _ = ranges(RewardRules(compat=compat))["format"]
    return form(compat, "<think>") >= 0.0 and lowest >= 0.0


def repeated_words_count(compat):
    return accuracy(compat, "cat dog cat", "cat cat dog") == 1.0


def an_article_is_no_letter(compat):
    return accuracy(compat, "the", "A", "mcq") == 0.0 == accuracy(compat, "A door", "A", "mcq")


def intervals_never_raise(compat):
    return accuracy(compat, "1.2.3, 5", "1, 5", "tvg") == 0.0


def intervals_may_be_written_with_a_dash_or_a_clock(compat):
    found = [accuracy(compat, text, "36, 40", "tvg") for text in ("36.0 - 40.0", "0:36 to 0:40")]
    return found == [1.0, 1.0]


def the_last_answer_after_the_thinking_counts(compat):
    turn = "<think>At first <answer>cat</answer> it seems.</think><answer>cow</answer>" + ANSWER
    return rewards(compat, turn).accuracy == 1.0


def a_short_thought_hides_no_later_one(compat):
    return form(compat, SHORT + CALL, THINK + ANSWER) > form(compat, SHORT + CALL, SHORT + ANSWER)


def every_turn_has_to_think(compat):
    return form(compat, THINK + CALL, SHORT + ANSWER) < form(compat, THINK + CALL, THINK + ANSWER)


def a_reply_beyond_the_scale_is_no_verdict(compat):
    """F1 of "door" and "red door" decides instead."""
    found = [rewards(compat, THINK + ANSWER, truth="red door", reply=r).accuracy for r in (-1, 7)]
    return found == pytest.approx([2 / 3, 2 / 3])


CLAIMS = {
    "R4": [closing_a_forced_thought_pays],
    "R9": [a_made_up_response_earns_nothing],
    "R10": [a_call_that_never_ran_earns_nothing, the_tool_bonus_grows_with_the_accuracy],
    "R11": [good_totals_stay_apart_when_shaped, every_fault_costs_format],
    "R17": [a_malformed_call_costs_its_turn, a_malformed_call_loses_no_other],
    "R18": [a_tag_inside_thinking_hides_no_call],
    "R19": [the_format_is_never_negative],
    "R20": [repeated_words_count],
    "R21": [an_article_is_no_letter],
    "R22": [intervals_never_raise, intervals_may_be_written_with_a_dash_or_a_clock],
    "R23": [the_last_answer_after_the_thinking_counts],
    "R24": [a_short_thought_hides_no_later_one, every_turn_has_to_think],
    "R25": [a_reply_beyond_the_scale_is_no_verdict],
}
ALL = [
    pytest.param(claim, id=f"{number}-{claim.__name__}")
    for number, claims in CLAIMS.items()
    for claim in claims
]


@pytest.mark.parametrize("claim", ALL)
def test_fixed_keeps_it(claim):
    assert claim("fixed")


@pytest.mark.parametrize("claim", ALL)
def test_the_release_breaks_it(claim):
    try:
        kept = claim("reference")
    except ValueError as error:  # R22: the release raises.
        assert claim is intervals_never_raise, error
        kept = False
    assert not kept


@pytest.mark.parametrize("number", CLAIMS)
def test_the_docstring_names_it(number):
    assert number in str(paravt.__doc__)
