"""The words an agent and its tools exchange: tags, tool calls, crop windows.

Two parsers live behind one door. `compat="fixed"` is the one that runs: strict, call by call, and
every fault becomes an error text that the model can read. `compat="reference"` returns what the
parser of the ParaVT release (commit cf55249) returns, for comparison only.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal, overload

from paravt_jax.records import ToolCall

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
CODE_OPEN, CODE_CLOSE = "<tool_code>", "</tool_code>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
GROUNDING_OPEN, GROUNDING_CLOSE = "<grounding>", "</grounding>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

TOOL_NAME = "crop_video"
"""The tool that looks at a part of the video."""
GROUNDING_TOOL = "grounding"
"""The tool that Video-o3's `<grounding>` tag calls."""


@dataclasses.dataclass(frozen=True)
class CallSyntax:
    """How an agent writes its tool calls."""

    open: str
    """Tag before a call."""
    close: str
    """Tag after a call."""
    tool: str | None = None
    """The one tool that such a call can mean: its arguments, a JSON object, stand between the tags.
    None: a JSON object of "name" and "arguments" stands there."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags whose tokens make up the structure of a rollout."""
        return (THINK_OPEN, THINK_CLOSE, self.open, self.close, ANSWER_OPEN, ANSWER_CLOSE)


Syntax = Literal["tool_call", "grounding"]
SYNTAXES = {
    "tool_call": CallSyntax(CALL_OPEN, CALL_CLOSE),
    "grounding": CallSyntax(GROUNDING_OPEN, GROUNDING_CLOSE, GROUNDING_TOOL),
}
"""Call syntaxes by name: `tool_call` is Qwen's own, as in ParaVT, LongVT and VITAL; `grounding` is
Video-o3's (arXiv 2601.23224)."""

STRUCTURAL_TAGS = SYNTAXES["tool_call"].tags
"""Tags whose tokens make up the structure of a rollout in the syntax `tool_call`."""


