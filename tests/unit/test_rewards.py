"""The corrected rewards: what each correction is for, and that no text breaks them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravt_jax import protocol
from paravt_jax.rewards import RewardRules, score
from paravt_jax.rewards.answers import extract_answer, split_turns
from paravt_jax.rewards.metrics import (
    choice_accuracy,
    choice_letter,
    interval,
    normalise,
    precise_f1,
    temporal_iou,
    token_f1,
)

THINK = "<think>\nThe clip shows a man opening a door.\n</think>\n"
CALL = """<tool_call>
{"name": "crop_video", "arguments": {"start_time": 1, "end_time": 5}}
</tool_call>"""
CALLS = THINK + CALL + "\n" + CALL + "<|im_end|>"
ANSWER = THINK + "<answer>door</answer><|im_end|>"


def format_of(completion, **rules):
    return score(completion, "door", rules=RewardRules(**rules)).format


# --- Golden values of the release -----------------------------------------------------------------

LONG_THINK = "<think>0123456789</think>"


@pytest.mark.parametrize(
    ("completion", "vanilla", "para"),
    [
        (LONG_THINK + "<answer>B</answer>", 0.70, 1.00),
        (LONG_THINK.removeprefix("<think>") + "<answer>B</answer>", 0.30, 0.50),
        (LONG_THINK + CALL + LONG_THINK + "<answer>B</answer>", 1.00, 1.00),
        (
            (LONG_THINK + CALL + LONG_THINK).replace("<think>", "") + "<answer>B</answer>",
            0.30,
            0.50,
        ),
        ("<think>0123456789<answer>B</answer>", 0.60, 0.55),
        ("<think>0123456789<tool_code>print(crop_video(1))</tool_code>", 0.60, 0.35),
        ("B", 0.00, 0.00),
    ],
)
def test_golden_format_rewards_of_the_release(completion, vanilla, para):
    """The table of executed values: format score under the vanilla and the PARA-GRPO knobs."""
    old = {"compat": "reference"}
    assert format_of(completion, answer_suffix=False, anchor_weight=0.0, **old) == pytest.approx(
        vanilla
    )
    assert format_of(completion, **old) == pytest.approx(para)


def test_the_release_rewards_an_unclosed_thought_more_than_a_closed_one():
    """R4: with the forced `<think>` in the prompt; restored, both readings are right."""
    closed, unclosed = ANSWER, ANSWER.replace("</think>\n", "")
    for text in (closed, unclosed):
        assert text.startswith("<think>")
    without = [text.removeprefix("<think>") for text in (closed, unclosed)]
    assert format_of(without[0], compat="reference") < format_of(without[1], compat="reference")
    assert format_of(closed, compat="reference") > format_of(unclosed, compat="reference")
    assert format_of(closed) > format_of(unclosed)


# --- Format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{}, {"anchor_weight": 0.0}, {"answer_suffix": False}])
@pytest.mark.parametrize("completion", [ANSWER, CALLS + ANSWER, CALLS + CALLS + ANSWER])
def test_perfect_rollouts_get_exactly_one(completion, rules):
    assert format_of(completion, **rules) == 1.0
    assert format_of(completion.replace("<|im_end|>", ""), **rules) == 1.0


FAULTS = {
    "malformed call": (CALLS.replace('"name"', "'name'"), ANSWER),
    "one malformed call among two": (CALLS.replace('"name"', "'name'", 1), ANSWER),
    "unclosed think": (CALLS, ANSWER.replace("</think>", "")),
    "unclosed think before calls": (CALLS.replace("</think>", ""), ANSWER),
    "thought without substance": (CALLS, "<think>hm</think><answer>door</answer>"),
    "no answer": (CALLS, THINK),
    "empty answer": (CALLS, THINK + "<answer> </answer>"),
    "two answers": (CALLS, THINK + "<answer>window</answer><answer>door</answer>"),
    "words between calls": (CALLS.replace("\n<tool_call>\n{", " and <tool_call>{", 1), ANSWER),
    "calls to the end": (CALLS, CALLS),
    "unclosed answer": (CALLS, ANSWER.replace("</answer>", "")),
    "no think": (CALLS, "<answer>door</answer>"),
    "doubled think": (CALLS, "<think>" + ANSWER),
}


@pytest.mark.parametrize("turns", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("rules", [{}, {"anchor_weight": 0.0, "answer_suffix": False}])
def test_every_fault_costs(turns, rules):
    result = score("".join(turns), "door", rules=RewardRules(**rules), turns=turns)
    assert 0.0 <= result.format < 1.0


def test_the_format_is_a_mean_over_turns():
    good, bad = score("", "door", turns=[ANSWER]).format, score("", "door", turns=[THINK]).format
    assert score("", "door", turns=[CALLS, THINK]).format == pytest.approx((good + bad) / 2)


def test_the_format_is_never_negative():
    """R19."""
    assert format_of("<think>", compat="reference") < 0
    assert format_of("<think>") == 0.0


def test_every_turn_has_to_think():
    """R24: a short first thought hides the later ones from the release."""
    short_first = "<think>hm</think>" + CALL + "<|im_end|>" + ANSWER
    assert 0.5 < format_of(short_first) < 1.0


def test_anchor_and_task_are_told_apart():
    result = score(ANSWER.replace("</think>", ""), "door")
    assert result.anchor == pytest.approx(-0.3)
    assert result.task > result.total
    plain = score(ANSWER.replace("</think>", ""), "door", rules=RewardRules(anchor_weight=0.0))
    assert result.task == pytest.approx(plain.total)
    assert score(CALLS + ANSWER, "door").anchor == pytest.approx(0.7)


def test_turns_are_split_at_their_ends():
    assert split_turns(CALLS + "\n" + ANSWER + "\n") == [
        CALLS.removesuffix("<|im_end|>"),
        "\n" + ANSWER.removesuffix("<|im_end|>"),
    ]
    assert split_turns("") == []


# --- Tool -----------------------------------------------------------------------------------------


def test_tool_credit_needs_an_executed_call():
    """R9, R10: text alone earns nothing, not even a hallucinated response."""
    fake = THINK + CALL + "<tool_response>the door</tool_response><answer>door</answer>"
    assert score(fake, "door").tool == 0.0
    assert score(fake, "door", executed_calls=0).tool == 0.0
    assert score(fake, "door", rules=RewardRules(compat="reference")).tool == pytest.approx(0.8)
    assert score(CALLS + ANSWER, "door", executed_calls=1).tool == pytest.approx(0.6)


def test_the_tool_bonus_grows_with_accuracy():
    """R10: any overlap at all pays the whole bonus in the release."""
    partly = score(CALLS + ANSWER, "door handle of brass", executed_calls=2)
    assert partly.accuracy == pytest.approx(0.4)
    assert partly.tool == pytest.approx(0.1 + 0.5 * 0.4)
    assert score(CALLS + ANSWER, "cat", executed_calls=2).tool == pytest.approx(0.1)


def test_a_perfect_tool_rollout_gets_the_whole_total():
    result = score(CALLS + ANSWER, "door", executed_calls=2)
    assert result.total == pytest.approx(2.6)
    assert result.total > score(ANSWER, "door").total


FRESH = RewardRules(fresh_seconds=1.0)


def crops(*windows):
    """A turn of these crops."""
    calls = [
        f'<tool_call>{{"name": "crop_video", "arguments": {{"start_time": {a}, "end_time": {b}}}}}'
        "</tool_call>"
        for a, b in windows
    ]
    return f"{THINK}{''.join(calls)}<|im_end|>"


@pytest.mark.parametrize(
    ("windows", "share"),
    [
        ([(3, 3.001)], 0),
        ([(3, 8)] * 5, 1 / 5),
        ([(3, 8), (3.5, 8.5)], 1 / 2),
        ([(3, 8), (8, 9)], 1),
        ([(0, 10), (2, 3), (4, 12)], 2 / 3),
    ],
)
def test_credit_for_calls_that_look_at_anything_new(windows, share):
    """By the source's rule each of these earns the credit of a call that found the answer."""
    text = crops(*windows) + ANSWER
    assert score(text, "door", executed_calls=len(windows)).tool == pytest.approx(0.6)
    fresh = score(text, "door", executed_calls=len(windows), rules=FRESH)
    assert fresh.tool == pytest.approx(0.6 * share)
    vital = RewardRules(scheme="vital", fresh_seconds=1.0)
    paid = min(round(share * len(windows)), 2)
    assert score(text, "door", executed_calls=len(windows), rules=vital).tool == 0.5 * paid


