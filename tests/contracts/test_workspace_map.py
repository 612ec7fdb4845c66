"""`WORKSPACE.md` shows every module of the rooms, and none that is gone."""

import re
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("paravt_jax", "models", "pipelines", "rollout", "train", "evaluate")


def drawn() -> set[str]:
    """Paths of the tree of WORKSPACE.md, from its indentation. A line may name several files."""
    tree = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8").split("```")[3]
    folders: list[str] = []
    found = set()
    for line in tree.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"((?:[\w.]+(?:\.py|/) ?)+)", line.strip())
        assert names, line
        for name in names[1].split():
            del folders[depth:]
            if name.endswith("/"):
                folders.append(name)
            else:
                found.add("".join(folders) + name)
    return found


def modules(room: str) -> set[str]:
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / room).rglob("*.py")]
    return {path for path in paths if PurePosixPath(path).name != "__init__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_is_on_the_map(room):
    missing = modules(room) - drawn()
    recipes = {path for path in missing if path.startswith("train/recipes/")}
    needle = {path for path in missing if path.startswith("pipelines/needle/")}
    schemes = {path for path in missing if path.startswith("paravt_jax/rewards/schemes/")}
    assert not missing - recipes - needle - schemes, sorted(missing)


def test_nothing_on_the_map_is_gone():
    gone = {path for path in drawn() if not (ROOT / path).exists()}
    assert not gone, sorted(gone)