def window_tool(name: str, description: str) -> dict[str, Any]:
    """Schema of a tool that looks at a part of the video, in the form that chat templates take."""
    start, end = (
        {"type": "number", "description": f"{word} of the part, in seconds."}
        for word in ("Start", "End")
    )
    parameters = {
        "type": "object",
        "properties": {"start_time": start, "end_time": end},
        "required": ["start_time", "end_time"],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


CROP_VIDEO_TOOL = window_tool(
    TOOL_NAME, "Watch one part of the video closely and get a description of it."
)
"""Schema of the crop tool."""

Window = tuple[float, float]

_LONGEST_QUOTE = 40
_LONGEST_CALL = 10_000
DEEPEST_CALL = 8
"""Levels of lists and dictionaries in a call."""
_LONGEST_LINE = 10_000
"""Characters that Python's own parser is given: it may exhaust the stack on very long ones, which
no exception would tell."""


@dataclasses.dataclass(frozen=True)
class ReferenceCall:
    """A tool call as the released parser returns it."""

    name: Any
    """Whatever the JSON holds under "name"."""
    arguments_json: str
    """The arguments, serialised again."""


@dataclasses.dataclass(frozen=True)
class ReferenceParse:
    """What the released parser returns for one turn."""

    tools_called: bool
    tool_calls: tuple[ReferenceCall, ...]
    content: str | None
    """Text before the first call, None if empty; the whole text if no call was parsed."""


@overload
def parse_tool_calls(
    text: str, compat: Literal["fixed"] = "fixed", *, syntax: str = "tool_call"
) -> tuple[ToolCall, ...]: ...


@overload
def parse_tool_calls(
    text: str, compat: Literal["reference"], *, syntax: str = "tool_call"
) -> ReferenceParse: ...


def parse_tool_calls(
    text: str, compat: str = "fixed", *, syntax: str = "tool_call"
) -> tuple[ToolCall, ...] | ReferenceParse:
    """Tool calls of one assistant turn, in text order. Never raises on any text.

    Args:
        text: one assistant turn.
        compat: "fixed" reads only what follows the last `</think>` (all of the text if there is
            none), takes each block on its own, and returns a malformed one as a `ToolCall` with
            `error` set. "reference" reproduces the released parser.
        syntax: how calls are written, a name of `SYNTAXES`; others than "tool_call" only for
            compat="fixed".

    Raises:
        ValueError: unknown `compat` or `syntax`, or a combination that does not exist.
    """
    if compat not in ("fixed", "reference"):
        raise ValueError(f"compat={compat!r} is unknown; use 'fixed' or 'reference'")
    form = call_syntax(syntax)
    if form.tool and compat != "fixed":
        raise ValueError(f"syntax={syntax!r} is read with compat='fixed' only")
    if compat == "reference":
        return _reference_parse(text)
    return tuple(_calls(after_thinking(text), form))


def call_syntax(name: str) -> CallSyntax:
    """The syntax of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in SYNTAXES:
        raise ValueError(f"call_syntax={name!r} is unknown; choose one of {', '.join(SYNTAXES)}")
    return SYNTAXES[name]


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; all of the text if there is none."""
    return text.rpartition(THINK_CLOSE)[2]


def reported(text: str) -> str:
    """What a turn says besides its thought: what follows the last `</think>`, nothing where a
    thought was opened and never closed."""
    words = after_thinking(text)
    return "" if words.lstrip().startswith(THINK_OPEN) else words


def parses_strictly(turn: str, *, syntax: str = "tool_call") -> bool:
    """Whether one assistant turn is well formed to the letter.

    That is `<think>...</think>`, then either valid calls with only white space between them or
    exactly one `<answer>` with something in it, then at most one `<|im_end|>`. A rollout counts
    for `format/compliance` if all of its turns parse.

    Args:
        turn: text of the turn, its forced prefix included.
        syntax: how calls are written, a name of `SYNTAXES`.
    """
    text = turn.strip().removesuffix(TURN_END).rstrip()
    think, closed, action = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    if not (text.startswith(THINK_OPEN) and closed) or THINK_OPEN in think or THINK_CLOSE in action:
        return False
    action = action.strip()
    return _only_calls(action, syntax) or _only_answer(action)


def crop_window(call: ToolCall, duration: float | int) -> Window | str:
    """Window `(start, end)` in seconds that a `crop_video` call asks for, or what is wrong with it.

    Times are numbers, number texts, or "mm:ss"; `start` and `end` are accepted as short names.
    The start is clamped to 0 and the end to the duration. A `video_path` is ignored: a tool reads
    the row's own video and nothing else.

    Args:
        call: a parsed call, well formed or not.
        duration: length of the row's video in seconds.

    Returns:
        `0 <= start < end <= duration`, or an error text for the model.

    Raises:
        ValueError: `duration` is not a finite positive number.
    """
    if not math.isfinite(duration) or duration <= 0:
        raise ValueError(f"duration={duration} must be finite and positive; check the video file")
    if call.error is not None:
        return call.error
    if call.name != TOOL_NAME:
        return f"unknown tool {_quoted(call.name)}; the only tool is {TOOL_NAME}"
    times = call_times(call)
    return times if isinstance(times, str) else _clamped(*times, duration)


def call_times(call: ToolCall) -> Window | str:
    """The start and end in seconds that a call names, in whatever order and however far out.

    Times are numbers, number texts, or "mm:ss", under `start_time` and `end_time`, or `start` and
    `end` for short. An error text for the model if one is missing or no time.
    """
    times = [_argument(call, name) for name in ("start", "end")]
    for time in times:
        if isinstance(time, str):
            return time
    return float(times[0]), float(times[1])


def parse_seconds(value: Any) -> float | None:
    """Seconds meant by a number, a number text ("12.5", "12.5 s") or a clock text ("01:05").

    None for anything else, among it booleans, NaN and infinities.
    """
    # Before numbers: Python's True is 1, JSON's true is no time.
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return _finite(value)
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    parts = [float(part) for part in match["clock"].split(":")]
    seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
    return -seconds if match["sign"] else seconds


_TIME = re.compile(
    r"(?P<sign>-?)(?P<clock>(?:\d{1,4}:){0,2}\d{1,9}(?:\.\d{0,9})?)\s?(?:s|secs?|seconds?)?", re.I
)


def _only_calls(action: str, syntax: str) -> bool:
    """Whether the text is valid calls and white space, nothing else."""
    calls, form = parse_tool_calls(action, syntax=syntax), call_syntax(syntax)
    blocks = action.split(form.close)
    apart = all(block.lstrip().startswith(form.open) for block in blocks[:-1])
    whole = len(blocks) > 1 and not blocks[-1].strip()
    return apart and whole and all(call.error is None for call in calls)


def _only_answer(action: str) -> bool:
    """Whether the text is one `<answer>` with a body that holds no other tag."""
    if not (action.startswith(ANSWER_OPEN) and action.endswith(ANSWER_CLOSE)):
        return False
    body = action[len(ANSWER_OPEN) : -len(ANSWER_CLOSE)]
    tags = {TURN_START, TURN_END}.union(*(syntax.tags for syntax in SYNTAXES.values()))
    return bool(body.strip()) and not any(tag in body for tag in tags)


def _calls(text: str, syntax: CallSyntax) -> Iterator[ToolCall]:
    """Walk over the call blocks of a turn; a block ends at its closing tag or the next opening."""
    marks = list(_any_of((syntax.open, syntax.close)).finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    opened = False
    for mark, end in zip(marks, ends, strict=False):
        tag, body = mark.group(), text[mark.end() : end]
        if tag == syntax.close and not opened:
            yield _broken("a tool call ends that was never opened")
        elif tag == syntax.open:
            closed = text.startswith(syntax.close, end)
            yield _json_call(body, syntax) if closed else _broken("the tool call is never closed")
        opened = tag == syntax.open


@functools.cache
def _any_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tags)))


