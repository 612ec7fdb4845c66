"""Budgets of CONTRIBUTING.md: functions and files stay small, and no two classes have one name."""

import ast
import collections
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("paravt_jax", "models", "pipelines", "rollout", "train", "evaluate", "examples")
FUNCTION, FILE = 60, 500


@pytest.mark.parametrize("room", ROOMS)
def test_functions_and_files_stay_small(room):
    long = []
    for path in sorted((ROOT / room).rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        if (lines := text.count("\n")) > FILE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{name}: {node.name}: {lines} lines"] if lines > FUNCTION else []
    assert not long, long


def test_no_two_classes_have_one_name():
    """Who reads a name in a traceback, or searches for it, finds one thing."""
    homes = collections.defaultdict(list)
    for path in (path for room in ROOMS[:-1] for path in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in homes.items() if len(found) > 1}
