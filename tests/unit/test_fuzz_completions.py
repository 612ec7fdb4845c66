"""No completion breaks the parser or the rewards, or makes them touch anything outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "fuzz_completions.py"


def fuzz(count, *arguments):
    """Figures of a fuzzing process of its own."""
    command = [sys.executable, str(SCRIPT), str(count), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_saw_everything(seen, count):
    assert seen["completions"] == count
    for what in ("windows", "errors", "strict turns", "reference calls", "accurate"):
        assert seen[what] > count / 100, what


@pytest.mark.slow
def test_a_sample_of_completions():
    assert_saw_everything(fuzz(2000), 2000)


@pytest.mark.study
def test_a_hundred_thousand_completions():
    assert_saw_everything(fuzz(100_000, "1"), 100_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "forbidden", ["open('x')", "eval('1')", "import colorsys", "os.listdir('.')", "os.system('')"]
)
def test_the_hook_ends_a_process_that_does_what_it_must_not(forbidden, tmp_path):
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); "
        f"import tests.support.fuzz_completions as f; sys.addaudithook(f.forbid); "
        f"{forbidden}; print('went on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3 and "forbidden" in done.stderr and not done.stdout
