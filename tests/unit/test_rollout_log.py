"""What a run keeps of its rollouts for people: calls with verdicts, values of tokens, small frames,
within a bound on bytes."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from paravt_jax.records import CallResult, Clip, ToolCall
from pipelines.preprocess import ImageSpec, VideoSpec, from_patches, to_patches
from tests.support.rollout_fakes import SPECIAL
from tests.support.scripted_rollouts import ROW, SPEC, as_state, configured, group, learner, rollout
from train.report.rollouts import RolloutLog, details_of, pieces, write_rollouts
from train.report.sheets import Sheet
from train.rl.token_values import OfRollouts

CONTENTS = [*(bytes([index]) for index in range(128)), *(name.encode() for name in SPECIAL)]
GOLD = dataclasses.replace(ROW, evidence=((10.0, 14.0),))
ANSWER = "<think>red</think><answer>red</answer>"


@pytest.mark.parametrize("spec", [ImageSpec().limited(1024, 9216), VideoSpec().limited(1024, 9216)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_frames_come_back_from_patches(spec, count):
    frames = np.random.default_rng(0).integers(0, 256, (count, 32, 64, 3), np.uint8)
    again = from_patches(to_patches(frames, spec), spec, count)
    np.testing.assert_array_equal(np.stack(again), frames)


def test_pieces_of_tokens_are_the_text():
    """A character of several tokens stands at its last one; what is broken is told so."""
    contents = [b"a", "é".encode()[:1], "é".encode()[1:], b"<think>"]
    assert pieces(np.array([0, 1, 2, 3]), contents) == ["a", "", "é", "<think>"]
    assert pieces(np.array([0, 1]), contents) == ["a", "\ufffd"]


def called(*results: CallResult, start: float = 0.0, end: float = 8.0):
    """A rollout whose first turn makes a call for each result, and whose last one too."""
    made = rollout("calls", ANSWER, responses=("seen",), subagents=("red",))
    calls = tuple(ToolCall("crop_video", {"start_time": start, "end_time": end}) for _ in results)
    first = dataclasses.replace(made.turns[0], calls=calls, results=results)
    last = dataclasses.replace(made.turns[1], calls=calls[:1])
    return dataclasses.replace(made, turns=(first, last), rewards={"total": 1.0})


def lines(folder, row, *rollouts):
    write_rollouts(folder, 3, [group(*rollouts, row=row)])
    return list(map(json.loads, (folder / "step_000003.jsonl").read_text().splitlines()))


def test_calls_are_told_with_what_they_saw(tmp_path):
    made = called(
        CallResult("a report", True, (8.0, 12.0), 0.5, subagent=0),
        CallResult("nothing", True, (20.0, 24.0)),
        CallResult("Error: too many", False),
    )
    (line,) = lines(tmp_path, GOLD, made)
    told = line["tool_calls"]
    assert [own["verdict"] for own in told] == ["hit", "miss", "invalid", "invalid"]
    assert [own["turn"] for own in told] == [1, 1, 1, 2]
    assert told[0]["gold_seen"] == 0.5 and told[0]["iou"] == pytest.approx(2 / 6, abs=1e-4)
    assert told[0]["subagent_tokens"] == 3 and told[0]["seconds"] == 0.5
    assert told[2]["window"] == [0.0, 8.0], "as asked, where nothing was looked at"
    assert line["gold"] == [[10.0, 14.0]] and line["said"] == "red"


def test_nobody_calls_a_miss_what_has_no_gold(tmp_path):
    (line,) = lines(tmp_path, ROW, called(CallResult("a report", True, (8.0, 12.0))))
    assert [own["verdict"] for own in line["tool_calls"]] == ["ran", "invalid"]


def test_a_sheet_holds_each_set_of_frames_once():
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    frames[17, ..., 0] = 255
    sheet, patches = Sheet(SPEC), to_patches(frames, SPEC)
    first = sheet.add(patches, np.arange(20.0))
    assert sheet.add(patches, np.arange(20.0)) is first
    assert sheet.add(to_patches(frames[:1], SPEC), np.zeros(1))["first"] == 20
    data, lie = sheet.jpeg()
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert picture.shape == (64, 512, 3) and (lie["columns"], lie["rows"]) == (16, 2)
    row, column = divmod(17, lie["columns"])
    red = picture[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
    assert red[..., 0].mean() > 240 and red[..., 1].mean() < 15


def test_details_hold_values_of_generated_tokens_and_frames():
    made, other = rollout(ANSWER, prefix="<think>"), rollout(ANSWER, seed=1)
    values = OfRollouts({"advantages": np.arange(200.0).reshape(1, 200)}, {id(made): 0})
    shown = _image()
    made = _with_prompt(made, shown)
    values = OfRollouts({"advantages": np.arange(200.0).reshape(1, 200)}, {id(made): 0})
    told, jpeg = details_of(group(made, other), "s.jpg", CONTENTS, SPEC, values)
    assert "".join(told[0]["pieces"]) == made.full_text
    first = int(np.flatnonzero(made.generated)[0])
    assert told[0]["values"]["advantages"][0] == first == len("<think>")
    assert len(told[0]["values"]["advantages"]) == made.generated.sum()
    assert told[1]["values"] == {}, "not learned from"
    assert told[0]["overview"] == {"first": 0, "times": [0.0, 1.0]} and jpeg


def test_frames_of_calls_are_on_the_sheet_whoever_was_shown_them():
    """Those of a sub-agent's prompt, and those in the agent's own context."""
    looked, clip = _image(), Clip(8.0, 12.0, np.array([8.0, 10.0]), _image())
    made = called(
        CallResult("seen", True, (8.0, 12.0), subagent=0), CallResult("", True, clip=clip)
    )
    made = dataclasses.replace(made, subagents=(_with_prompt(made.subagents[0], looked),))
    (line,), jpeg = details_of(group(made), "s.jpg", CONTENTS, SPEC, lambda _: {})
    assert line["crops"] == [
        {"first": 0, "times": [0.0, 1.0]},
        {"first": 2, "times": [8.0, 10.0]},
        None,
    ]
    assert jpeg and line["sheet"]["file"] == "s.jpg" and line["overview"] is None


def _image():
    return to_patches(np.full((2, 32, 32, 3), 99, np.uint8), SPEC)


def _with_prompt(made, patches):
    prompt = dataclasses.replace(made.prompt, patches=patches, times=(np.array([0.0, 1.0]),))
    return dataclasses.replace(made, prompt=prompt)


def log(folder, room, steps=10):
    return RolloutLog(folder, steps, room, CONTENTS, SPEC)


def test_details_keep_within_their_room_and_cover_the_run(tmp_path):
    made = _with_prompt(rollout(ANSWER), _image())
    made = dataclasses.replace(made, rewards={"total": 1.0})

    def write(folder, room, *steps):
        for step in steps:
            log(folder, room)(step, [group(made)], lambda: lambda _: {})
        found = sorted((folder / "details").glob("step_*"))
        assert sum(path.stat().st_size for path in found) <= room
        return sorted({int(path.name[5:11]) for path in found})

    write(tmp_path / "one", 1e9, 0)
    size = sum(p.stat().st_size for p in (tmp_path / "one" / "details").iterdir())
    assert write(tmp_path / "all", 100 * size, *range(10)) == list(range(10))
    half = write(tmp_path / "half", 5.5 * size, *range(10))
    assert half == [0, 2, 4, 6, 8]
    assert write(tmp_path / "half", 5.5 * size, *range(4, 10)) == half, "a resume repeats them"
    assert write(tmp_path / "none", 0.9 * size, *range(10)) == []
    assert len(list((tmp_path / "none" / "rollouts").iterdir())) == 10


def scored_groups():
    terms = {"accuracy": 0.0, "format": 1.0, "tool": 0.0, "anchor": 0.5}
    made = [rollout(ANSWER, seed=n) for n in range(2)]
    rewards = [{**terms, "total": float(n), "task": float(n)} for n in range(2)]
    return [group(*(dataclasses.replace(t, rewards=r) for t, r in zip(made, rewards, strict=True)))]


def learned(*settings):
    """A learner after one step, the batch of it, the weights before it and after."""
    own = learner(configured(*settings))
    state = as_state(jax.tree.map(lambda x: x + 0, own._reference))
    batch, _ = own.prepare(state, scored_groups())
    expected = own._log_probs(state.params, batch, None)
    state, _ = own.update(state, batch)
    return own, batch, expected, state.params


@pytest.mark.slow
@pytest.mark.parametrize("updates", [(), ("rl.epochs=2",)])
def test_a_learner_keeps_what_it_made_of_tokens(updates):
    """Its log-probabilities before the first update, advantages and the anchor's part of them;
    it learns the same as one that keeps nothing."""
    own, batch, expected, params = learned("output.details_mb=1", *updates)
    groups = scored_groups()
    second = groups[0].trajectories[1]
    found, size = own.of_tokens.of_rollouts(groups)(second), len(second.tokens)
    np.testing.assert_allclose(found["log_probs"], expected[1, :size], atol=1e-6)
    np.testing.assert_array_equal(found["advantages"], batch.advantages[1, :size])
    rest = found["advantages"] - found["structural"]
    assert np.ptp(rest[second.generated]) < 1e-5, "without the anchor all tokens share one"
    assert not found["structural"][~np.asarray(batch.structural)[1, :size]].any()
    plain, _, _, same = learned("output.details_mb=0", *updates)
    assert plain.of_tokens is None
    jax.tree.map(np.testing.assert_array_equal, params, same)
