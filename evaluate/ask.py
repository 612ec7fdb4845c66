"""Ask a model about a video: `python evaluate/ask.py VIDEO "QUESTION" --model DIR`.

The thought is shown as it is written, each crop as it goes out and comes back, then the answer.
Without a question, a session: a question a line, an empty one ends it.
"""

import os
import os.path
import sys

# Run as a script, `sys.path[0]` is this folder, where `import models` would find
# somebody else's. Swap it for the repository root before any other import.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from paravt_jax.failures import attempt, complain
from paravt_jax.flags import Parser

if TYPE_CHECKING:
    from evaluate.asking import Asker
    from paravt_jax.records import VideoRef

Show = Callable[[str, str], None]


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="evaluate/ask.py", description=__doc__)
    add = parser.add_argument
    add("video", help="a video file")
    add("questions", nargs="*", metavar="QUESTION", help="none: a session")
    add("--model", help="Hugging Face folder, or workdir of a run (default: the demo's cold start)")
    add("--recipe", help="take the settings of this recipe, not those that go with the model")
    add("--frames", type=int, metavar="K", help="frames shown at first (default: most in training)")
    add("--temperature", type=float, default=0.0, help="of every draw (default: 0, no draw)")
    add("--seed", type=int, help="of the draws (default: 0); needs a temperature")
    add("--max-tool-rounds", type=int, metavar="N", help="rounds of crops (default: the settings')")
    add("--max-tokens", type=int, metavar="N", help="longest turn (default: the settings')")
    add("--no-tools", action="store_true", help="answer from the first frames alone")
    add("--attention", metavar="KERNEL", help="what computes it (default: the settings')")
    add("--json", action="store_true", help="print one JSON object for each question instead")
    return parser


def check(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Refuse flags that do not fit one another."""
    if flags.frames is not None and flags.frames < 1:
        parser.error(f"--frames {flags.frames}: a prompt shows 1 or more")
    if not flags.temperature >= 0 or flags.temperature == float("inf"):
        parser.error(f"--temperature {flags.temperature}: give a number, 0 or above")
    if flags.seed is not None and not flags.temperature:
        parser.error(f"--seed {flags.seed} draws nothing at temperature 0; give --temperature 0.7")
    if flags.seed is not None and flags.seed < 0:
        parser.error(f"--seed {flags.seed}: give 0 or above")
    if flags.max_tokens is not None and flags.max_tokens < 1:
        parser.error(f"--max-tokens {flags.max_tokens}: give 1 or more")
    if flags.max_tool_rounds is not None and flags.no_tools:
        parser.error("--max-tool-rounds and --no-tools: give one of them")
    if flags.max_tool_rounds is not None and flags.max_tool_rounds < 1:
        parser.error(f"--max-tool-rounds {flags.max_tool_rounds}: give 1 or more, or --no-tools")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()
    flags = parser.parse_args(argv)
    check(parser, flags)
    return attempt(lambda: ask(flags), memory_remedies=["lower --frames or --max-tokens"])


def ask(flags: argparse.Namespace) -> None:
    """Open model and video, and put the questions.

    Raises:
      ValueError: either cannot be opened; without a session, a question that cannot be asked.
    """
    from pipelines.decode import video_ref

    # Before the model, whose imports alone take seconds.
    video = video_ref(flags.video)
    session = not flags.questions
    asker = open_asker(flags, video, silent if flags.json else shown())
    for question in typed_questions() if session else flags.questions:
        try:
            answer = asker(question)
        except ValueError as error:
            if not session:
                raise
            complain(error)
            continue
        line = json.dumps({"video": video.path, **answer.as_dict()}) if flags.json else answer
        print(line, flush=True)


def open_asker(flags: argparse.Namespace, video: "VideoRef", show: Show) -> "Asker":
    """What puts the questions, all of the model loaded."""
    note = silent if flags.json else print
    note("loading the model", flush=True)
    from evaluate.asking import Asker
    from evaluate.model import changed_rules, open_model
    from train.compile.cache import keep_compiled

    rounds = 0 if flags.no_tools else flags.max_tool_rounds
    limits = flags.temperature, rounds, flags.max_tokens
    model = open_model(
        flags.model,
        flags.recipe,
        lambda rules: changed_rules(rules, *limits),
        attention=flags.attention,
    )
    output, most = model.config.output, max(model.config.data.frame_budgets)
    keep_compiled(output.compile_cache, output.compile_cache_gb)
    frames = flags.frames or most
    name = os.path.basename(video.path)
    note(f"{name}, {video.duration:.1f} s, up to {frames} frames, to {model.name}")
    note("the first question takes longer: programs are compiled, and kept for next time\n")
    return Asker(model, video, frames, flags.seed or 0, show)


def typed_questions() -> Iterator[str]:
    """Questions from standard input, up to an empty line or its end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (lines can be edited and called back)
    prompt = "\n? " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def shown() -> Show:
    """Shows a rollout while it goes on: the model's own words as they come, dimmed on a terminal,
    what its crops do on lines of their own."""
    from rich.console import Console

    console, styles = Console(highlight=False), {"text": "dim", "call": "cyan", "report": "green"}
    fresh = True

    def show(text: str, kind: str) -> None:
        nonlocal fresh
        flows = kind == "text"
        if not flows and not fresh:
            console.print()
        end = "" if flows else "\n"
        console.print(text, end=end, style=styles[kind], markup=False, soft_wrap=True)
        sys.stdout.flush()
        fresh = not flows or text.endswith("\n")

    return show


def silent(*_: object, **__: object) -> None:
    """Say nothing: what is printed is JSON."""


if __name__ == "__main__":
    sys.exit(main())
