"""Rewards of the related systems, by hand: every formula of their modules' docstrings."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravt_jax.protocol import SYNTAXES
from paravt_jax.rewards import RewardRules, ranges, scheme_names, score
from paravt_jax.rewards import overlap as windows
from paravt_jax.rewards.overlap import distance, merged
from paravt_jax.rewards.rouge import rouge_l, rouge_mean, rouge_n
from paravt_jax.rewards.schemes import visd, vital
from paravt_jax.rewards.schemes.video_o3 import bonus, clue_score
from paravt_jax.rewards.tag_blocks import blocks

THINK = "<think>The door opens late.</think>"
END = "<|im_end|>"


def crop(start, end, name="crop_video"):
    body = f'{{"name": "{name}", "arguments": {{"start_time": {start}, "end_time": {end}}}}}'
    return f"{THINK}<tool_call>{body}</tool_call>{END}"


def ground(start, end, strategy="medium"):
    body = f'{{"temporal_segment": [{start}, {end}], "sampling_strategy": "{strategy}"}}'
    return f"{THINK}<grounding>{body}</grounding>{END}"


def answer(text, think=THINK):
    return f"{think}<answer>{text}</answer>{END}"


def reward(scheme, turns, truth="B", kind="mcq", executed=None, evidence=(), progress=1.0, **rules):
    executed = len(turns) - 1 if executed is None else executed
    return score(
        "".join(turns),
        truth,
        kind,
        RewardRules(scheme=scheme, **rules),
        turns=turns,
        executed_calls=executed,
        evidence=evidence,
        progress=progress,
    )


def overlap(predicted, expected):
    """Compare windows that may be written without decimal points."""
    return windows.overlap(*[[(float(a), float(b)) for a, b in w] for w in (predicted, expected)])


def parts(result, *names):
    terms = result.as_dict()
    return [terms[name] for name in names] + [result.total]


# --- Overlap of windows ---------------------------------------------------------------------------


def test_overlap_by_hand():
    """(0, 4) and (2, 6) are (0, 6); with (4, 8) they share 2 of 8 seconds, centres 3 apart."""
    found = overlap([(2, 6), (0, 4)], [(4, 8)])
    assert found.iou == found.hull_iou == 2 / 8
    assert (found.iop, found.iog) == (2 / 6, 2 / 4)
    assert found.diou == pytest.approx(2 / 8 - (3 / 8) ** 2)


def test_overlap_with_several_windows_by_hand():
    found = overlap([(0, 2)], [(8, 9), (1, 2)])
    assert (found.iou, found.hull_iou) == (1 / 3, 1 / 9)
    assert found.diou == pytest.approx(1 / 3 - (4 / 9) ** 2)
    assert merged([(3.0, 3.0), (0.0, 1.0), (1.0, 2.0), (5.0, 4.0)]) == [(0, 2)]
    assert distance(4.0, [(0.0, 1.0), (6.0, 9.0)]) == 2
    assert distance(6.5, [(0.0, 1.0), (6.0, 9.0)]) == 0


def test_nothing_overlaps_nothing():
    assert set(vars(overlap([], [(0, 1)])).values()) == {0.0}
    assert set(vars(overlap([(1, 1)], [(0, 1)])).values()) == {0.0}


times = st.floats(0, 1e5).map(lambda time: round(time, 2))
spans = st.lists(st.tuples(times, times).map(lambda pair: (min(pair), max(pair))), max_size=4)


@settings(max_examples=150, deadline=None)
@given(a=spans, b=spans, shift=st.integers(0, 1000), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_overlap_has_its_ranges_and_invariances(a, b, shift, scale):
    found = overlap(a, b)
    assert all(0.0 <= getattr(found, name) <= 1.0 for name in ("iou", "iop", "iog", "hull_iou"))
    assert -1.0 < found.diou <= found.iou + 1e-9
    assert found.hull_iou <= found.iou + 1e-9 <= min(found.iop, found.iog) + 2e-9
    moved = [[(s * scale + shift, e * scale + shift) for s, e in windows] for windows in (a, b)]
    for name, value in vars(overlap(*moved)).items():
        assert value == pytest.approx(getattr(found, name), abs=1e-5)
    other_way = overlap(b, a)
    assert (other_way.iop, other_way.iog) == (found.iog, found.iop)


# --- ROUGE ----------------------------------------------------------------------------------------


def test_rouge_by_hand():
    """5 of 6 words, 3 of 5 pairs, a common subsequence of 5."""
    texts = "The cat sat on the mat.", "the cat lay on the mat"
    assert rouge_n(*texts, 1) == pytest.approx(5 / 6)
    assert rouge_n(*texts, 2) == pytest.approx(3 / 5)
    assert rouge_l(*texts) == pytest.approx(5 / 6)
    assert rouge_mean(*texts) == pytest.approx((5 / 6 + 3 / 5 + 5 / 6) / 3)


def test_rouge_knows_order_and_length():
    assert [rouge_n("a b c d", "d c b a", n) for n in (1, 2)] == [1.0, 0.0]
    assert rouge_l("a b c d", "d c b a") == pytest.approx(1 / 4)
    assert rouge_n("a a a", "a", 1) == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert rouge_mean("", "a") == rouge_mean("a", "") == rouge_mean("!", "?") == 0.0
    assert rouge_n("a", "a", 2) == 0.0, "one word has no pairs"


# --- Blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" <a>1</a>\n<b></b> ", [("a", "1"), ("b", "")]),
        ("<a>1</b></a>", [("a", "1</b>")]),
        ("", []),
        *((text, None) for text in ("x", "<a>1", "<a>1</a>x", "x<a>1</a>", "<a></a></a>", "<a b>")),
    ],
)
def test_blocks(text, found):
    assert blocks(text) == found


# --- LongVT ---------------------------------------------------------------------------------------


def test_longvt_by_hand():
    """(1, 5) and (3, 9) share 2 of 8 seconds, a third of the evidence."""
    turns, seen = [crop(1, 5), answer("B")], ((3, 9),)
    named = ("accuracy", "format", "tool")
    assert parts(reward("longvt", turns, evidence=seen), *named) == [1, 1, 0.25, 2.25]
    recall = reward("longvt", turns, evidence=seen, window_term="recall")
    assert parts(recall, *named) == pytest.approx([1, 1, 1 / 3, 7 / 3])
    assert reward("longvt", turns, window_term="tool").tool == 1.0
    assert reward("longvt", turns, "C", window_term="tool").tool == 0.0
    assert reward("longvt", turns, evidence=seen, window_term="none").tool == 0.0
    assert reward("longvt", turns, evidence=seen, format_weight=0.25).total == 1.5


def test_longvt_looks_at_the_last_call_and_only_if_one_ran():
    turns, seen = [crop(0, 1), crop(3, 9), answer("B")], ((3, 9),)
    assert reward("longvt", turns, evidence=seen).tool == 1.0
    assert reward("longvt", turns[::-1][1:] + turns[2:], evidence=seen).tool == 0.0
    assert reward("longvt", turns, evidence=seen, executed=0).tool == 0.0
    assert reward("longvt", turns).tool == 0.0, "nobody marked where the answer is"
    assert reward("longvt", turns, truth="3, 9", kind="tvg", evidence=seen).tool == 0.0


def test_longvt_divides_by_the_union_and_its_source_by_the_hull():
    turns, seen = [crop(1, 5), answer("B")], ((3, 4), (8, 9))
    assert reward("longvt", turns, evidence=seen).tool == pytest.approx(1 / 5)
    source = reward("longvt", turns, evidence=seen, compat="reference")
    assert source.tool == pytest.approx(1 / 8)
    one = [
        reward("longvt", turns, evidence=((3, 9),), compat=c).tool for c in ("fixed", "reference")
    ]
    assert one[0] == one[1]


@pytest.mark.parametrize(
    ("turns", "form"),
    [
        ([answer("B")], 1),
        ([crop(1, 5), answer("B")], 1),
        ([crop(1, 5), crop(2, 3), answer("B")], 1),
        ([crop(1, 5).replace(END, "") + crop(2, 3)[len(THINK) :], answer("B")], 0),
        ([answer("B", think="")], 0),
        ([crop(1, 5)], 0),
        ([crop(1, 5), answer("B", think="")], 0),
        ([answer("B").replace(END, "<answer>C</answer>")], 0),
        ([THINK + answer("B")], 0),
        ([answer("B").replace("</think>", "")], 0),
        (["So " + answer("B")], 0),
        ([crop(1, 5).replace("</tool_call>", ""), answer("B")], 0),
        ([crop(1, 5), answer("B").replace(END, ".")], 0),
        ([answer("B" * 1000)], 0),
        ([answer("B" * 999)], 1),
    ],
)
def test_longvt_format(turns, form):
    assert reward("longvt", turns).format == form


def test_longvt_asks_its_judge():
    rules = RewardRules(scheme="longvt", mode="llm")
    result = score(answer("a gate"), "a door", rules=rules, judge=lambda message: "0.5")
    assert result.accuracy == 0.5


# --- VITAL ----------------------------------------------------------------------------------------


def test_vital_scales_the_iou():
    """2 to 6 and 4 to 8 share 2 of 6 seconds: (1/3 - 1/5) / (4/5 - 1/5) = 2/9."""
    turns = [answer("no, 0 to 1; it is 2 to 6")]
    result = reward("vital", turns, "4, 8", "tvg")
    assert parts(result, "accuracy", "format", "tool") == pytest.approx([2 / 9, 1, 0, 11 / 9])
    chapters = reward("vital", turns, "4, 8", "tvg", iou_scale=(0.0, 0.5))
    assert chapters.accuracy == pytest.approx(2 / 3)
    assert [vital.scaled(iou, (0.2, 0.8)) for iou in (0.0, 0.2, 0.8, 1.0)] == [0, 0, 1, 1]


def test_vital_answers_and_tool():
    assert reward("vital", [answer("B. the door")]).accuracy == 1.0
    texts = "The cat sat on the mat", "the cat lay on the mat"
    assert reward("vital", [answer(texts[0])], texts[1], "oe").accuracy == rouge_mean(*texts)
    tools = [reward("vital", [answer("B")], executed=n).tool for n in range(4)]
    assert tools == [0.0, 0.5, 1.0, 1.0]


def test_vital_grounded_answers():
    """The source computes letter and IoU and returns the IoU alone."""
    turns, seen = [answer("B. From 2 to 6.")], ((4, 8),)
    fixed = reward("vital", turns, evidence=seen, grounded=True)
    assert parts(fixed, "accuracy", "grounding") == pytest.approx([1, 2 / 9, 1 + 2 / 9 + 1])
    source = reward("vital", turns, evidence=seen, grounded=True, compat="reference")
    iou = (2 / (6 + 1e-4) - 0.2) / 0.6
    assert parts(source, "accuracy", "grounding") == pytest.approx([0, iou, iou + 1], rel=1e-12)
    alone = reward("vital", [answer("2 to 6")], "4, 8", "tvg", evidence=seen, grounded=True)
    assert parts(alone, "accuracy", "grounding") == pytest.approx([2 / 9, 0, 11 / 9])


@pytest.mark.parametrize(
    ("turns", "form"),
    [
        ([answer("B")], 1),
        ([crop(1, 5), "\n" + answer("B") + "\n"], 1),
        ([crop(1, 5), crop(1, 5), answer("B")], 1),
        ([crop(1, 5).replace(END, "") + crop(2, 3)[len(THINK) :], answer("B")], 0),
        ([THINK + answer("B")], 0),
        ([answer("B", think="")], 0),
        ([crop(1, 5)], 0),
        ([answer("B").replace("<answer>", "so <answer>")], 0),
        ([answer("B").replace(END, "<b>x</b>")], 0),
        ([answer("B").replace("</answer>", "")], 0),
        ([], 0),
    ],
)
def test_vital_format(turns, form):
    assert reward("vital", turns, executed=0).format == form


# --- DeepVideo-R1 ---------------------------------------------------------------------------------


def test_deepvideo_r1_by_hand():
    named = ("accuracy", "format", "tool")
    assert parts(reward("deepvideo_r1", [answer("B")]), *named) == [1, 1, 0, 2]
    assert parts(reward("deepvideo_r1", [answer("C")]), *named) == [0, 1, 0, 1]
    assert parts(reward("deepvideo_r1", [answer("B", think="")]), *named) == [1, 0, 0, 1]
    assert reward("deepvideo_r1", [crop(1, 5), answer("B")]).format == 0, "it has no tools"
    open_answers = ["the Door!", "red door"]
    found = [reward("deepvideo_r1", [answer(a)], "door", "oe").accuracy for a in open_answers]
    assert found == [1.0, 0.0]
    window = reward("deepvideo_r1", [answer("2 to 6")], "4, 8", "tvg")
    assert window.total == pytest.approx(1 + 1 / 3)


def test_deepvideo_r1_grounded_answers():
    turns, seen = [answer("B. From 2 to 6.")], ((4, 8),)
    result = reward("deepvideo_r1", turns, evidence=seen, grounded=True)
    assert parts(result, "grounding") == pytest.approx([1 / 3, 2 + 1 / 3])
    assert "grounding" not in reward("deepvideo_r1", turns, evidence=seen).as_dict()
    assert reward("deepvideo_r1", [answer("B")], evidence=seen, grounded=True).total == 2


# --- Video-o3 -------------------------------------------------------------------------------------


def test_video_o3_single_clue_by_hand():
    """Asked (0, 4) and (2, 6), clue (4, 8): IoU 1/4, IoP 1/3, IoG 1/2, DIoU 1/4 - 9/64."""
    turns = [ground(0, 4), ground(2, 6, "fine"), answer("(B) the door")]
    result = reward("video_o3", turns, evidence=((4, 8),))
    clue = (1 / 4 + 1 / 3 + 1 / 2 + (1 / 4 - 9 / 64 + 1) / 2) / 4
    beta = (clue + 1) / 2 * (1 - 0.05)
    terms = ("accuracy", "format", "clue", "bonus", "tool")
    assert parts(result, *terms) == pytest.approx([1, 1, clue, beta, beta, 2 + beta])
    assert parts(result, "iou", "iop", "iog", "diou")[:4] == pytest.approx(
        [1 / 4, 1 / 3, 1 / 2, 1 / 4 - 9 / 64]
    )


def test_video_o3_several_clues_by_hand():
    """Asked (0, 2), clues (1, 2) and (8, 9): IoU 1/3, IoP = IoG = 1/2; no decay."""
    turns = [ground(0, 2), ground(0, 2), answer("B.")]
    clue = (2 / 3 + 1 / 2 + 1 / 2) / 4
    result = reward("video_o3", turns, evidence=((8, 9), (1, 2)))
    assert parts(result, "clue", "tool") == pytest.approx([clue, (clue + 1) / 2, 2.5 + clue / 2])


@pytest.mark.parametrize(
    ("kind", "turns", "beta"),
    [
        *(("clue_single_w_tool", 0, 0), ("clue_single_w_tool", 1, 0.7)),
        *(("clue_single_w_tool", 3, 0.63), ("clue_multi_w_tool", 3, 0.7)),
        *(("clue_multi_w_tool", 0, 0), ("clue_single_wo_tool", 0, 0.75)),
        *(("clue_single_wo_tool", 2, 0.6), ("clue_multi_wo_tool", 2, 0.5)),
        *(("free_form", 0, 0.5), ("temporal_grounded_qa", 1, 0.75)),
        *(("temporal_grounded_qa", 5, 0.6), ("temporal_grounded_qa", 0, 0)),
        *(("temporal_grounding", 2, 0), ("clue_single_w_tool", 41, -0.7)),
    ],
)
def test_video_o3_table(kind, turns, beta):
    assert bonus(kind, turns, clue=0.4) == pytest.approx(beta)


def test_video_o3_clue_score_of_one_and_several():
    found = overlap([(0, 2)], [(0, 2)])
    assert clue_score("clue_single_w_tool", found) == clue_score("clue_multi_w_tool", found) == 1.0
    far = overlap([(0, 1)], [(99, 100)])
    assert clue_score("clue_multi_w_tool", far) == 0.0
    assert clue_score("clue_single_w_tool", far) == pytest.approx((1 - 0.99**2) / 8)


def test_video_o3_kinds_go_by_the_evidence_or_by_name():
    direct, looked = [answer("B")], [ground(0, 2), answer("B")]
    assert reward("video_o3", direct).tool == 0.5, "free form"
    assert reward("video_o3", direct, evidence=((0, 2),)).tool == 0.0
    assert reward("video_o3", looked, evidence=((0, 2),)).tool == 1.0
    named = reward("video_o3", direct, kind="clue_single_wo_tool", evidence=((0, 2),))
    assert named.tool == 0.75
    window = reward("video_o3", [answer("2 to 6")], "4, 8", "tvg", evidence=((4, 8),))
    assert parts(window, "accuracy", "tool") == pytest.approx([1 / 3, 0, 1 + 1 / 3])
    window = reward("video_o3", [answer("2 to 6")], "4, 8", "temporal_grounding")
    assert window.accuracy == pytest.approx(1 / 3)


def test_video_o3_bonus_needs_a_right_answer_a_strict_form_and_a_call_that_ran():
    looked, seen = [ground(0, 2), answer("B")], ((0, 2),)
    assert reward("video_o3", looked, "C", evidence=seen).total == 1.0
    assert reward("video_o3", [ground(0, 2, "soon"), answer("B")], evidence=seen).total == 1.5
    assert reward("video_o3", looked, evidence=seen, executed=0).tool == 0.0
    source = reward("video_o3", looked, evidence=seen, executed=0, compat="reference")
    assert source.tool == 1.0
    many = [ground(0, 2)] * 41 + [answer("B")]
    assert reward("video_o3", many, evidence=seen).tool == 0.0
    assert reward("video_o3", many, evidence=seen, compat="reference").tool == pytest.approx(-1)


@pytest.mark.parametrize(
    ("turns", "form"),
    [
        ([answer("B")], 1),
        (["\n" + THINK + "\n<answer>B</answer>\n"], 1),
        (["\n\n" + answer("B")], 0),
        ([ground(0, 2), answer("B")], 1),
        ([ground(2, 2), answer("B")], 1 / 2),
        ([ground(2, 1, "soon"), answer("B")], 0),
        ([ground(0, 2), ground(0, '"2"'), answer("B")], 2 / 3),
        ([ground(0, "2, 3"), answer("B")], 1 / 2),
        ([ground(0, "true"), answer("B")], 1 / 2),
        ([THINK + "<grounding>{</grounding>", answer("B")], 0),
        ([THINK + "<grounding>{</grounding>", ground(0, 2), ground(0, 2), answer("B")], 1 / 2),
        ([ground(0, 2), ground(0, 2)], 0),
        ([answer("B"), answer("B")], 0),
        ([crop(0, 2), answer("B")], 0),
        ([], 0),
    ],
)
def test_video_o3_format(turns, form):
    assert reward("video_o3", turns, executed=9).format == pytest.approx(form)


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        *(("B", 1), ("B. the door", 1), ("(B) the door", 1), (" B ", 1), ("b", 0), ("C", 0)),
        *(("B the door", 0), ("the answer is B", 0), ("(B", 0), ("", 0)),
    ],
)
def test_video_o3_letters_are_strict(text, accuracy):
    assert reward("video_o3", [answer(text)]).accuracy == accuracy


# --- VISD -----------------------------------------------------------------------------------------

STAMPED = "<think>At <t>5</t>s it opens, at <t>9</t>s it shuts.</think>"


def test_visd_windows_by_hand():
    """2 to 6 against 4 to 8; one of two stamps (5, 9) is inside."""
    turns = [answer("From <t>2</t>s to <t>6</t>s", STAMPED)]
    terms = ("accuracy", "thk_temporal_segment", "thk_temporal_point", "ans_tiou", "format")
    result = reward("visd", turns, "4, 8", "tvg", evidence=((0, 1),))
    assert parts(result, *terms) == pytest.approx([1 / 3, 1 / 2, 0, 0, 1, 11 / 6])


@pytest.mark.parametrize(
    ("progress", "width"), [(0.0, 4.0), (0.5, 2.0), (0.74, 1.04), (0.75, 1.0), (1.0, 1.0)]
)
def test_visd_points_grow_strict(progress, width):
    """Stamps 5 (inside) and 9 (2 from the nearest evidence)."""
    result = reward("visd", [answer("B", STAMPED)], evidence=((4, 7), (30, 40)), progress=progress)
    point = (1 + math.exp(-(2**2) / (2 * width**2))) / 2
    assert parts(result, "accuracy", "thk_temporal_point") == pytest.approx([1, point, 2 + point])


def test_visd_key_frames_are_windows_without_length():
    assert visd.point_score([5.0], ((4.0, 4.0),), 1.0) == pytest.approx(math.exp(-0.5))
    assert visd.point_score([], ((4.0, 4.0),), 1.0) == visd.point_score([5.0], (), 1.0) == 0.0
    assert visd.times("<t>1.5</t>s <t>1.2.3</t>s <t>2</t>") == [1.5, math.inf]
    assert visd.point_score([math.inf, 4.0], ((4.0, 4.0),), 1.0) == 0.5


def test_visd_grounded_answers():
    turns, seen = [answer("B. From <t>2</t>s to <t>6</t>s", STAMPED)], ((4, 8),)
    terms = ("accuracy", "ans_tiou", "thk_temporal_segment", "thk_temporal_point", "format")
    result = reward("visd", turns, evidence=seen, grounded=True)
    assert parts(result, *terms) == pytest.approx([1, 1 / 3, 1 / 2, 0, 1, 2 + 5 / 6])


def test_visd_open_answers():
    texts = "The cat sat on the mat", "the cat lay on the mat"
    assert reward("visd", [answer(texts[0])], texts[1], "oe").accuracy == rouge_mean(*texts)


@pytest.mark.parametrize(
    ("think", "kind", "seen", "form"),
    [
        (THINK, "mcq", (), 1),
        (THINK, "mcq", ((4, 8),), 0.5),
        (THINK.replace("late", "at <t>5</t>s"), "mcq", ((4, 8),), 1),
        (THINK.replace("late", "at <t>5</t>s"), "tvg", (), 0.5),
        (STAMPED, "tvg", (), 1),
        (STAMPED.replace("</t>", "", 1), "tvg", (), 0),
        (THINK.replace("door", "<obj>door"), "mcq", (), 0),
        (THINK.replace("</think>", ""), "mcq", (), 0),
        ("", "mcq", (), 0),
    ],
)
def test_visd_format(think, kind, seen, form):
    truth = "4, 8" if kind == "tvg" else "B"
    assert reward("visd", [answer("B", think)], truth, kind, evidence=seen).format == form


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", scheme_names())
def test_nothing_said_is_worth_nothing(scheme):
    result = reward(scheme, [], executed=0, evidence=((0, 1),))
    assert set(result.as_dict().values()) == {0.0}
    assert set(result.as_dict()) == set(ranges(RewardRules(scheme=scheme)))


@pytest.mark.parametrize("scheme", scheme_names())
@pytest.mark.parametrize("kind", ["mcq", "oe", "tvg"])
def test_the_format_weight_weighs_the_format(scheme, kind):
    turns = [answer("B", STAMPED)]
    totals = [reward(scheme, turns, "B", kind, format_weight=w).total for w in (0.0, 1.0, 3.0)]
    form = reward(scheme, turns, "B", kind).format
    assert [total - totals[0] for total in totals[1:]] == pytest.approx([form, 3 * form])


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ({"scheme": "best"}, "scheme=best: choose .*paravt, .* or vital"),
        ({"fresh_seconds": -1.0}, "fresh_seconds=-1: must be at least 0"),
        ({"fresh_seconds": 1.0, "compat": "reference"}, "fresh_seconds=1 is no rule"),
        ({"mode": "precise", "compat": "reference"}, "mode=precise is no rule"),
        ({"scheme": "vital", "iou_scale": (0.8, 0.2)}, "iou_scale"),
        ({"scheme": "vital", "iou_scale": (0.2, 1.2)}, "iou_scale"),
    ],
)
def test_settings_without_meaning_are_refused(rules, complaint):
    with pytest.raises(ValueError, match=complaint):
        RewardRules(**rules)


def test_video_o3_reads_the_tags_of_its_call_syntax():
    own = SYNTAXES["grounding"]
    assert ground(0, 1).startswith(THINK + own.open) and own.close in ground(0, 1)
