"""`docs/metrics.md` names every figure that a run can tell, and the progress line's words."""

import re
from pathlib import Path

from tests.support.command import ROOT, documented
from train.report.log import SHOWN

CODE = ("train", "rollout", "pipelines", "paravt_jax")
NAME = re.compile(r'"([a-z_]+/[a-z_]+)"')


def named_in_code() -> set[str]:
    """What looks like a metric: a quoted name with one slash."""
    files: list[Path] = [path for room in CODE for path in (ROOT / room).rglob("*.py")]
    return {name for path in files for name in NAME.findall(path.read_text(encoding="utf-8"))}


def test_every_name_is_explained():
    others = {"application/json", "longvt_source/hacs", "paravt/end", "paravt/failed"}
    others |= {"greedy/accuracy"}  # a MODE/NAME of `evaluation/MODE/NAME`
    missing = {name for name in named_in_code() - others if not documented(name)}
    assert not missing, f"add them to docs/metrics.md: {sorted(missing)}"


def test_the_progress_line_is_explained():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for metric, word, _ in SHOWN:
        assert f"| `{word}` | `{metric}` |" in text


def test_what_is_not_there_is_not_documented():
    assert not documented("no/such") and not documented("loss/of")
