"""The needle world: what the videos hold, what the oracle says, what the tasks teach."""

import dataclasses
import json
import os
import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from paravt_jax.protocol import crop_window, parse_tool_calls, parses_strictly
from paravt_jax.records import QuestionType
from pipelines.needle import tasks, tokenizer, traces
from pipelines.needle.questions import Asked
from pipelines.needle.world import (
    COLOURS,
    SHAPES,
    Event,
    NeedleWorld,
    build,
    draw_events,
    videos,
)
from pipelines.video import VideoReader
from tests.support.needle import (
    WORLD,
    data_folder,
    processor_folder,
    questions,
    renderer,
)
from train.recipes.needle import COLD_START

READER = VideoReader()
CIRCLE = Event("red", "circle", 36, 40, 24, 16, 16)
CROSS = Event("blue", "cross", 3, 8, 24, 16, 16)


def kit(**options) -> tasks.TaskKit:
    chosen = questions("oe", "tvg")
    return tasks.TaskKit(WORLD, chosen, READER, renderer(), **options)


# --- videos ---------------------------------------------------------------------------------


def test_events_keep_to_one_window_each_and_differ_in_colour_and_shape():
    for index in range(300):
        events = draw_events(NeedleWorld(), "train", index)
        assert 1 <= len(events) <= 2
        windows = [e.start // 16 for e in events]
        assert len(set(windows)) == len(windows) and windows == sorted(windows)
        assert all((e.end - 1) // 16 == e.start // 16 and 4 <= e.end - e.start <= 6 for e in events)
        assert len({e.colour for e in events}) == len({e.shape for e in events}) == len(events)


def test_splits_and_seeds_give_different_videos():
    drawn = [
        draw_events(NeedleWorld(seed=seed), split, 0)
        for seed in range(5)
        for split in ("train", "held_out", "test")
    ]
    assert len(set(drawn)) == len(drawn)


def test_overview_of_four_frames_sees_a_quarter_of_the_events():
    world, times = NeedleWorld(), (0, 21, 42, 63)
    events = [e for i in range(2000) for e in draw_events(world, "train", i)]
    seen = np.mean([any(e.visible(t, t + 1) for t in times) for e in events])
    assert 0.2 < seen < 0.3


def test_colours_and_shapes_survive_compression():
    """Read the mp4 back: colour by the nearest mean, shape by the drawn mask it covers best."""
    from pipelines.needle.world import _cover

    for video in videos(WORLD, data_folder(), "train"):
        for event in video.events:
            frames = READER.clip(video.video, event.start, event.end).pixels.astype(float)
            inner = frames[:, event.y - 2 : event.y + 3, event.x - 2 : event.x + 3].mean((0, 1, 2))
            colour = min(COLOURS, key=lambda c: np.abs(inner - COLOURS[c]).sum())
            assert colour == event.colour
            distance = np.abs(frames - COLOURS[event.colour]).sum(-1).mean(0)
            covers = {
                s: _cover(dataclasses.replace(event, shape=s), WORLD.size) > 127 for s in SHAPES
            }
            fits = {s: distance[~c].mean() - distance[c].mean() for s, c in covers.items()}
            assert max(fits, key=fits.__getitem__) == event.shape


def test_frames_outside_events_are_grey():
    video = videos(WORLD, data_folder(), "train")[0]
    frames = READER.overview(video.video, WORLD.duration)
    spread = np.ptp(frames.pixels.astype(int), axis=-1).mean(axis=(1, 2))
    for second, colourfulness in enumerate(spread):
        shown = any(e.visible(second, second + 1) and e.colour != "white" for e in video.events)
        assert (colourfulness > 20) == shown


def test_world_is_built_once(tmp_path):
    world = NeedleWorld(train_videos=2, held_out_videos=1)
    root = build(world, str(tmp_path))
    path = os.path.join(root, "train", "00001.mp4")
    before = os.stat(path).st_mtime_ns
    assert build(world, str(tmp_path)) == root and os.stat(path).st_mtime_ns == before
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(root)]


def test_incomplete_world_is_built_again(tmp_path):
    world = NeedleWorld(train_videos=2, held_out_videos=1)
    path = os.path.join(build(world, str(tmp_path)), "train", "00001.mp4")
    os.unlink(path)
    build(world, str(tmp_path))
    assert os.path.isfile(path)


def test_other_parameters_live_in_another_folder(tmp_path):
    worlds = [NeedleWorld(seed=s, train_videos=1, held_out_videos=1) for s in (0, 1)]
    assert len({build(world, str(tmp_path)) for world in worlds}) == 2


@pytest.mark.parametrize(
    "wrong", [{"window": 15}, {"events": (0, 2)}, {"events": (1, 5)}, {"visible": (4, 17)}]
)
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NeedleWorld(**wrong)


# --- questions ------------------------------------------------------------------------------


def test_questions_have_their_true_answers():
    for q in questions():
        kind, event = q.row.question_type, q.target
        if kind == QuestionType.GROUNDING:
            assert q.row.answer == f"{event.start}, {event.end}" and event.name in q.row.question
        elif kind == QuestionType.OPEN:
            assert {q.row.answer} < {event.colour, event.shape}
            assert q.row.answer in q.vocabulary and q.row.answer not in q.row.question
        else:
            assert f"{q.row.answer}. {event.colour}" in q.row.question


def test_choice_letters_are_spread_and_options_differ():
    world = NeedleWorld(train_videos=200)
    from pipelines.needle.questions import ask
    from pipelines.needle.world import NeedleVideo

    made = [
        NeedleVideo(f"train/{i}", videos(WORLD, data_folder(), "train")[0].video, (CIRCLE,))
        for i in range(world.train_videos)
    ]
    asked = ask(made, ["mcq"])
    counts = Counter(q.row.answer for q in asked)
    assert set(counts) == set("ABCD") and min(counts.values()) > 25
    for q in asked:
        options = [line[3:] for line in q.row.question.splitlines()[1:]]
        assert len(set(options)) == 4


def test_row_ids_are_unique():
    ids = [q.row.row_id for q in questions()]
    assert len(set(ids)) == len(ids)


# --- oracle ---------------------------------------------------------------------------------


def test_reports_name_what_a_window_shows():
    events = (CROSS, CIRCLE)
    assert traces.report(events, 32, 48) == "A red circle appears from 36 to 40 seconds."
    assert traces.report(events, 16, 32) == "Nothing happens."
    assert traces.report(events, 38, 64) == "A red circle appears from 38 to 40 seconds."
    assert traces.report(events, 0, 64).count("appears") == 2


def test_calls_are_valid_and_mean_their_windows():
    turn = traces.PREFIX + traces.call_turn(WORLD.windows)
    assert parses_strictly(turn)
    windows = [crop_window(call, 64.0) for call in parse_tool_calls(turn)]
    assert windows == [(float(a), float(b)) for a, b in WORLD.windows]


def question_about(event: Event, kind: str):
    q = next(q for q in questions() if q.row.question_type == kind)
    row = dataclasses.replace(q.row, answer=event.colour if kind == "oe" else q.row.answer)
    vocabulary = tuple(COLOURS) if kind == "oe" else q.vocabulary
    found = {"row": row, "target": event, "vocabulary": vocabulary, "events": (event,)}
    return dataclasses.replace(q, asked="colour" if kind == "oe" else "time", **found)


def decide(kind, times, windows, seed=0):
    q = question_about(CIRCLE, kind)
    return traces.decide(
        q, WORLD, np.array(times, np.float64), windows, np.random.default_rng(seed)
    )


def test_a_thought_names_what_was_asked_and_then_at_once_what_was_found():
    """The last word before what was found is in the question, and is looked up in the reports."""
    said = {asked: traces.statement(asked, CIRCLE, (36, 40)) for asked in get_args(Asked)}
    assert said == {
        "colour": ("I find the circle", "red."),
        "shape": ("I find the red", "circle."),
        "time": ("I find the red circle", "from 36 to 40 seconds."),
    }
    for q in questions():
        named, _ = traces.statement(q.asked, q.target, None)
        subject = named.removeprefix("I find the ")
        assert f" the {subject}" in q.row.question


def test_what_was_seen_is_answered_and_what_was_not_is_guessed():
    assert decide("oe", [0], [(32, 48)]) == traces.AnswerTurn("I find the circle red.", "red")
    assert decide("oe", [37], []) == traces.AnswerTurn("I can see it.", "red")
    assert decide("oe", [37], [(0, 16)]) == traces.AnswerTurn("I find the circle red.", "red")
    guesses = Counter(decide("oe", [0], [], seed).text for seed in range(600))
    assert set(guesses) == set(COLOURS) and max(guesses.values()) < 150
    assert decide("oe", [0], []).thought == "I guess."
    assert decide("oe", [0], [(0, 16)]).thought == "I find the circle nowhere."


def test_times_come_from_crops_exactly_and_from_glimpses_roughly():
    assert decide("tvg", [0], [(32, 48)]).text == "36 to 40 seconds"
    assert decide("tvg", [37], []).text == "35 to 40 seconds"


# --- tasks ----------------------------------------------------------------------------------


def text_of(example) -> tuple[str, str]:
    """The prompt, and what is learned after it."""
    learned = example.tokens[example.weights > 0]
    return renderer().decode(example.prompt.tokens), renderer().decode(learned)


def test_frame_examples_name_their_frame():
    said = Counter()
    for i in range(100):
        prompt, learned = text_of(tasks.needle_examples(kit(), "frame", 0)[i])
        assert prompt.count("<|image_pad|>") == 1 and learned.endswith(".<|im_end|>")
        said["Nothing" in learned] += 1
    assert 5 < said[True] < 40


def test_clip_examples_show_events_about_half_the_time():
    nothing = 0
    for i in range(60):
        prompt, learned = text_of(tasks.needle_examples(kit(), "clip", 0)[i])
        assert prompt.count("<|image_pad|>") == 16
        nothing += learned == "Nothing happens.<|im_end|>"
    assert 15 < nothing < 45


def test_recall_learns_what_is_found_of_whatever_is_named():
    several, nowhere = 0, 0
    for i in range(60):
        example = tasks.needle_examples(kit(), "recall", 0)[i]
        prompt, learned = text_of(example)
        things = re.findall(r"A (\w+) (\w+)\.", prompt)
        facts = dict(things) | {shape: colour for colour, shape in things}
        lines = episode_text(example).split(".\n")
        for line, found in zip(lines, learned.split(".\n"), strict=True):
            named = line.removesuffix(found).removeprefix("I find the ")
            assert not line or found == f" {facts.get(named, 'nowhere')}"
            nowhere += found == " nowhere"
        several += len(things) > 1
    assert "image_pad" not in prompt and 120 < nowhere < 360 and several > 20


def test_qa_examples_learn_only_the_answer_from_reports():
    for i in range(20):
        example = tasks.needle_examples(kit(), "qa", 0)[i]
        prompt, learned = text_of(example)
        assert "image_pad" not in prompt and "tool_call" not in learned
        assert "<answer>" in learned and "appears" not in learned


@pytest.mark.slow
def test_qa_examples_often_report_events_that_nobody_asked_about():
    """Otherwise the question need not be read: more than half the examples make it decide."""
    reported = [
        episode_text(tasks.needle_examples(kit(), "qa", 0)[i]).count("appears") for i in range(100)
    ]
    assert sum(count > 1 for count in reported) > 50 and max(reported) == 4


def episode_text(example) -> str:
    return renderer().decode(example.tokens)


def test_traces_parse_strictly_and_are_learned_between_the_markup():
    for i in range(60):
        example = tasks.needle_examples(kit(), "trace", 0)[i]
        text, (_, learned) = episode_text(example), text_of(example)
        assert text.startswith(traces.PREFIX)
        turns = [t.split("<|im_start|>assistant\n")[-1] for t in text.split("<|im_end|>")[:-1]]
        assistant = [t for t in turns if t.startswith("<think>")]
        assert len(assistant) in (1, 2) and all(parses_strictly(t) for t in assistant)
        expected = "".join(t.removeprefix(traces.PREFIX) + "<|im_end|>" for t in assistant)
        assert learned == expected
        calls = parse_tool_calls(assistant[0])
        assert text.count("<tool_response>") == len(calls)


def test_plan_decides_the_number_of_calls():
    for count in range(5):
        plan = tuple(float(i == count) for i in range(5))
        example = tasks.needle_examples(kit(plan=plan), "trace", 0)[0]
        assert episode_text(example).count("<tool_call>") == count


def test_full_traces_answer_correctly():
    made = kit(plan=(0, 0, 0, 0, 1.0))
    for i, q in enumerate(made.questions):
        text = episode_text(tasks.trace(made, q, np.random.default_rng(i)))
        answer = text.split("<answer>")[1].split("</answer>")[0]
        assert answer.removesuffix(" seconds").replace(" to ", ", ") == q.row.answer


def test_direct_examples_name_no_tool():
    for i in range(10):
        example = tasks.needle_examples(kit(), "direct", 0)[i]
        prompt, learned = text_of(example)
        assert "crop_video" not in prompt and "tool_call" not in learned


def test_budgets_reach_the_prompt():
    prompt, _ = text_of(tasks.needle_examples(kit(budgets=(7,)), "trace", 0)[0])
    assert prompt.count("<|image_pad|>") == 7


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_examples_depend_on_task_seed_and_index_alone(task):
    first, again = (tasks.needle_examples(kit(), task, 5)[37] for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.prompt.tokens, again.prompt.tokens)
    other = tasks.needle_examples(kit(), task, 6)
    mine = tasks.needle_examples(kit(), task, 5)
    differ = [not np.array_equal(other[i].tokens, mine[i].tokens) for i in range(10)]
    assert any(differ)


@pytest.mark.slow
@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_what_was_decoded_for_an_example_is_not_decoded_again(task):
    """Decoding is most of the work of an example: cached, examples keep up with training."""
    reader = VideoReader()
    source = tasks.needle_examples(dataclasses.replace(kit(), reader=reader), task, 1)
    decoded = []
    for _ in range(2):
        [source[i] for i in range(40)]
        decoded.append(reader.take_metrics()["frames/decoded"])
    assert (decoded[0] == 0) == (task in {"recall", "qa"})  # texts alone
    assert decoded[1] == 0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"plan": (0.5, 0.6)}, "sum to 1"), ({"plan": (0.1,) * 10}, "only 4 windows")],
)
def test_impossible_kits_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        kit(**wrong)


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task='captions'"):
        tasks.needle_examples(kit(), "captions", 0)