def _broken(error: str, name: str = "") -> ToolCall:
    return ToolCall(name=name, arguments={}, error=error)


def _json_call(body: str, syntax: CallSyntax) -> ToolCall:
    """What stands between the tags: a JSON object with a string "name" and an object "arguments",
    or the arguments alone where the syntax knows one tool only."""
    if len(body) > _LONGEST_CALL:
        return _broken(f"the call is longer than {_LONGEST_CALL} characters")
    try:
        call = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        return _broken("the call is nested too deeply")
    except ValueError as error:
        return _broken(f"the call is not valid JSON: {error}"[:200])
    if nests_beyond(call, DEEPEST_CALL):
        return _broken("the call is nested too deeply")
    if not isinstance(call, dict):
        return _broken(f"the call must be one JSON object, not {_kind(call)}")
    if syntax.tool:
        return ToolCall(name=syntax.tool, arguments=call)
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        return _broken('the call needs a "name" that is a text')
    if not isinstance(arguments, dict):
        return _broken(f'"arguments" must be a JSON object, not {_kind(arguments)}', name)
    return ToolCall(name=name, arguments=arguments)


def nests_beyond(value: Any, levels: int) -> bool:
    """Whether a JSON value has more levels than that. What Python reads may be too deep for it to
    print or compare a few frames further down the stack."""
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(nests_beyond(item, levels - 1) for item in inner)


def _refuse_constant(word: str) -> Any:
    """Python's JSON reader accepts NaN and Infinity; JSON does not."""
    raise ValueError(f"{word} is not a JSON number")


def _kind(value: Any) -> str:
    names = {type(None): "nothing", list: "a list", str: "a text", bool: "a truth value"}
    return names.get(type(value), "a number")


def _quoted(text: str) -> str:
    """A text from the model, short and printable, for an error message."""
    return ascii(text[:_LONGEST_QUOTE])


