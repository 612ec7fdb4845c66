"""The import law: composition may import the rooms, and evaluation what trains; rooms the core, the
core nobody. Shelves of a room stand in an order, and no import runs back."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("paravt_jax", "models", "pipelines", "rollout", "train", "evaluate")
ALLOWED = {
    "paravt_jax": set(),
    "models": {"paravt_jax"},
    "pipelines": {"paravt_jax"},
    "rollout": {"paravt_jax"},
    "train": set(ROOMS) - {"evaluate"},
    "evaluate": set(ROOMS),
}
FORBIDDEN_PACKAGES = {"torch", "torchvision", "tensorflow"}
NOT_ON_GPU_NODE = {"grain", "tensorflow_datasets", "array_record"}


@functools.cache
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


# --- Shelves --------------------------------------------------------------------------------------

ORDER = (
    "train.settings",
    "train.hosts",
    "train.model",
    "train.optimizer",
    "train.state",
    "train.batch",
    "train.step",
    "train.workdir",
    "train.report",
    "train.data",
    "train.agent",
    "train.rl",
    "train.sft",
    "train.methods",
    "train.evaluation",
    "train.config",
    "train.recipes",
    "train.report.page",
    "train.setup",
    "train.compile",
    "train.checks",
    "train.run",
    "train.main",
    "evaluate",
    "evaluate.watch",
    "evaluate.model",
    "evaluate.asking",
    "evaluate.ask",
    "evaluate.serving",
    "evaluate.serve",
    "evaluate.needle",
    "evaluate.seeing",
    "evaluate.prompts",
    "evaluate.runner",
    "evaluate.evaluation",
    "evaluate.main",
    "evaluate.report",
)
"""Shelves and modules of the composition, lowest first. Each imports only what stands before it."""
BASES = {"rollout.engine": "rollout", "models.common": "models"}
"""Shelves that import nothing of their room but themselves."""
SEE_ALL = (
    "train.settings",
    "train.config",
    "train.recipes",
    "train.setup",
    "train.compile.programs",
    "train.checks",
    "train.run",
    "train.main",
    "evaluate.model",
)
"""Those that may see the whole configuration."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imported(path: Path, for_types: bool = True) -> set[str]:
    """Modules of ours that a file imports, at any depth of it; on request without those that it
    imports for annotations alone."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if is_module(name)}
            found |= modules or {node.module}
    return {name for name in found if is_module(name)}


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def shelf_of(module: str) -> str:
    """The longest name in the order that the module belongs to."""
    fitting = [name for name in ORDER if module == name or module.startswith(f"{name}.")]
    assert fitting, f"{module}: give it a place in the order"
    return max(fitting, key=len)


def is_leaf(module: str) -> bool:
    """Settings stand beside what they set, and are seen by everybody."""
    return module.endswith(".settings") and module != "train.settings"


def of_composition() -> list[Path]:
    files = [path for room in ("train", "evaluate") for path in (ROOT / room).rglob("*.py")]
    return sorted(path for path in files if module_of(path) != "train")


@pytest.mark.parametrize("path", of_composition(), ids=module_of)
def test_no_import_runs_back(path):
    own = module_of(path)
    for other in imported(path, for_types=False):
        if other.partition(".")[0] not in ("train", "evaluate") or other == "train":
            continue
        if is_leaf(own):
            assert is_leaf(other), f"{own} is a leaf, but imports {other}"
        elif not is_leaf(other):
            here, there = ORDER.index(shelf_of(own)), ORDER.index(shelf_of(other))
            assert there <= here, f"{own} imports {other}, which stands above it"


@pytest.mark.parametrize(("shelf", "room"), BASES.items())
def test_what_a_room_is_built_on_knows_nothing_of_it(shelf, room):
    for path in ROOT.joinpath(*shelf.split(".")).rglob("*.py"):
        inside = {name for name in imported(path) if name.startswith(f"{room}.")}
        beyond = {name for name in inside if name != shelf and not name.startswith(f"{shelf}.")}
        assert not beyond, f"{module_of(path)} imports {sorted(beyond)}"


def test_rewards_know_their_schemes_by_name_alone():
    for path in (ROOT / "paravt_jax").rglob("*.py"):
        if not (own := module_of(path)).startswith("paravt_jax.rewards.schemes"):
            found = {name for name in imported(path) if name.startswith("paravt_jax.rewards.sch")}
            assert not found, f"{own} imports {sorted(found)}"


def test_the_whole_configuration_is_seen_by_the_composition_alone():
    """Everything else gets the sections that it reads."""
    for path in of_composition():
        if not module_of(path).startswith(SEE_ALL):
            assert "train.config" not in imported(path), module_of(path)


def test_the_top_of_the_trainer_is_a_glance():
    assert len(list((ROOT / "train").glob("*.py"))) <= 12
