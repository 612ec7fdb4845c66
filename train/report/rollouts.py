"""The rollouts of a run as files, for people and for viewers.

`rollouts/step_NNNNNN.jsonl` holds every rollout of a step. `details/` holds, within a bound on its
bytes, what a page shows besides: a line for each of the same rollouts, in the same order, and a
sheet of small frames for each prompt.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paravt_jax.protocol import parses_strictly
from paravt_jax.records import CallResult, QuestionType, RolloutGroup, Row, ToolCall, Trajectory
from paravt_jax.rewards.answers import extract_answer
from paravt_jax.rewards.metrics import intervals
from paravt_jax.rewards.overlap import asked_window, overlap
from pipelines.preprocess import FrameSpec
from train.hosts.cluster import from_first, is_first
from train.report.sheets import Sheet
from train.workdir.files import write_atomically

FOLDER, DETAILS = "rollouts", "details"
Values = Callable[[Trajectory], Mapping[str, np.ndarray]]
"""What is known of every token of a rollout, float32 `[t]` by name."""


@dataclasses.dataclass(frozen=True)
class RolloutLog:
    """Writes the rollouts of each step, and as many details as there is room for."""

    workdir: Path
    steps: int
    """Of the whole run."""
    room: float
    """Bytes that details may take."""
    contents: Sequence[bytes]
    """What each token stands for."""
    spec: FrameSpec
    """How frames became patches."""

    def __call__(
        self, step: int, groups: Sequence[RolloutGroup], values: Callable[[], Values] | None = None
    ) -> None:
        """Write a step. All hosts must ask, the first one writes."""
        if is_first():
            write_rollouts(self.workdir / FOLDER, step, groups)
        if values is not None and from_first(self._wants(step)):
            token_values = values()
            if is_first():
                self._write_details(step, groups, token_values)

    def _wants(self, step: int) -> bool:
        """Whether details of this step are to be written: such steps are spread evenly over the
        run."""
        return is_first() and self.room > 0 and self._taken(step) <= self.room * step / self.steps

    def _taken(self, step: int) -> int:
        """Bytes of the details of all other steps."""
        files = (self.workdir / DETAILS).glob("step_*")
        return sum(f.stat().st_size for f in files if not f.name.startswith(name_of(step)))

    def _write_details(self, step: int, groups: Sequence[RolloutGroup], values: Values) -> None:
        folder, name = self.workdir / DETAILS, name_of(step)
        files: dict[str, bytes] = {}
        lines: list[str] = []
        for number, group in enumerate(groups):
            sheet = f"{name}_{number:03d}.jpg"
            described, files[sheet] = details_of(group, sheet, self.contents, self.spec, values)
            lines += [json.dumps(line) + "\n" for line in described]
        text = "".join(lines)
        if sum(map(len, files.values())) + len(text) + self._taken(step) > self.room:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{name}*"):
            path.unlink()  # of a run that was stopped after this step
        for sheet, data in files.items():
            if data:
                (folder / sheet).write_bytes(data)
        write_atomically(folder / f"{name}.jsonl", text)


def name_of(step: int) -> str:
    """How the files of a step begin."""
    return f"step_{step:06d}"


def write_rollouts(folder: Path, step: int, groups: Sequence[RolloutGroup]) -> None:
    """One JSON object per trajectory in `step_NNNNNN.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(_describe(group, index, trajectory)) + "\n"
        for group in groups
        for index, trajectory in enumerate(group.trajectories)
    ]
    write_atomically(folder / f"{name_of(step)}.jsonl", "".join(lines))


def _describe(group: RolloutGroup, index: int, trajectory: Trajectory) -> dict[str, Any]:
    row, turns = group.row, trajectory.turns
    syntax, gold = trajectory.call_syntax, gold_windows(group.row)
    return {
        "row_id": row.row_id,
        "video": row.video.path,
        "duration": row.video.duration,
        "question": row.question,
        "answer": row.answer,
        "question_type": str(row.question_type),
        "gold": gold,
        "frame_budget": group.frame_budget,
        "overview_times": [times.tolist() for times in trajectory.prompt.times[:1]],
        "rollout": index,
        "text": trajectory.full_text,
        "said": extract_answer([turn.text for turn in turns]),
        "complies": all(parses_strictly(turn.text, syntax=syntax) for turn in turns),
        "rewards": trajectory.rewards,
        "stop_reasons": [str(turn.stop_reason) for turn in turns],
        "calls": trajectory.calls,
        "executed": trajectory.executed,
        "tool_calls": [
            _describe_call(number, call, result, trajectory, gold)
            for number, call, result in calls_of(trajectory)
        ],
        "subagents": [sub.full_text for sub in trajectory.subagents],
        "policy_version": trajectory.policy_version,
        "tokens": trajectory.tokens.tolist(),
        "generated": trajectory.generated.astype(int).tolist(),
        "chosen": trajectory.chosen.astype(int).tolist(),
        "log_probs": [round(value, 5) for value in trajectory.log_probs.tolist()],
        "versions": None if trajectory.versions is None else trajectory.versions.tolist(),
    }


def gold_windows(row: Row) -> list[tuple[float, float]]:
    """Where the answer can be seen: the evidence, else the answer where that is windows itself."""
    if row.evidence or row.question_type != QuestionType.GROUNDING:
        return list(row.evidence)
    return list(intervals(row.answer))


def calls_of(trajectory: Trajectory) -> Iterator[tuple[int, ToolCall, CallResult | None]]:
    """All calls with the number of their turn, from 1, and what came of them, if they were run."""
    for number, turn in enumerate(trajectory.turns, 1):
        results = turn.results or (None,) * len(turn.calls)
        for call, result in zip(turn.calls, results, strict=True):
            yield number, call, result


def _describe_call(
    turn: int,
    call: ToolCall,
    result: CallResult | None,
    trajectory: Trajectory,
    gold: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """A call, what came of it, and what it has in common with the gold windows."""
    result = result or CallResult("not run: this was the last turn", executed=False)
    window = result.window or asked_window(call)
    common = overlap([window], gold) if window and gold else None
    subagent = None if result.subagent is None else trajectory.subagents[result.subagent]
    return {
        "turn": turn,
        "name": call.name,
        "arguments": call.arguments,
        "error": call.error,
        "window": window,
        "verdict": _verdict(result.executed, common.iog if common else None),
        "iou": round(common.iou, 4) if common else None,
        "gold_seen": round(common.iog, 4) if common else None,
        "seconds": round(result.seconds, 4),
        "report": result.text,
        "subagent": result.subagent,
        "subagent_tokens": 0 if subagent is None else int(subagent.generated.sum()),
    }


def _verdict(executed: bool, share_seen: float | None) -> str:
    """What became of a call: `ran` where nobody knows what it should have seen."""
    if not executed:
        return "invalid"
    return "ran" if share_seen is None else "hit" if share_seen > 0 else "miss"


def details_of(
    group: RolloutGroup, name: str, contents: Sequence[bytes], spec: FrameSpec, values: Values
) -> tuple[list[dict[str, Any]], bytes]:
    """What a page shows of each rollout of a group besides its text, and their sheet of frames."""
    sheet, prompt = Sheet(spec), group.trajectories[0].prompt
    overview = None
    if prompt.patches is not None and prompt.times:
        overview = sheet.add(prompt.patches, prompt.times[0])
    lines = [
        {
            "row_id": group.row.row_id,
            "rollout": number,
            "overview": overview,
            "crops": [_crop(sheet, result, t) for _, _, result in calls_of(t)],
            "pieces": pieces(t.tokens, contents),
            "values": {
                name: [round(value, 5) for value in of_all[t.generated].tolist()]
                for name, of_all in values(t).items()
            },
        }
        for number, t in enumerate(group.trajectories)
    ]
    data, shape = sheet.jpeg()
    return [{**line, "sheet": {"file": name, **shape} if data else None} for line in lines], data


def _crop(sheet: Sheet, result: CallResult | None, rollout: Trajectory) -> dict[str, Any] | None:
    """Where on the sheet the frames stand that a call brought; None without any."""
    if result is not None and result.clip is not None:
        return sheet.add(result.clip.patches, result.clip.times)
    if result is None or result.subagent is None:
        return None
    prompt = rollout.subagents[result.subagent].prompt
    if prompt.patches is None or not prompt.times:
        return None
    return sheet.add(prompt.patches, prompt.times[0])


def pieces(tokens: np.ndarray, contents: Sequence[bytes]) -> list[str]:
    """The text of each token; one of several tokens stands at the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(contents[token]) for token in tokens.tolist()]
    rest = decoder.decode(b"", final=True)
    return [*texts[:-1], texts[-1] + rest] if texts else texts