def _argument(call: ToolCall, name: str) -> float | str:
    """Time under `<name>_time` or `<name>`, or an error text."""
    key = f"{name}_time" if f"{name}_time" in call.arguments else name
    if key not in call.arguments:
        return f'{call.name} needs "{name}_time"'
    seconds = parse_seconds(call.arguments[key])
    if seconds is None:
        return f'"{key}" must be a number of seconds, not {_quoted(repr(call.arguments[key]))}'
    return seconds


def _clamped(start: float, end: float, duration: float) -> Window | str:
    start, wanted_end = max(start, 0.0), end
    if start >= wanted_end:
        return f"start_time {start:g} must be less than end_time {wanted_end:g}"
    if start >= duration:
        return f"start_time {start:g} is beyond the end of the video ({duration:g} seconds)"
    return start, min(wanted_end, duration)


def _finite(value: int | float) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # An integer beyond the range of a float.
        return None


# --- The released parser. Its regular expressions and order of attempts are its behaviour. -------

_POSITIONAL = {TOOL_NAME: ("video_path", "start_time", "end_time")}
_REFERENCE_CALL = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)
_REFERENCE_CODE = re.compile(r"<tool_code>(.*?)</tool_code>|<tool_code>(.*)", re.DOTALL)


def _reference_parse(text: str) -> ReferenceParse:
    """JSON blocks if all of them parse, else Python lines, else no call at all."""
    for tag, calls in (
        (CALL_OPEN, _reference_json_calls(text)),
        (CODE_OPEN, _reference_code_calls(text)),
    ):
        if calls:
            return ReferenceParse(True, calls, text[: text.find(tag)] or None)
    return ReferenceParse(False, (), text)


def _bodies(pattern: re.Pattern[str], text: str) -> list[str]:
    return [closed or unclosed for closed, unclosed in pattern.findall(text)]


def _reference_json_calls(text: str) -> tuple[ReferenceCall, ...]:
    """All or nothing: one bad block loses the others."""
    try:
        calls = [json.loads(body) for body in _bodies(_REFERENCE_CALL, text)]
        return tuple(_reference_call(call["name"], call["arguments"]) for call in calls)
    except (ValueError, TypeError, LookupError, RecursionError):
        return ()


def _reference_code_calls(text: str) -> tuple[ReferenceCall, ...]:
    lines = [line for body in _bodies(_REFERENCE_CODE, text) for line in body.strip().split("\n")]
    calls = [_python_call(line.strip()) for line in lines]
    try:
        return tuple(_reference_call(*call) for call in calls if call is not None and call[1])
    except (TypeError, ValueError, RecursionError):  # A literal that JSON cannot hold.
        return ()


def _reference_call(name: Any, arguments: Any) -> ReferenceCall:
    return ReferenceCall(name, json.dumps(arguments, ensure_ascii=False))


def _python_call(line: str) -> tuple[str, dict[str, Any]] | None:
    """Name and literal arguments of a call expression; `print(...)` around it is taken off.

    Positional arguments count only when no keyword argument is a literal.
    """
    call = _expression(line)
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print":
        call = call.args[0] if call.args and isinstance(call.args[0], ast.Call) else call
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        return None
    name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
    keywords = _literals((word.arg, word.value) for word in call.keywords)
    positional = zip(_POSITIONAL.get(name, ()), call.args, strict=False)
    return name, keywords or _literals(positional)


def _literals(pairs: Any) -> dict[str, Any]:
    """Evaluate literals only; whatever is not one is left out."""
    values = {}
    for name, node in pairs:
        try:
            if name is not None:
                values[name] = ast.literal_eval(node)
        except (ValueError, TypeError, RecursionError, MemoryError):
            continue
    return values


def _expression(line: str) -> ast.expr | None:
    """The line as an expression; a second attempt drops stray quotes at the closing parenthesis."""
    if len(line) > _LONGEST_LINE:
        return None
    mended = re.sub(r"\)\s*['\"].*$", ")", line)
    mended = re.sub(r"['\"](\s*\))", r"\1", mended)
    for text in (line, mended):
        # What a model writes is no code of ours to be warned about, and whether a warning is an
        # error must not decide what it means.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return ast.parse(text, mode="eval").body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
    return None
