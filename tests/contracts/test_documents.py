"""What the documents cite exists: files, functions, tests, settings, metrics, laws, defects.

`docs/design.md` and `docs/para_grpo.md` cite code as `path/file.py: name` (several names apart by
commas, attributes by dots) and tests as `tests/path/file.py::name`. Whoever moves or renames one of
them is told here.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import ROOT, documented
from tests.unit.test_reward_defects import CLAIMS
from train.recipes import get_recipe

DESIGN, ALGORITHM = "docs/design.md", "docs/para_grpo.md"
CITING = (DESIGN, ALGORITHM)
PROSE = sorted(
    str(path.relative_to(ROOT))
    for room in ("", "docs", "docs/adr", "benchmarks", "examples", "models/*", "train/*")
    for path in ROOT.glob(f"{room}/*.md".lstrip("/"))
)
ROOMS = ("paravt_jax", "models", "pipelines", "rollout", "train", "evaluate", "benchmarks")
CODE = [*ROOMS, "tests", "docs"]

SPAN = re.compile(r"`([^`\n]+)`")
OF_TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
OF_CODE = re.compile(r"([\w/]+\.py): ([\w., ]+)")
OF_PATH = re.compile(r"[\w-]+(?:/[\w-]+)*(?:\.(?:py|md)|/)")
OF_SETTING = re.compile(r"([a-z_]\w*(?:\.[a-z_]\w*)+)(?:=\S+)?")
OF_METRIC = re.compile(r"[a-z_]+/[a-z_]+")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")
SET = re.compile(r"--set \"?([a-z_]+(?:\.[a-z_]+)+)=")
LAW = re.compile(r"\b[Ll]aws? (\d+(?:(?:, | and )\d+)*)")
DEFECT = re.compile(r"(?<![\w-])R\d+\b")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def spans(name: str) -> list[str]:
    """What stands in backticks, outside of blocks of code."""
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.S | re.M)
    return SPAN.findall(text)


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """Names that a file defines: at its top, and in its classes after a dot."""
    return frozenset(_names(ast.parse(read(path)).body))


def _names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def settings(section: Any, prefix: str = "") -> Iterator[str]:
    """Full names of all settings and sections."""
    for field in dataclasses.fields(section):
        yield prefix + field.name
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")


def absent(path: str, names: str) -> list[str]:
    """Which of the names a file does not define."""
    if not (ROOT / path).is_file():
        return [path]
    return [f"{path}: {name}" for name in names.split(", ") if name not in names_in(path)]


def laws() -> set[int]:
    return {int(number) for number in re.findall(r"^### Law (\d+): ", read(DESIGN), re.M)}


def defects() -> dict[str, str]:
    """Rows of the table of defects, by their numbers."""
    rows = re.findall(r"^\| (R\d+) \([SHML]\) \|(.*)\|$", read(DESIGN), re.M)
    assert len(rows) == len(dict(rows)), "a number stands twice"
    return dict(rows)


def sources() -> list[Path]:
    own = Path(__file__)
    files = [path for room in CODE for path in (ROOT / room).rglob("*.*")]
    return [path for path in files if path.suffix in (".py", ".md") and path != own]


@pytest.mark.parametrize("name", CITING)
def test_cited_tests_exist(name):
    cited = OF_TEST.findall(read(name))
    assert not [found for path, test in cited for found in absent(path, test)]
    assert len(cited) >= 5


@pytest.mark.parametrize("name", CITING)
def test_cited_code_exists(name):
    cited = [match for span in spans(name) if (match := OF_CODE.fullmatch(span))]
    assert not [found for match in cited for found in absent(*match.groups())]
    assert len(cited) >= 15


@pytest.mark.parametrize("name", sorted({*CITING, "README.md", "CONTRIBUTING.md"}))
def test_cited_files_exist(name):
    cited = [span for span in spans(name) if "/" in span and OF_PATH.fullmatch(span)]
    made = (
        "hf/",
        "adapter/",
        "checkpoints/",
        "rollouts/",
        "details/",
        "tensorboard/",
        "benchmarks/scale.md",
    )
    assert not [path for path in cited if path not in made and not (ROOT / path).exists()]


@pytest.mark.parametrize("name", PROSE)
def test_links_lead_somewhere(name):
    for link, anchor in LINK.findall(re.sub(r"^```.*?^```", "", read(name), flags=re.S | re.M)):
        target = ROOT / name if not link else (ROOT / name).parent / link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What a link may lead to within a page: its headings, as sites write them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_sites_contents():
    listed = set(re.findall(r": (\S+\.md)$", read("mkdocs.yml"), re.M))
    assert not [page for page in listed if not (ROOT / page).exists()]
    assert {name for name in PROSE if not name.startswith("docs/adr/")} == listed


def test_settings_in_commands_exist():
    recipes = [get_recipe(name) for name in ("needle_rl", "paravt_sft", "needle_visd")]
    known = {name for recipe in recipes for name in settings(recipe)}
    found = {name: set(SET.findall(read(name))) for name in PROSE}
    assert not [(name, own - known) for name, own in found.items() if own - known]
    assert sum(map(len, found.values())) > 20


@pytest.mark.parametrize("name", CITING)
def test_cited_settings_exist(name):
    known = {s for recipe in ("needle_rl", "paravt_sft") for s in settings(get_recipe(recipe))}
    cited = [match[1] for span in spans(name) if (match := OF_SETTING.fullmatch(span))]
    cited = [setting for setting in cited if not setting.endswith((".py", ".md"))]
    assert not [s for s in cited if s not in known and not re.search(r"\.(json|jsonl|csv)$", s)]


@pytest.mark.parametrize("name", CITING)
def test_cited_metrics_are_explained(name):
    cited = {span for span in spans(name) if OF_METRIC.fullmatch(span)}
    assert not [metric for metric in cited if not documented(metric)]


@pytest.mark.parametrize("name", CITING)
def test_cited_decisions_exist(name):
    for number in re.findall(r"ADR (\d+)", read(name)):
        assert list((ROOT / "docs" / "adr").glob(f"{int(number):04d}-*.md")), f"ADR {number}"


def test_every_decision_has_a_number_of_its_own_that_its_title_says():
    numbers = []
    for path in sorted((ROOT / "docs" / "adr").glob("*.md")):
        numbers.append(int(path.name[:4]))
        title = path.read_text(encoding="utf-8").splitlines()[0]
        assert title.startswith(f"# {numbers[-1]}. "), f"{path.name}: {title}"
    assert numbers == sorted(set(numbers)), numbers


def test_every_law_that_is_cited_is_one():
    assert laws() == set(range(1, 17))
    found = 0
    for path in sources():
        for numbers in LAW.findall(path.read_text(encoding="utf-8")):
            cited = set(map(int, re.findall(r"\d+", numbers)))
            assert cited <= laws(), f"{path.relative_to(ROOT)} cites law {numbers}"
            found += len(cited)
    assert found > 30


def test_every_law_says_where_it_is_kept_and_has_a_test():
    for part in read(DESIGN).split("\n### Law ")[1:]:
        text = part.partition("\n## ")[0]
        assert OF_TEST.search(text) and OF_CODE.search(text), f"law {text[:40]}"


def test_every_defect_has_a_row_and_a_test():
    rows = defects()
    assert list(rows) == [f"R{number}" for number in range(1, 30)]
    for number, row in rows.items():
        last = row.rpartition("|")[2]
        assert OF_TEST.search(last) or last.strip().startswith("no test, because "), number


def test_every_defect_that_is_cited_has_a_row():
    rows = defects()
    for path in sources():
        cited = set(DEFECT.findall(path.read_text(encoding="utf-8")))
        assert cited <= set(rows), f"{path.relative_to(ROOT)} cites {sorted(cited - set(rows))}"


def test_claims_about_rewards_stand_in_the_rows_of_their_defects():
    rows = defects()
    for number, claims in CLAIMS.items():
        for claim in claims:
            assert f"test_reward_defects.py::{claim.__name__}`" in rows[number], claim.__name__


def test_citations_are_recognised():
    """The patterns above find what they should; a document without matches would prove nothing."""
    assert OF_CODE.fullmatch("train/step.py: RlStep.log_probs, minibatch")
    assert absent("train/step.py", "RlStep.log_probs, accumulate") == []
    assert absent("train/step.py", "RlStep.no_such") == ["train/step.py: RlStep.no_such"]
    assert absent("train/no_such.py", "a") == ["train/no_such.py"]
    assert "ObjectiveConfig.anchor" in names_in("paravt_jax/objectives.py")
    assert LAW.findall("laws 1, 2 and 13; law 5") == ["1, 2 and 13", "5"]
    assert DEFECT.findall("DeepVideo-R1 and R17, R1") == ["R17", "R1"]
    assert OF_SETTING.fullmatch("objective.anchor=position")[1] == "objective.anchor"