def test_calls_that_ask_for_no_window_count_once():
    look = '<tool_call>{"name": "look", "arguments": {"at": %d}}</tool_call>'
    text = THINK + look % 1 + look % 1 + look % 2 + "<|im_end|>" + ANSWER
    assert score(text, "door", executed_calls=3, rules=FRESH).tool == pytest.approx(0.6 * 2 / 3)


# --- Accuracy -------------------------------------------------------------------------------------


def test_the_last_answer_after_the_last_thought_counts():
    """R23."""
    turn = "<think><answer>cat</answer></think><answer>window</answer><answer>door</answer>"
    assert extract_answer([turn]) == "door"
    assert extract_answer([THINK + "opens the door<|im_end|>"]) == "opens the door"
    assert extract_answer(["first line\nB\n"]) == "B"
    assert extract_answer([CALLS]) == ""
    assert extract_answer([]) == ""


def test_f1_counts_repeated_words():
    """R20."""
    assert token_f1("cat cat", "cat cat") == 1.0
    assert token_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert token_f1("a red door", "the door") == pytest.approx(2 / 3)
    assert token_f1("", "door") == 0.0


COLOURS = ["red", "green", "blue", "yellow", "white", "purple"]


def test_a_list_of_answers_earns_less_than_one():
    """By F1 all six colours earn more than guessing one of them; by "precise" no list does."""
    rules = {mode: RewardRules(mode=mode) for mode in ("f1", "precise")}

    def earned(mode, count):
        said = f"{THINK}<answer>{', '.join(COLOURS[:count])}</answer>"
        return sum(score(said, colour, rules=rules[mode]).accuracy for colour in COLOURS) / 6

    assert [earned("f1", count) for count in (1, 6)] == pytest.approx([1 / 6, 2 / 7])
    lists = [earned("precise", count) for count in range(1, 7)]
    assert lists == pytest.approx([count / 6 * 2 / (count * (count + 1)) for count in range(1, 7)])
    assert lists == sorted(lists, reverse=True)
    assert precise_f1("a red door", "the door") == pytest.approx(2 / 3 / 2)
    assert precise_f1("", "door") == precise_f1("cat", "door") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The 3.5 s, it's a-b.", "3.5 s its b"),
        ("A", "a"),
        ("１２ x_y", "12 x y"),
        ("Straße", "strasse"),
    ],
)
def test_normalised_words(text, words):
    assert normalise(text) == words


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("b", "B"), ("(c)", "C"), ("B. the door", "B"), ("b) the door", "B")),
        *(("the answer is b", "B"), ("The answer is (C).", "C"), ("Answer: D", "D")),
        *(("A; but Option B", "B"), ("A dog and B", "B"), ("I think B", "B"), ("Option E", "E")),
        *(("The answer is A dog", None), ("the answer is a dog", None), ("B or C", None)),
        *(("the", None), ("", None), ("Bob", None), ("A B C D", None)),
        *(("The answer is not B.", None), ("It isn't B", None), ("It cannot be (B)", None)),
        *(("Neither A nor B", None), ("not A or B", None), ("B is wrong", None)),
        *(("Not option B but (C)", "C"), ("The answer is B, not A", "B"), ("B isn't it, D", "D")),
        *(("Not shown, so B", "B"), ("not A dog but B", "B"), ("B can be seen", "B")),
    ],
)
def test_option_letters(text, letter):
    """R21."""
    assert choice_letter(text) == letter


