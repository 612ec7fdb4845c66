"""Pages of what is no run, or of a run whose files are damaged."""

from __future__ import annotations

from tests.contracts.mistakes import Mistake

DOOR = "evaluate/report.py"
STEP = '{"step": 0, "loss": 0.5}\n'


def report(*named: str, config: str = "{}", metrics: str = STEP, rollouts: str = "", flags="."):
    """The page of the row's own folder."""
    files = {"config.json": config, "metrics.jsonl": metrics}
    return Mistake(
        flags, named, 1, files={**files, "rollouts/step_000000.jsonl": rollouts}, door=DOOR
    )


ROWS = [
    Mistake("", "WORKDIR", 2, door=DOOR),
    Mistake("''", "WORKDIR", 2, door=DOOR),
    Mistake("nowhere", ("nowhere", "config.json", "workdir of a run"), 1, door=DOOR),
    report("elsewhere", "config.json", flags=". --compare elsewhere"),
    report("config.json", "line 1", config="{"),
    report("metrics.jsonl, line 2", metrics=STEP + "[\n"),
    report("metrics.jsonl, line 1", metrics="3\n"),
    report("step_000000.jsonl, line 1", rollouts="what?\n"),
    report("step_000000.jsonl", "rewards", rollouts='{"rollout": 0, "question": "?"}\n'),
]
