"""The budgets of CONTRIBUTING.md: no function over 60 lines, no file over 500."""

import ast
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