def test_choice_accuracy():
    assert choice_accuracy("B. door", "b") == 1.0
    assert choice_accuracy("the", "A") == 0.0
    assert choice_accuracy("!!!", "A") == 0.0
    assert choice_accuracy("the red door", "red door") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("36 to 40 seconds", (36, 40)), ("[36.5, 40]", (36.5, 40)), ("2.0 - 6.0", (2, 6))),
        *(("0:36-0:40", (36, 40)), ("01:00:00 until 01:00:10", (3600, 3610)), ("36–40", (36, 40))),
        *(("between 36s and 40s", (36, 40)), ("from 36.0 seconds to 40.0 seconds.", (36, 40))),
        *(("1 min 30 s to 2 min", (90, 120)), ("1 to 2 minutes", (60, 120)), ("-3, 5", (-3, 5))),
        *(("Event 2, from 3 to 5", (3, 5)), ("40 to 36, no, 36 to 40", (36, 40))),
        *(("1.2.3, 5", None), ("", None), ("36", None), ("5, 5", None), ("nan, inf", None)),
    ],
)
def test_intervals(text, expected):
    """R22."""
    assert interval(text) == expected


def test_temporal_iou():
    assert temporal_iou("2 to 6", "[4, 8]") == pytest.approx(1 / 3)
    assert temporal_iou("0-1", "[4, 8]") == 0.0
    assert temporal_iou("somewhere", "[4, 8]") == 0.0


