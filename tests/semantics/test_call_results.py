"""What a rollout's record says of its calls: what was looked at, by whom, and what came of it."""

from tests.support.scripted_episode import ANSWER, Episode, call, calls_turn
from train.report.rollouts import calls_of

LAST = calls_turn(call(0, 8))


def test_results_stand_beside_their_calls():
    """A sub-agent is found again although a call before it failed and a turn before had some."""
    made = Episode(
        calls_turn(call(0, 8), call(90, 99), call(16, 80)),
        calls_turn("<tool_call>no JSON</tool_call>", call(8, 16)),
        ANSWER,
        max_tool_rounds=2,
    ).trajectory
    told = [(turn, result) for turn, _, result in calls_of(made)]
    assert [turn for turn, _ in told] == [1, 1, 1, 2, 2]
    results = [result for _, result in told]
    assert [own.executed for own in results] == [True, False, True, False, True]
    assert [own.window for own in results] == [(0, 8), None, (16, 64), None, (8, 16)]
    assert [own.subagent for own in results] == [0, None, 1, None, 2] and len(made.subagents) == 3
    assert results[1].text.startswith("Error: start_time 90") and results[0].text == "seen."
    assert all(own.seconds >= 0 for own in results) and results[0].seconds > 0


def test_calls_of_the_last_turn_have_no_result():
    made = Episode(calls_turn(call(0, 8)), LAST, max_tool_rounds=1, answer_tokens=200).trajectory
    assert made.over_turn and [result is None for *_, result in calls_of(made)] == [False, True]


def test_frames_that_the_agent_itself_is_shown_are_kept():
    made = Episode(calls_turn(call(0, 8)), ANSWER, evidence="frames").trajectory
    ((_, _, result),) = calls_of(made)
    assert result.text == "" and result.window == (0, 8) and result.subagent is None
    assert result.clip is not None and len(result.clip.times)
