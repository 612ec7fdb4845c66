"""What a teacher is told: by the rewards, or by a judge behind a real HTTP server."""

import dataclasses

import pytest

from paravt_jax.records import Row, VideoRef
from paravt_jax.rewards import JudgeSettings
from tests.support.judge_server import completion
from tests.support.trajectories import ANSWER, trajectory
from train.methods.hindsight import hindsight, open_feedback, read_feedback

ROW = Row("0", VideoRef("v.mp4", 8.0), "What colour?", "teal", "oe", ((2.0, 3.5), (6.0, 8.0)))


def attempt(accuracy: float, form: float):
    rewards = {"accuracy": accuracy, "format": form}
    return ROW, dataclasses.replace(trajectory(ANSWER), rewards=rewards)


def test_a_hint_holds_answer_evidence_and_feedback():
    words = hindsight(ROW, "Look later.")
    for told in ("answer: teal", "seconds 2 to 3.5, 6 to 8", "Look later."):
        assert told in words
    assert "seconds" not in hindsight(dataclasses.replace(ROW, evidence=()), "Look later.")


def test_feedback_from_rewards():
    tell = open_feedback(JudgeSettings())
    assert tell([attempt(1.0, 1.0), attempt(0.4, 1.0), attempt(0.0, 0.5)]) == [
        "The answer is right, and the form is kept.",
        "The answer is partly right, and the form is kept.",
        "The answer is wrong, and the form is not kept.",
    ]


@pytest.mark.parametrize(
    ("reply", "feedback"),
    [
        ('{"feedback": " Too early. "}', "Too early."),
        ('<think>{"feedback": "no"}</think>Sure:\n{"feedback": "Too early."}', "Too early."),
        ('{"feedback": "' + "x" * 2000 + '"}', "x" * 1000),
        ('{"feedback": ""}', None),
        ('{"feedback": 3}', None),
        ('{"verdict": "right"}', None),
        ('["feedback"]', None),
        ("Too early.", None),
        ("{" * 5000 + "}", None),
    ],
)
def test_reading_a_judges_reply(reply, feedback):
    assert read_feedback(reply) == feedback


def test_a_judge_reads_the_reply_and_a_silent_one_is_replaced(serve):
    def behave(request, number):
        said = request["messages"][0]["content"]
        assert "Verified answer: teal" in said and "2 to 3.5, 6 to 8" in said
        if "right" in said.partition("Reply to be assessed")[2].partition("Say in")[0]:
            return 200, completion("I would rather not."), 0
        return 200, completion('{"feedback": "It saw red, not teal."}'), 0

    tell = open_feedback(dataclasses.replace(serve(behave).settings(), max_tokens=99))
    row, rollout = attempt(0.0, 1.0)
    other = dataclasses.replace(rollout, scored_text="This is right.")
    assert tell([(row, rollout), (row, other)]) == [
        "It saw red, not teal.",
        "The answer is wrong, and the form is kept.",
    ]
