"""Eight CPU devices for every test, so that sharding is exercised, not skipped; and folders of
Qwen3-VL for tests that concern tokens."""

import gc
import os
import re
import sys
from pathlib import Path

from tests.support.xla_flags import quick_compile

# Before anything imports jax, which reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", quick_compile(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What promotes a type or a rank must say so, here and in the programs that tests start: silent ones
# hide a float64, a lost bfloat16 or rows taken for columns.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Compiled functions are kept beside pytest's own cache: a second run compiles little.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Bytecode too, whatever a container says: each program that tests start would make it anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

from tests.support import shape_checks
from tests.support.qwen3_vl_folders import GIVEN, small_folder, whole_folder

sys.dont_write_bytecode = False
shape_checks.install()
gc.disable()  # until all is imported, for little of that is garbage

WHOLLY_MARKED = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `tests/golden` is told."""
    told = "write the figures that tests/golden compares with anew, from the runs of today"
    parser.addoption("--rewrite-golden", action="store_true", help=told)


def left_out(config: pytest.Config) -> set[str]:
    """Markers whose tests do not run: `-m "not slow and not study"`."""
    return set(re.findall(r"\bnot (\w+)", config.option.markexpr))


def pytest_configure(config: pytest.Config) -> None:
    """What is fast runs without torch, as users do; transformers imports it where it can."""
    if "slow" in left_out(config):
        sys.modules["torch"] = None  # type: ignore[assignment]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of which no test would run are not imported: that takes longer than some suites."""
    if collection_path.suffix != ".py" or not (markers := left_out(config)):
        return None
    return bool(markers & set(WHOLLY_MARKED.findall(collection_path.read_text("utf-8")))) or None


def pytest_collection_finish() -> None:
    """What was imported stays: a garbage collection that walks over it takes half a second."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def _folders(tmp_path_factory) -> Path:
    """One place for all workers of this session, or of all sessions: `QWEN3_VL_CACHE`."""
    if kept := os.environ.get("QWEN3_VL_CACHE"):
        return Path(kept)
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "qwen3_vl"


@pytest.fixture(scope="session", params=GIVEN)
def qwen3_vl_folder(request, _folders) -> Path:
    """Any folder with the released tokenizer, template and processor settings."""
    return whole_folder(request.param, _folders)


@pytest.fixture(scope="session")
def instruct_folder(_folders) -> Path:
    """The Instruct variant around tiny random weights."""
    return small_folder("instruct", _folders)


@pytest.fixture(scope="session")
def thinking_folder(_folders) -> Path:
    """The Thinking variant, whose template opens `<think>`, around tiny random weights."""
    return small_folder("thinking", _folders)


@pytest.fixture(scope="module")
def paravt_folder(tmp_path_factory) -> str:
    """ParaVT-Parquet in small."""
    from tests.support.paravt_parquet import write_paravt

    return write_paravt(str(tmp_path_factory.mktemp("paravt")))


@pytest.fixture
def serve():
    """Starts judges: `serve(behave)`, see `judge_server.Service`."""
    from tests.support.judge_server import running

    with running() as start:
        yield start


@pytest.fixture
def turns_that_call(monkeypatch) -> None:
    """What a turn calls is drawn from its text, see `rollout_law`."""
    from tests.support.rollout_law import calls_of

    monkeypatch.setattr("rollout.agent.parse_tool_calls", calls_of)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on folders with the released tokenizer are slow: making one takes ten seconds. Files
    with slow tests come first, so that two workers end at about the same time."""
    folders = {"qwen3_vl_folder", "instruct_folder", "thinking_folder"}
    for item in items:
        chosen = item.name.partition("[")[2]
        by_name = "released" in chosen or "_folder" in chosen
        if by_name or folders & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