def test_dispatch_by_question_type():
    turn = THINK + "<answer>{}</answer>"
    assert score(turn.format("3.5, 6"), "35, 60", "tvg").accuracy == 0.0
    assert score(turn.format("from 2 to 6"), "4, 8", "tvg").accuracy == pytest.approx(1 / 3)
    assert score(turn.format("(b)"), "B", "mcq").accuracy == 1.0
    assert score(turn.format("red door"), "door", "counting").accuracy == pytest.approx(2 / 3)
    assert score(turn.format("red door"), "door", rules=RewardRules(mode="exact")).accuracy == 0.0
    assert score(turn.format("The door!"), "door", rules=RewardRules(mode="exact")).accuracy == 1.0


@pytest.mark.parametrize(
    ("reply", "accuracy"),
    [("0.5", 0.5), ("Score: 1.0", 1.0), ("-1", 2 / 3), ("7", 2 / 3), ("fine", 2 / 3)],
)
def test_judges_reply(reply, accuracy):
    """R25: what is not a number in [0, 1] is no verdict, and F1 decides."""
    turn = THINK + "<answer>red door</answer>"
    result = score(turn, "door", rules=RewardRules(mode="llm"), judge=lambda _: reply)
    assert result.accuracy == pytest.approx(accuracy)


def test_an_absent_judge_is_replaced_by_f1():
    def away(message):
        raise ConnectionError(message)

    turn = THINK + "<answer>red door</answer>"
    result = score(turn, "door", rules=RewardRules(mode="llm"), judge=away)
    assert result.accuracy == pytest.approx(2 / 3)


# --- Rules and garbage ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ({"anchor_weight": -1.0}, "anchor_weight=-1"),
        ({"format_weight": float("nan")}, "format_weight=nan"),
    ],
)
def test_rules_without_meaning_are_refused(rules, complaint):
    with pytest.raises(ValueError, match=complaint):
        RewardRules(**rules)


def test_llm_mode_without_a_judge_is_refused():
    with pytest.raises(ValueError, match="needs a judge"):
        score(ANSWER, "door", rules=RewardRules(mode="llm"))


PIECES = [
    *protocol.STRUCTURAL_TAGS,
    "<tool_code>",
    "<tool_response>",
    "<|im_end|>",
    "<|im_start|>",
    CALL,
]
PIECES += [
    "answer is ",
    "1:",
    "2",
    ".",
    "-",
    ", ",
    " to ",
    " min",
    "B",
    "door",
    "\n",
    "0123456789",
    "\0",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8))).map("".join)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    completion=texts,
    answer=texts,
    kind=st.sampled_from(["oe", "mcq", "tvg", "counting"]),
    suffix=st.booleans(),
    anchor=st.floats(0, 10),
    executed=st.one_of(st.none(), st.integers(0, 3)),
)
def test_no_text_raises_or_leaves_the_ranges(completion, answer, kind, suffix, anchor, executed):
    rules = RewardRules(answer_suffix=suffix, anchor_weight=anchor)
    result = score(completion, answer, kind, rules, executed_calls=executed)
    assert 0.0 <= result.accuracy <= 1.0
    assert 0.0 <= result.format <= 1.0
    assert 0.0 <= result.tool <= (0.6 if executed else 0.0)
    assert -0.3 <= result.anchor <= 0.7 + 1e-12
    assert result.total == pytest.approx(result.accuracy + result.format + result.tool)


def test_long_garbage_is_read_quickly():
    for piece in ("1", "1 ", "<think>", "<tool_call>", "a_", "answer is ", "1:", "-", " "):
        score(piece * 20_000, "1, 2", "tvg", executed_calls=1)
        score(piece * 20_000, "B", "mcq")
        score(piece * 20_000, "door")
