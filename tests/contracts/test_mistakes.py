"""Every documented mistake ends in one line that names flag or file: no traceback, no wait.

The rows are in `tests/contracts/mistakes/`, which says how to add one.
"""

from pathlib import Path

import pytest

from tests.contracts.mistakes import SECONDS, Mistake, all_mistakes, expand
from tests.contracts.mistakes.world import make_world
from tests.support.command import environment, server
from tests.support.forked import Outcome, run_fresh

pytestmark = pytest.mark.slow
MISTAKES = list(all_mistakes())
LEAST = 150
"""Rows that the table holds at least."""
WORK = 20
"""Seconds of processor time after which a forked row works for nothing."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def prepared(row: Mistake, folder: Path, world: dict[str, str]) -> dict[str, str]:
    """Writes what the row needs into its folder; the world with `{here}` in it."""
    world = world | {"here": str(folder)}
    for name, content in row.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else expand(content, world).encode()
        path.write_bytes(data)
    if row.prepare is not None:
        row.prepare(folder)
    return world


def run(row: Mistake, folder: Path, world: dict[str, str], fresh: bool = False) -> Outcome:
    """Makes the mistake, in a forked child of the server or in a process of its own."""
    arguments = row.expanded(prepared(row, folder, world))
    variables = environment(row.devices, **row.environment)
    if fresh or row.fresh:
        return run_fresh(row.door, arguments, folder, variables)
    return server().start(row.door, arguments, folder, variables, work=WORK).wait()


def assert_one_line(row: Mistake, outcome: Outcome) -> None:
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(row.prefix), outcome.stderr
    named = (row.named,) if isinstance(row.named, str) else row.named
    missing = [name for name in named if name not in lines[0]]
    assert not missing, f"{missing} not named in: {lines[0]}"
    assert outcome.code == row.code, f"exit code {outcome.code}: {lines[0]}"
    assert outcome.seconds < SECONDS


@pytest.mark.parametrize(
    "row", [row for _, row in MISTAKES], ids=[f"{area}: {row.arguments}" for area, row in MISTAKES]
)
def test_a_mistake_is_one_line(row, world, tmp_path):
    outcome = run(row, tmp_path, world)
    assert_one_line(row, outcome)
    if row.code == 2:
        left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
        given = {Path(name).parts[0] for name in row.files}
        new = left - given - {"__pycache__"}  # Python's own, of users' files that it imports
        assert row.prepare is not None or not new, f"the door wrote {new}"


OF_DOORS = {row.door: row for _, row in MISTAKES if row.code == 2 and not row.fresh}
"""A row of each door that is refused there, without a wait for what a run imports."""


@pytest.mark.parametrize("row", OF_DOORS.values(), ids=OF_DOORS)
def test_forked_children_are_the_real_command(row, world, tmp_path):
    """A row of each door once more as a user runs it."""
    anew, forked = tmp_path / "anew", tmp_path / "forked"
    anew.mkdir(), forked.mkdir()
    outcome = run(row, anew, world, fresh=True)
    assert_one_line(row, outcome)
    again = run(row, forked, world)
    assert outcome.stderr.replace(str(anew), str(forked)) == again.stderr


def test_there_are_enough_rows():
    assert len({(row.door, row.arguments, *row.files) for _, row in MISTAKES}) >= LEAST
