"""Random and mutated completions through parser and rewards, with an eye on the whole process.

    python tests/support/fuzz_completions.py COUNT [SEED]

Run from the root of the checkout. No text may raise, give a reward outside of its range, open a
file, import a module, start a process or run code: an audit hook ends the process that does.
"""

import os.path
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[0] = os.path.dirname(os.path.dirname(here))

import json
import pathlib
import random
import warnings
from collections import Counter

from paravt_jax.protocol import crop_window, parse_tool_calls, parses_strictly
from paravt_jax.rewards import RewardRules, ranges, scheme_names, score

CASES = pathlib.Path(__file__).parents[1] / "data" / "reference_cases"
FORBIDDEN = ("open", "exec", "import", "subprocess.", "socket.", "os.", "shutil.", "ctypes.")
"""Audit events: running compiled code is "exec", evaluating text would be "compile" and "exec"."""
WAYS = ("tool_call", "grounding")
DURATION = 64.0
GOOD = (
    '<think>\nI look at two parts.\n</think>\n<tool_call>\n{"name": "crop_video", "arguments": '
    '{"start_time": 1, "end_time": 5.5}}\n</tool_call>\n<tool_call>\n{"name": "crop_video", '
    '"arguments": {"start_time": "0:36", "end_time": "40 s"}}\n</tool_call><|im_end|>'
    "<think>\nIt was red, from 36 to 40.\n</think>\n<answer>36 to 40</answer><|im_end|>"
)
PIECES = [
    *("<answer>red</answer>", "<answer>\nB\n</answer>", "<answer>36 to 40</answer>", GOOD[:260]),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>"),
    *("<tool_code>", "</tool_code>", "<tool_response>", "</tool_response>", "<grounding>"),
    *("</grounding>", "<|im_end|>", "<|im_start|>", "<|vision_end|>", "crop_video(", "print("),
    *('{"name": "crop_video", "arguments": {', '"start_time": ', '"end_time": ', "}}", ")", "'"),
    *("__import__('os').system('touch x')", "open('/etc/passwd')", "../../etc/passwd", "file://x"),
    *('"video_path": "/etc/passwd", ', "exec('1')", "lambda: 0", "\\N{DASH}", "'\\d'", "f'{x}'"),
    *("[" * 300, "]" * 300, '{"a":' * 200, "(" * 250, "-" * 3000, "9" * 5000, "1e999", "NaN"),
    *("0x" + "f" * 1500, "-1", "1.2.3, 5", "36 to 40", "B", "the answer is (C)", "0:36-0:40"),
    *("\0", "\ud800", "\udfff", "\u202e", "İ", "ß", "½", "٣", "打开", "\r", "\u2028", "\x1c", "  "),
    *(
        "<obj>car</obj><box>[1,2,3,4]</box>at<t>3.2</t>s",
        "<t>",
        "</t>",
        '"temporal_segment": [1, 2]',
    ),
]
ANSWERS = [("red", "oe"), ("B", "mcq"), ("36 to 40", "tvg"), ("", "oe"), ("1.2.3, 5", "tvg")]
RULES = [
    *(RewardRules(scheme=scheme) for scheme in scheme_names()),
    RewardRules(answer_suffix=False, anchor_weight=0.0, mode="exact"),
    RewardRules(compat="reference"),
]


def seeds_of_cases() -> list[str]:
    """Completions that people thought of."""
    texts = [GOOD]
    for name, key in (("parser_cases.jsonl", "text"), ("reward_cases.jsonl", "completion")):
        lines = (CASES / name).read_text(encoding="utf-8").splitlines()
        texts += [case[key] for case in map(json.loads, lines) if case.get(key)]
    return texts


def completion(dice: random.Random, texts: list[str]) -> str:
    """Pieces and noise, or a completion with some spans cut, doubled, moved or replaced."""
    if dice.random() < 0.3:
        return "".join(_noise(dice) for _ in range(dice.randrange(12)))
    text = dice.choice(texts)
    for _ in range(dice.randrange(1, 8)):
        start, stop = sorted(dice.randrange(len(text) + 1) for _ in range(2))
        stop = min(stop, start + dice.choice([0, 1, 3, 30, 300]))
        at = dice.randrange(len(text) + 1)
        span = dice.choice(["", "", _noise(dice), text[start:stop] * 2, text[at : at + 40]])
        text = text[:start] + span + text[stop:]
    return text[:20_000]


def _noise(dice: random.Random) -> str:
    if dice.random() < 0.7:
        return dice.choice(PIECES)
    return "".join(chr(dice.randrange(0x11000)) for _ in range(dice.randrange(20)))


def check_parser(text: str, seen: Counter) -> None:
    """Every way of reading calls gives calls, and every call a window or words."""
    for syntax in WAYS:
        for call in parse_tool_calls(text, syntax=syntax):
            outcome = crop_window(call, DURATION)
            assert isinstance(outcome, str) or 0 <= outcome[0] < outcome[1] <= DURATION
            seen["errors" if isinstance(outcome, str) else "windows"] += 1
            repr(call)
        seen["strict turns"] += parses_strictly(text, syntax=syntax)
    seen["reference calls"] += len(parse_tool_calls(text, "reference").tool_calls)


def check_rewards(text: str, rules: RewardRules, answer: str, kind: str, seen: Counter) -> None:
    """Every term lies in its range. The release raises on intervals such as "1.2.3, 5"."""
    try:
        rewards = score(text, answer, kind, rules, executed_calls=1, evidence=((36.0, 40.0),))
    except ValueError as error:
        assert rules.compat == "reference" and "could not convert" in str(error)
        seen["as the release: raised"] += 1
        return
    found, allowed = rewards.as_dict(), ranges(rules)
    for name, (lowest, highest) in allowed.items():
        assert lowest - 1e-9 <= found[name] <= highest + 1e-9, (name, found[name], allowed[name])
    assert found["total"] == found["total"]
    seen["accurate"] += rewards.accuracy > 0


def forbid(event: str, arguments: tuple) -> None:
    """An audit hook; what it raises cannot be caught by mistake, it ends the process."""
    if event.startswith(FORBIDDEN):
        sys.stderr.write(f"forbidden: {event} {arguments!r}"[:500] + "\n")
        os._exit(3)


def main(count: int, seed: int, texts: list[str]) -> Counter:
    """Check `count` completions; figures of what they were."""
    dice, seen = random.Random(seed), Counter()
    for number in range(count):
        text = completion(dice, texts)
        try:
            check_parser(text, seen)
            answer, kind = ANSWERS[number % len(ANSWERS)]
            rules = RULES[number // len(ANSWERS) % len(RULES)]
            check_rewards(text, rules, answer, kind, seen)
        except BaseException:
            sys.stderr.write(f"completion {number} of seed {seed}: {ascii(text)[:2000]}\n")
            raise
        seen["completions"] += 1
    return seen


if __name__ == "__main__":
    warnings.simplefilter("error")
    how_many, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    known = seeds_of_cases()
    main(200, 10**6 + first, known)  # What is imported or compiled once, is so before the hook.
    sys.addaudithook(forbid)
    print(json.dumps(main(how_many, first, known)))
