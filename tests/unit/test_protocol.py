"""Tool calls, strict turns and crop windows."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravt_jax import protocol
from paravt_jax.protocol import crop_window, parse_seconds, parse_tool_calls, parses_strictly
from paravt_jax.records import ToolCall

CALL = """<tool_call>
{"name": "crop_video", "arguments": {"start_time": 1, "end_time": 5}}
</tool_call>"""
THINK = "<think>\nI look at all parts.\n</think>\n"
DURATION = 64.0


def crop(**arguments):
    return ToolCall(name="crop_video", arguments=arguments)


def errors(text, **options):
    return [call.error for call in parse_tool_calls(text, **options)]


# --- Parsing --------------------------------------------------------------------------------------


def test_calls_come_in_order():
    other = CALL.replace("1,", "7.5,").replace("5}", "9}")
    calls = parse_tool_calls(THINK + CALL + "\n" + other + "<|im_end|>")
    assert [call.arguments["start_time"] for call in calls] == [1, 7.5]
    assert [call.error for call in calls] == [None, None]


def test_thinking_about_a_tag_is_not_calling():
    assert parse_tool_calls("<think>use <tool_call> maybe</think>") == ()
    assert errors(f"<think>use <tool_call> maybe</think>{CALL}") == [None]


def test_without_closed_thinking_all_of_the_turn_is_read():
    assert errors("<think>never closed\n" + CALL) == [None]


def test_one_bad_call_does_not_cost_the_others():
    assert [error is None for error in errors(f"<tool_call>{{bad}}</tool_call>{CALL}")] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("<tool_call>{bad json}</tool_call>", "not valid JSON"),
        ("<tool_call></tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "crop_video", "arguments": {"a": NaN}}</tool_call>', "NaN"),
        ("<tool_call>" + "[" * 9_999 + "</tool_call>", "nested too deeply"),
        ("<tool_call>" + "[" * 50 + "]" * 50 + "</tool_call>", "nested too deeply"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "longer than 10000 characters"),
        ("<tool_call>[]</tool_call>", "one JSON object, not a list"),
        ("<tool_call>5</tool_call>", "one JSON object, not a number"),
        ('<tool_call>{"arguments": {}}</tool_call>', '"name"'),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', '"name"'),
        ('<tool_call>{"name": "crop_video"}</tool_call>', '"arguments" must be'),
        ('<tool_call>{"name": "crop_video", "arguments": null}</tool_call>', '"arguments" must be'),
        ('<tool_call>{"name": "crop_video", "arguments": {}}', "never closed"),
        ('{"name": "crop_video", "arguments": {}}</tool_call>', "never opened"),
    ],
)
def test_each_malformed_block_says_what_is_wrong(block, complaint):
    (error,) = errors(THINK + block)
    assert complaint in error
    assert errors(THINK + block + CALL)[-1] is None


def test_an_unclosed_block_ends_where_the_next_begins():
    assert [error is None for error in errors('<tool_call>{"name"' + CALL)] == [False, True]


def test_code_calls_are_read_as_released_only():
    code = '<tool_code>\nprint(crop_video("v.mp4", 10, 20))\n# or not\n</tool_code>'
    assert errors(THINK + code + CALL) == [None]
    (call,) = parse_tool_calls(THINK + code, "reference").tool_calls
    asked = {"video_path": "v.mp4", "start_time": 10, "end_time": 20}
    assert (call.name, json.loads(call.arguments_json)) == ("crop_video", asked)


@pytest.mark.parametrize(
    "code", ["__import__('os').abort()", "crop_video(start_time=f())", "x = 1"]
)
def test_code_is_never_run(code):
    assert not parse_tool_calls(f"<tool_code>{code}</tool_code>", "reference").tool_calls


def test_unknown_switches_are_refused():
    with pytest.raises(ValueError, match="compat='old'"):
        parse_tool_calls("", "old")
    with pytest.raises(ValueError, match="call_syntax='xml'"):
        parse_tool_calls("", syntax="xml")


PIECES = [
    *protocol.STRUCTURAL_TAGS,
    "<tool_code>",
    "</tool_code>",
    "<|im_end|>",
    '{"name": "crop_video"',
]
PIECES += [
    ', "arguments": {"start_time": "1:',
    '5"}}',
    "crop_video(",
    ")",
    "'",
    "\\ud800",
    "\0",
    "\n",
    "-",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8))).map("".join)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_no_text_makes_anything_raise(text):
    for call in parse_tool_calls(text):
        outcome = crop_window(call, DURATION)
        if isinstance(outcome, str):
            outcome.encode()
        else:
            assert 0 <= outcome[0] < outcome[1] <= DURATION
    parse_tool_calls(text, "reference")
    parses_strictly(text)


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(),
        st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    )
)
def test_what_json_writes_is_read_back(arguments):
    call = {"name": "crop_video", "arguments": arguments}
    text = f"<tool_call>{json.dumps(call)}</tool_call>"
    if any(tag in text[11:-12] for tag in ("<tool_call>", "</tool_call>", "</think>")):
        return
    assert parse_tool_calls(text) == (ToolCall("crop_video", arguments),)


# --- Strict turns ---------------------------------------------------------------------------------

ANSWER = "<answer>B</answer>"


@pytest.mark.parametrize(
    "turn",
    [
        THINK + ANSWER,
        THINK + ANSWER + "<|im_end|>",
        THINK + CALL,
        THINK + CALL + CALL + "\n" + CALL + "\n<|im_end|>\n",
        "<think></think>" + ANSWER,
        "<think>maybe <tool_call>?</think>" + CALL,
    ],
)
def test_well_formed_turns(turn):
    assert parses_strictly(turn)


@pytest.mark.parametrize(
    "turn",
    [
        "",
        THINK,
        ANSWER,
        CALL,
        "<think>never closed" + ANSWER,
        "x" + THINK + ANSWER,
        "<think><think>twice</think>" + ANSWER,
        THINK + THINK + ANSWER,
        THINK + ANSWER + ANSWER,
        THINK + "<answer> \n</answer>",
        THINK + "<answer>B",
        THINK + "<answer>",
        THINK + "so " + ANSWER,
        THINK + ANSWER + "!",
        THINK + CALL + ANSWER,
        THINK + CALL + "and" + CALL,
        THINK + CALL + "</tool_call>",
        THINK + CALL.removesuffix("</tool_call>"),
        THINK + "<tool_call>{}</tool_call>",
        THINK + "<tool_call></think>" + CALL,
        THINK + "<tool_code>crop_video(1, 2)</tool_code>",
        THINK + ANSWER + "<|im_end|><|im_end|>",
        THINK + "<answer>B<|im_end|></answer>",
    ],
)
def test_malformed_turns(turn):
    assert not parses_strictly(turn)


# --- Crop windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "window"),
    [
        ({"start_time": 1, "end_time": 5.5}, (1.0, 5.5)),
        ({"start": 1, "end": 5}, (1.0, 5.0)),
        ({"start_time": "00:10", "end_time": "01:00"}, (10.0, 60.0)),
        ({"start_time": "10", "end_time": "12.5 s"}, (10.0, 12.5)),
        ({"start_time": -3, "end_time": 5}, (0.0, 5.0)),
        ({"start_time": 60, "end_time": 1e300}, (60.0, 64.0)),
        ({"video_path": "/etc/passwd", "start_time": 0, "end_time": 1}, (0.0, 1.0)),
    ],
)
def test_windows(arguments, window):
    assert crop_window(crop(**arguments), DURATION) == window


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, 'needs "start_time"'),
        ({"start_time": 1}, 'needs "end_time"'),
        ({"start_time": 5, "end_time": 5}, "must be less than"),
        ({"start_time": -9, "end_time": -3}, "must be less than"),
        ({"start_time": 64, "end_time": 70}, "beyond the end"),
        ({"start_time": True, "end_time": 5}, "number of seconds"),
        ({"start_time": float("nan"), "end_time": 5}, "number of seconds"),
        ({"start_time": 1, "end_time": float("inf")}, "number of seconds"),
        ({"start_time": 1, "end_time": 10**400}, "number of seconds"),
        ({"start_time": "soon", "end_time": 5}, "'soon'"),
        ({"start_time": [1], "end_time": 5}, "number of seconds"),
        ({"start_time": None, "end_time": 5}, "number of seconds"),
    ],
)
def test_impossible_windows_say_why(arguments, complaint):
    assert complaint in crop_window(crop(**arguments), DURATION)


def test_other_tools_and_broken_calls_say_why():
    assert "unknown tool 'zoom'" in crop_window(ToolCall("zoom", {}), DURATION)
    assert crop_window(ToolCall("crop_video", {}, error="no"), DURATION) == "no"


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), float("inf")])
def test_a_video_without_length_is_our_own_fault(duration):
    with pytest.raises(ValueError, match="duration"):
        crop_window(crop(start_time=0, end_time=1), duration)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1:02:03", 3723.0),
        ("0:36.5", 36.5),
        ("-2", -2.0),
        ("5 seconds", 5.0),
        ("1.2.3", None),
        ("", None),
    ],
)
def test_seconds(value, seconds):
    assert parse_seconds(value) == seconds