# --- tokenizer ------------------------------------------------------------------------------


def test_tokenizer_is_deterministic_and_full():
    first, again = (tokenizer.train_tokenizer(WORLD) for _ in range(2))
    assert first.to_str() == again.to_str()
    assert first.get_vocab_size() == tokenizer.VOCABULARY


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("<36.0 seconds>", 7),
        ("Nothing happens.", 3),
        ("A red circle appears from 36 to 40 seconds.", 14),
        (traces.call(16, 32), 29),
        ("<answer>red</answer>", 5),
        ("<|im_start|>system\nTool: crop_video(start_time, end_time)<|im_end|>\n", 18),
    ],
)
def test_texts_of_the_world_are_cheap(text, most):
    assert len(renderer().encode(text)) <= most


def test_digits_stand_alone_and_special_tokens_are_whole():
    r = renderer()
    assert [r.decode([i]) for i in r.encode("1234")] == list("1234")
    for token in tokenizer.CONTROL + tokenizer.MARKUP + tokenizer.THOUGHT:
        assert len(r.encode(token)) == 1


def test_folder_loads_with_a_model_config_beside_it(tmp_path):
    """AutoTokenizer must not swap our tokenizer for Qwen2's when it sees the model type."""
    from transformers import AutoTokenizer

    tokenizer.write_processor_folder(str(tmp_path), WORLD)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "<|im_start|>user\n<36.0 seconds>What colour is the circle?<think>"
    assert loaded.encode(text) == renderer().encode(text)
    assert loaded.chat_template == renderer().tokenizer.chat_template


def test_the_committed_folder_is_what_the_world_writes(tmp_path):
    """Runs from random weights take its tokenizer and its settings of frames."""
    tokenizer.write_processor_folder(str(tmp_path), NeedleWorld())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (COLD_START / path.name).read_bytes(), path.name


def test_a_frame_of_the_world_is_one_vision_token():
    from pipelines.preprocess import ImageSpec

    spec = ImageSpec.from_folder(processor_folder())
    assert spec == tokenizer.frame_spec(WORLD)
    assert spec.target_size(32, 32) == (32, 32) and spec.factor == 32
