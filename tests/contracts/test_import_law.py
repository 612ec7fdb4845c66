"""The import law: composition may import everything, rooms the core, the core nobody."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("paravt_jax", "models", "pipelines", "rollout", "train", "evaluate")
ALLOWED = {
    "paravt_jax": set(),
    "models": {"paravt_jax"},
    "pipelines": {"paravt_jax"},
    "rollout": {"paravt_jax"},
    "train": set(ROOMS),
    "evaluate": set(ROOMS),
}
FORBIDDEN_PACKAGES = {"torch", "torchvision", "tensorflow"}
NOT_ON_GPU_NODE = {"grain", "tensorflow_datasets", "array_record"}


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports, at any depth of the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_the_law_allows(room):
    for path in files_of(room):
        foreign = (imports_of(path) & set(ROOMS)) - ALLOWED[room] - {room}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_torch_at_run_time(room):
    for path in files_of(room):
        assert not imports_of(path) & FORBIDDEN_PACKAGES, path.relative_to(ROOT)


@pytest.mark.parametrize("room", ("paravt_jax", "models", "rollout"))
def test_model_and_rollout_need_no_data_packages(room):
    for path in files_of(room):
        assert not imports_of(path) & NOT_ON_GPU_NODE, path.relative_to(ROOT)


def test_no_file_shadows_the_standard_library():
    import sys

    for room in ROOMS:
        for path in files_of(room):
            if path.parent == ROOT / room:
                assert path.stem not in sys.stdlib_module_names, path.relative_to(ROOT)


def test_pipelines_are_numpy_only():
    for path in files_of("pipelines"):
        assert "jax" not in imports_of(path), path.relative_to(ROOT)


def test_what_models_share_knows_no_family():
    for path in files_of("models/common"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", [])]
            where = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            if isinstance(node, ast.Import | ast.ImportFrom):
                foreign = [n for n in where if n.startswith("models") and "models.common" not in n]
                assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"
