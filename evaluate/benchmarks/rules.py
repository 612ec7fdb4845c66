"""Sections of a protocol besides frames and subtitles: words, decoding, agent, scoring."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal

from paravt_jax.marks import Mark
from paravt_jax.ranges import above_to, at_least, within
from paravt_jax.settings import Refused, Settings, any_of

NAMES = (
    "question",
    "stem",
    "options",
    "instruction",
    "subtitles",
    "video_name",
    "video",
    "interleaved",
    *"ABCDEFGHIJ",
)
"""What may stand in braces in a user turn."""
OPTION_NAMES = ("letter", "option", "text")


@dataclasses.dataclass(frozen=True)
class PromptRules(Settings):
    """The words around frames and question."""

    system: str = ""
    """The system message; none where it is empty."""
    own_words: bool = False
    """Whether the agent's own system text, with which this project trains, stands in it."""
    tools: bool = False
    """Whether the chat template describes the tools in it. Not where `system` does."""
    user: str = "{video}{question}\n{options}\n{instruction}"
    """The user turn: `{video}` is where the frames stand; `{question}` as published, `{stem}`
    without the options that LVBench and MLVU have in it; `{options}` one to a line; `{A}`, `{B}`,
    ... the text of one option; `{instruction}`, `{subtitles}`, `{video_name}`; `{interleaved}`
    frames and subtitles of LongVideoBench."""
    suffix: Annotated[str, Mark.MAY_BE_BLANK] = ""
    """Follows the user turn."""
    option: str = "{letter}. {text}"
    """One line of `{options}`: its `{letter}`, the `{option}` as published, or its `{text}` without
    the letter that Video-MME's have."""
    instruction: str = ""
    """What to answer with."""

    def check_together(self) -> None:
        """Raises Refused for names that stand for nothing."""
        for name, text, allowed in (
            ("user", self.user, NAMES),
            ("suffix", self.suffix, NAMES),
            ("option", self.option, OPTION_NAMES),
        ):
            unknown = set(re.findall(r"\{(\w+)\}", text)) - set(allowed)
            if unknown:
                raise Refused(
                    self,
                    f"{{{name}:name}} holds {{wrong}}, which stands for nothing; write {{known}}",
                    wrong=", ".join(f"{{{word}}}" for word in sorted(unknown)),
                    known=any_of(f"{{{word}}}" for word in allowed),
                )


@dataclasses.dataclass(frozen=True)
class DecodingRules(Settings):
    """How an answer is drawn."""

    temperature: Annotated[float, at_least(0)] = 0.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, above_to(0, 1)] = 1.0
    top_k: Annotated[int, at_least(0)] = 0
    """0: all."""
    presence_penalty: Annotated[float, at_least(0)] = 0.0
    max_new_tokens: Annotated[int, at_least(1)] = 16
    """Of a turn."""
    seed: Annotated[int, at_least(0)] = 0
    """Draws are those of this seed and the sample's id."""

    @property
    def shown(self) -> str:
        """A few words for a table."""
        if self.temperature == 0:
            return f"greedy, {self.max_new_tokens} tokens"
        parts = [f"T={self.temperature:g}"]
        parts += [f"top_p={self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"top_k={self.top_k}"] if self.top_k else []
        parts += [f"presence={self.presence_penalty:g}"] if self.presence_penalty else []
        return f"{' '.join(parts)}, seed {self.seed}, {self.max_new_tokens} tokens"


@dataclasses.dataclass(frozen=True)
class AgentRules(Settings):
    """Tools: how often, how many at once, and what they show."""

    rounds: Annotated[int, at_least(0)] = 0
    """Rounds of tool calls; 0: no tools."""
    calls_per_turn: Annotated[int, at_least(1)] = 5
    dispatch: Literal["parallel", "sequential"] = "parallel"
    """Whether a turn may call several times, or once."""
    evidence: Literal["text", "frames"] = "text"
    """What a crop gives: the report of a sub-agent, or its frames."""
    response: str = "{count} frames from {start:.1f}s to {end:.1f}s."
    """Words with the frames of a crop."""
    crop_fps: Annotated[float, at_least(0.01)] = 1.0
    crop_frames: Annotated[int, at_least(1)] = 16
    """Most frames of a crop."""
    crop_min_pixels: Annotated[int, at_least(1)] = 784
    crop_max_pixels: Annotated[int, at_least(1)] = 50176
    """Pixels of a frame of a crop."""
    demand: Annotated[str, Mark.MAY_BE_EMPTY] = ""
    """The user turn after the last round, that demands the answer; none where it is empty: the turn
    just may not call."""
    answer_tokens: Annotated[int, at_least(1)] = 64
    """Of the turn after the last round."""
    think_prefix: Annotated[str, Mark.MAY_BE_EMPTY] = ""
    """Stands at the head of every turn."""


@dataclasses.dataclass(frozen=True)
class ScoringRules(Settings):
    """How an answer becomes a score, and scores become figures."""

    strip: tuple[tuple[str, ...], ...] = ()
    """Pairs of tags whose contents are dropped before anything is read."""
    extract: Literal[
        "mcq", "longvideobench", "mmvu", "charades", "timelens", "paravt", "vlmevalkit", "answer"
    ] = "mcq"
    """Whose function reads the answer; `answer` is this project's own."""
    choices: str = ""
    """Letters that may be read; empty: those of the question's options."""
    gold: Literal["published", "option-text"] = "published"
    """`option-text` looks for the option whose text equals the published answer, and takes `?`
    where there is none (ParaVT's driver on MLVU)."""
    letters_only: bool = False
    """Whether open questions are scored as letters (ParaVT's driver on MMVU)."""
    judge: bool = False
    """Whether a judge is asked where the rules find an answer wrong. Without one configured, the
    figure is that of the rules, and says so."""
    metric: str = "accuracy"
    """lmms-eval's name of the figure; the stem of its names for grounding."""
    aggregate: Literal["micro", "macro", "macro-all"] = "micro"
    """The mean over questions; over categories that have rows; over all of `categories`, where one
    without rows counts as 0."""
    by: str = "category"
    """The group that the macro mean is over."""
    categories: tuple[str, ...] = ()
    """The categories that count; questions of others are left out of the headline, and told. Empty:
    all."""
    collapse: bool = False
    """Whether identical annotations count once (lmms-eval keys Charades by them)."""
    count_errors: bool = False
    """Whether a second figure counts errors as wrong, as the harness does. The headline never
    does."""
    error_limit: Annotated[float, within(0, 1)] = 0.02
    """Largest share of errors with which there is a headline figure."""
    scale: Annotated[float, at_least(1)] = 1.0
    """100 where the harness prints percent."""
