"""DeepVideo-R1's augmentation: who is hard, what hints and noise are made of, and that neither is
trained."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from paravt_jax.records import RolloutGroup, Row, Trajectory, VideoRef
from pipelines.loader import PromptItem
from tests.support.needle import renderer
from tests.support.readers import StillReader
from train.methods.difficulty import Difficulty, hint_room, shortened, with_noise
from train.recipes import get_recipe
from train.settings.override import override

READER = StillReader()

SETTINGS = ["difficulty.window=3", "rl.group_size=4", "difficulty.hint_tokens=24"]
CONFIG = override(get_recipe("needle_rl"), SETTINGS)
TRACE = "<think>\nI look at one part of it.\n</think>\n<answer>red</answer><|im_end|>"


class Actor:
    """Says `TRACE` to every prompt, and keeps what it was asked. Solutions, which are sampled
    first, get one reward, and what is sampled again another."""

    def __init__(self, solutions=2.0):
        self.asked, self.solutions = [], solutions

    def __call__(self, params, prompts, copies, seed, step):
        self.asked.append((list(prompts), copies, seed))
        reward = self.solutions if len(self.asked) == 1 else 1.0
        return rewarded(spoken(prompts, copies), *[reward] * len(prompts))


def spoken(prompts, copies):
    """Groups without rewards."""
    return [RolloutGroup(i.row, i.frame_budget, (said(i.prompt),) * copies) for i in prompts]


def said(prompt) -> Trajectory:
    tokens = np.array(renderer().encode(TRACE), np.int32)
    every = np.ones(len(tokens), bool)
    return Trajectory(prompt, tokens, every, np.zeros(len(tokens), np.float32), (), TRACE, TRACE)


def rewarded(groups, *totals):
    """The groups with these mean rewards."""
    return [
        RolloutGroup(
            group.row,
            group.frame_budget,
            tuple(
                Trajectory(**{**vars(t), "rewards": {"total": total}}) for t in group.trajectories
            ),
        )
        for group, total in zip(groups, totals, strict=True)
    ]


def item(name: str) -> PromptItem:
    row = Row(name, VideoRef(f"/{name}.mp4", 64.0), "What colour is the circle?", "red")
    frames = READER.overview(row.video, 2)
    return PromptItem(row, 2, renderer().main_prompt(row, frames, tools=True))


class First(Actor):
    """Gives the rollouts of a step these rewards, and hands all further questions on."""

    def __init__(self, actor, totals):
        self.actor, self.totals, self.groups = actor, totals, None

    def __call__(self, params, prompts, copies, seed, step):
        if self.groups is not None:
            return self.actor(params, prompts, copies, seed, step)
        self.groups = rewarded(spoken(prompts, copies), *self.totals)
        return self.groups


def kit(config=CONFIG, solutions=2.0):
    actor = Actor(solutions)
    difficulty = Difficulty(actor, config.difficulty, renderer(), READER, tools=True)
    return SimpleNamespace(difficulty=difficulty, actor=actor)


def step_of(own, *totals, seed=5, prompts=None):
    items = prompts or [item(f"r{number}") for number in range(len(totals))]
    own.difficulty._sample = first = First(own.actor, totals)
    revised = own.difficulty({}, items, 4, seed, 0)
    return items, first.groups, revised


def test_delta_is_the_windows_mean_less_the_groups():
    own = kit().difficulty
    assert own.delta(0.7) == 0.0
    own.set_state([1.0, 2.0, 3.0, 4.0])
    assert own.get_state() == [2.0, 3.0, 4.0]
    assert own.delta(2.5) == pytest.approx(0.5) and own.delta(3.5) == pytest.approx(-0.5)
    assert json.loads(json.dumps(own.get_state())) == own.get_state()


def test_the_first_step_has_nothing_to_compare_with():
    own = kit()
    _, groups, revised = step_of(own, 0.0, 2.0)
    assert revised == groups and not own.actor.asked
    assert own.difficulty.get_state() == [0.0, 2.0]


def test_hard_prompts_get_the_beginning_of_a_solution_and_easy_ones_noise():
    own = kit()
    own.difficulty.set_state([1.0])
    items, groups, (hard, easy, middling) = step_of(own, 0.2, 1.5, 1.0)
    assert middling is groups[2]
    (told, traces, _), (again, copies, _) = own.actor.asked
    assert [i.row.row_id for i in told] == ["r0"] and traces == 4
    assert "The answer is red." in renderer().decode(told[0].prompt.tokens)
    assert [i.row.row_id for i in again] == ["r0", "r1"] and copies == 4
    hinted = renderer().decode(hard.trajectories[0].prompt.tokens)
    assert "begins like this: I look" in hinted and "red" not in hinted
    assert hard.trajectories[0].prompt.patches is items[0].prompt.patches
    noisy, plain = easy.trajectories[0].prompt, items[1].prompt
    np.testing.assert_array_equal(noisy.tokens, plain.tokens)
    assert noisy.patches.values.std() > 0.1 and plain.patches.values.std() == 0
    # The window holds what was sampled without help.
    assert own.difficulty.get_state() == [0.2, 1.5, 1.0]
    assert own.difficulty.metrics["difficulty/helped"] == pytest.approx(1 / 3)


def test_noise_is_in_the_frames_of_every_video():
    own = kit()
    own.difficulty.set_state([0.0])
    videos = (VideoRef("/second.mp4", 9.0),)
    row = dataclasses.replace(item("r").row, more_videos=videos)
    frames = [READER.overview(video, 2) for video in row.videos]
    plain = PromptItem(row, 4, renderer().main_prompt(row, frames, tools=True))
    _, _, (easy,) = step_of(own, 2.0, prompts=[plain])
    noisy = easy.trajectories[0].prompt
    np.testing.assert_array_equal(noisy.tokens, plain.prompt.tokens)
    first, *_, last = noisy.patches.values
    assert first.std() > 0.1 and last.std() > 0.1 and (first != last).any()


def test_neither_hint_nor_noise_is_trained():
    own = kit()
    own.difficulty.set_state([1.0])
    _, groups, revised = step_of(own, 0.2)
    before, after = groups[0].trajectories[0], revised[0].trajectories[0]
    assert len(after.prompt.tokens) > len(before.prompt.tokens)
    assert renderer().decode(after.tokens) == TRACE and after.generated.all()


def test_a_solution_that_is_no_better_gives_no_hint():
    own = kit(solutions=0.2)
    own.difficulty.set_state([1.0])
    _, groups, revised = step_of(own, 0.2)
    assert revised == groups and len(own.actor.asked) == 1


def test_all_follows_from_window_and_seed():
    """A resumed run asks what the uninterrupted one asks; another seed draws anew."""
    first, resumed, other = kit(), kit(), kit()
    first.difficulty.set_state([3.0, 1.0])
    resumed.difficulty.set_state(json.loads(json.dumps(first.difficulty.get_state())))
    other.difficulty.set_state([3.0, 1.0])
    prompts = []
    for own, seed in ((first, 5), (resumed, 5), (other, 6)):
        _, _, revised = step_of(own, 0.2, 2.5, seed=seed)
        prompts.append([group.trajectories[0].prompt for group in revised])
    for a, b in zip(prompts[0], prompts[1], strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.patches.values, b.patches.values)
    assert [a[2] for a in first.actor.asked] == [a[2] for a in resumed.actor.asked]
    assert len({a[2] for a in first.actor.asked} | {5}) == 3
    assert (prompts[0][1].patches.values != prompts[2][1].patches.values).any()


def test_hints_grow_with_difficulty_and_end_before_the_answer():
    own = kit().difficulty
    trace = said(item("r0").prompt)
    lengths = [len(renderer().encode(own.beginning(trace, d))) for d in (0.1, 0.5, 1.0, 9.0)]
    whole = len(renderer().encode("I look at one part of it."))
    assert lengths[0] < lengths[1] < lengths[2] == lengths[3] == round(whole / 2)
    everything = override(CONFIG, ["difficulty.longest_hint=1.0"])
    assert kit(everything).difficulty.beginning(trace, 1.0) == "I look at one part of it."


def test_noise_has_its_std_and_its_seed():
    frames = READER.overview(item("r0").row.video, 4)
    for std in (0.02, 0.1):
        noisy = with_noise(frames, std, seed=3)
        assert noisy.pixels.dtype == np.uint8
        assert noisy.pixels.std() == pytest.approx(255 * std, rel=0.05)
        assert (noisy.pixels == with_noise(frames, std, seed=3).pixels).all()
    assert (noisy.pixels != with_noise(frames, std, seed=4).pixels).any()


@pytest.mark.parametrize("text", ["red " * 400, "\U0001f600" * 90, "x</think><|im_end|>" * 60])
def test_hints_keep_to_their_room(text):
    r, own = renderer(), item("r0")
    words = shortened(r, text, 24)
    assert text.startswith(words) and len(r.encode(words)) <= 24
    for hint in ("The answer is {words}. Show how to find it.", "{words}"):
        longer = r.with_hint(own.row, own.prompt, True, hint.format(words=words))
        room = hint_room(CONFIG.difficulty, r)
        assert len(longer.tokens) <= len(own.prompt.tokens) + room
    assert hint_room(get_recipe("needle_rl").difficulty, r) == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["difficulty.window=0", "difficulty.noise=0.2"], "difficulty.noise=0.2 has no effect"),
        (["difficulty.scale=0"], "above 0"),
        (["difficulty.tolerance=2"], "difficulty.tolerance=2 is not below difficulty.scale=1"),
        (["difficulty.traces=5"], "rl.group_size=4"),
        (["difficulty.noise=0"], "above 0 and at most 1"),
        (["difficulty.hint_tokens=0"], "at least 1"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        override(CONFIG, settings)
