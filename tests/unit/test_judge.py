"""A judge behind a real HTTP server: what it says counts, and what it does wrong costs F1 only."""

import time

import pytest

from paravt_jax.records import RolloutGroup, Row, VideoRef
from paravt_jax.rewards import JudgeSettings, RewardRules, open_judge, score
from paravt_jax.rewards.judge import JudgeError, verdict
from tests.support.judge_server import completion
from tests.support.trajectories import trajectory
from train.recipes import get_recipe
from train.rl.scoring import Scorer
from train.settings.override import override

F1 = 2 / 3
"""Of "red door" against "door"."""
ANSWER = "<think>\nThe clip shows a door.\n</think>\n<answer>red door</answer><|im_end|>"
KEY = "sk-only-in-the-environment"


def judged(judge):
    rules = RewardRules(mode="llm")
    return score(ANSWER, "door", rules=rules, question="What is red?", judge=judge).accuracy


@pytest.mark.parametrize(
    ("status", "body", "accuracy", "calls"),
    [
        (200, completion("1.0"), 1.0, 1),
        (200, completion("0.5"), 0.5, 1),
        (200, completion("Verdict: 0.0."), 0.0, 1),
        (200, completion("<think>0 or 1?</think>\n1"), 1.0, 1),
        (200, completion("7"), F1, 1),
        (200, completion("-1"), F1, 1),
        (200, completion("I cannot tell"), F1, 1),
        (200, completion(None), F1, 1),
        (200, b"<html>gateway</html>", F1, 3),
        (200, b"[" * 100_000, F1, 3),
        (200, b'{"choices": []}', F1, 3),
        (200, b"", F1, 3),
        (500, b"", F1, 3),
        (401, b"", F1, 1),
        (302, b"", F1, 1),
    ],
)
def test_what_the_judge_says_counts_and_all_else_is_f1(serve, status, body, accuracy, calls):
    service = serve(lambda *_: (status, body, 0))
    judge = open_judge(service.settings())
    assert judged(judge) == pytest.approx(accuracy)
    found = judge.metrics()
    assert found["judge/calls"] == calls == len(service.requests)
    assert found["judge/failures"] == (accuracy == F1)
    assert set(judge.metrics().values()) == {0.0}


@pytest.mark.parametrize("pause", [30.0, 0.1], ids=["silent", "dripping"])
def test_a_judge_that_hangs_costs_its_time_limit(serve, pause):
    """A server that sends a byte now and then never runs into the time-out of a socket."""
    service = serve(lambda *_: (200, completion("1.0"), pause))
    judge = open_judge(service.settings(timeout=0.3, retries=1))
    began = time.monotonic()
    assert judged(judge) == pytest.approx(F1)
    assert 0.6 <= time.monotonic() - began < 8.0
    found = judge.metrics()
    assert (found["judge/calls"], found["judge/failures"]) == (2.0, 1.0)
    assert 0.6 <= found["judge/seconds"] < 8.0


def test_nobody_listens(serve):
    service = serve(lambda *_: (200, b"", 0))
    settings = service.settings()
    service.server_close()
    assert judged(open_judge(settings)) == pytest.approx(F1)


def test_trouble_that_passes_is_survived(serve):
    service = serve(lambda _, number: ((503, b"", 0), (200, completion("1"), 0))[number > 2])
    judge = open_judge(service.settings())
    assert judged(judge) == 1.0
    assert judge.metrics()["judge/calls"] == 3


def test_the_request_is_a_chat_completion(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    service = serve(lambda *_: (200, completion("1"), 0))
    settings = service.settings(key_variable="JUDGE_KEY", temperature=0.3)
    assert judged(open_judge(settings)) == 1.0
    ((path, headers, body),) = service.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.3, 8)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert "What is red?" in message["content"] and "red door" in message["content"]
    assert KEY not in repr(settings)


def test_the_key_is_in_no_error(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY + "\nX: y")
    settings = serve(lambda *_: (200, b"", 0)).settings(key_variable="JUDGE_KEY")
    with pytest.raises(ValueError, match="JUDGE_KEY") as error:
        open_judge(settings)
    assert KEY not in str(error.value)


def test_a_failure_is_not_remembered(serve):
    service = serve(lambda _, number: ((404, b"", 0), (200, completion("1"), 0))[number > 1])
    judge = open_judge(service.settings())
    with pytest.raises(JudgeError, match="404"):
        judge("m")
    assert judge("m") == judge("m") == "1"
    assert len(service.requests) == 2


# --- In a run -------------------------------------------------------------------------------------


def groups_of(*answers):
    """One group per answer, each with two equal rollouts of it."""
    groups = []
    for number, answer in enumerate(answers):
        row = Row(str(number), VideoRef("v.mp4", 8.0), "What is it?", "door", "oe")
        rollout = trajectory(ANSWER.replace("red door", answer))
        groups.append(RolloutGroup(row, 4, (rollout, rollout)))
    return groups


def test_a_batch_is_asked_side_by_side_and_equal_messages_once(serve):
    def behave(body, _):
        time.sleep(0.1)
        return 200, completion("0.5" if "gate" in body["messages"][0]["content"] else "1"), 0

    service = serve(behave)
    rules = RewardRules(mode="llm", judge=service.settings(concurrency=4))
    scorer = Scorer(rules)
    scored = scorer(groups_of("a gate", "an exit", "a hatch", "the door"))
    accuracies = [[t.rewards["accuracy"] for t in g.trajectories] for g in scored]
    assert accuracies == [[0.5, 0.5], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert 1 < service.most_busy <= 4
    metrics = scorer.metrics
    assert (metrics["judge/calls"], metrics["judge/cached"]) == (3.0, 3.0)
    assert metrics["judge/seconds"] >= 0.1
    scorer(groups_of("a gate"))
    assert (scorer.metrics["judge/calls"], scorer.metrics["judge/cached"]) == (0.0, 2.0)


def test_failures_are_said_and_counted(serve, caplog):
    service = serve(lambda *_: (400, b"", 0))
    scorer = Scorer(RewardRules(mode="llm", judge=service.settings()))
    (group,) = scorer(groups_of("red door"))
    assert group.trajectories[0].rewards["accuracy"] == pytest.approx(F1)
    assert scorer.metrics["judge/failures"] >= 1
    assert "F1 decides" in caplog.text and "status 400" in caplog.text


def test_other_modes_have_no_judge():
    scorer = Scorer(RewardRules())
    (group,) = scorer(groups_of("red door"))
    assert group.trajectories[0].rewards["accuracy"] == pytest.approx(F1)
    assert scorer.metrics == {}


URL, MODEL = "rewards.judge.url=http://localhost:1/v1", "rewards.judge.model=m"


def test_a_run_can_have_a_judge():
    config = override(get_recipe("needle_rl"), ["rewards.mode=llm", URL, MODEL])
    assert config.rewards.judge.url == "http://localhost:1/v1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["rewards.mode=llm"], "judge.url and rewards.judge.model"),
        (["rewards.mode=llm", URL], "judge.url and rewards.judge.model"),
        (["rewards.mode=llm", MODEL, "rewards.judge.url=localhost:1"], "http://"),
        (["rewards.mode=llm", MODEL, "rewards.judge.url=http://h:port/v1"], "http://"),
        (["rewards.mode=llm", MODEL, "rewards.judge.url=http://u:secret@h/v1"], "key_variable"),
        ([URL, MODEL], "set rewards.mode=llm"),
        (["rewards.mode=llm", URL, MODEL, "rewards.judge.timeout=0"], "judge.timeout"),
        (["rewards.mode=llm", URL, MODEL, "rewards.judge.concurrency=0"], "judge.concurrency"),
        (["rewards.mode=llm", URL, MODEL, "rewards.judge.retries=-1"], "judge.retries"),
        (["rewards.mode=llm", URL, MODEL, "rewards.judge.backoff=inf"], "judge.backoff"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(settings, named):
    with pytest.raises(ValueError, match=named) as error:
        override(get_recipe("needle_rl"), settings)
    assert "secret" not in str(error.value)


def test_a_missing_key_is_refused(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    settings = JudgeSettings(url="http://localhost:1", model="m", key_variable="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        Scorer(RewardRules(mode="llm", judge=settings))


@pytest.mark.parametrize(
    ("reply", "value"),
    [("1", 1.0), (".5", 0.5), ("Score: 0.25 of 1", 0.25), ("1.01", None), ("", None), ("٣", None)],
)
def test_verdicts(reply, value):
    assert verdict(reply) == value
