"""The folder of the page: the shipped files, data as scripts and as JSON, small frames.

A page that is opened from disk may load scripts and images, and nothing else: so each piece of data
is a script that hands it over, loaded when it is looked at, with a JSON file of the same beside it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from train.report.page.figures import RolloutFigures, run_figures, step_figures
from train.report.page.source import RunSource
from train.report.rollouts import name_of

ASSETS = Path(__file__).parent / "assets"
FOLDER, DATA, FRAMES = "report", "data", "frames"


def write_page(workdir: Path, compared: Path | None = None) -> Path:
    """Write `WORKDIR/report/` anew, and its `index.html`, whose path this returns.

    Args:
      workdir: of a run, which may go on meanwhile.
      compared: of another one, whose curves and tables are shown beside.

    Raises:
      ValueError: one of them holds no run.
    """
    source = RunSource(workdir)
    part = workdir / f".{FOLDER}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(ASSETS, part)
    (part / DATA).mkdir()
    (part / FRAMES).mkdir()
    figures, whole = RolloutFigures(), run_figures(source)
    for step in source.steps:
        groups = source.rollouts(step)
        figures.add(step, groups)
        _put(part, name_of(step), step_figures(source, step, groups))
        _link(source.sheets(step), part / FRAMES)
    other = _other(compared, workdir / FOLDER) if compared else None
    _put(part, "run", {**whole, "bands": figures.bands, "look": figures.look, "other": other})
    _put(part, "index", figures.index)
    shutil.rmtree(workdir / FOLDER, ignore_errors=True)
    part.rename(workdir / FOLDER)
    return workdir / FOLDER / "index.html"


def _other(workdir: Path, shown_in: Path) -> dict[str, Any]:
    """What the page of a run shows of another one, and the way to that one's own page, which has
    its rollouts; None where it has not been written."""
    source, figures = RunSource(workdir), RolloutFigures()
    for step in source.steps:
        figures.add(step, source.rollouts(step))
    page = workdir / FOLDER / "index.html"
    way = quote(Path(os.path.relpath(page, shown_in)).as_posix()) if page.exists() else None
    return {**run_figures(source), "bands": figures.bands, "look": figures.look, "page": way}


def _put(folder: Path, name: str, value: Any) -> None:
    """Write a piece of data twice. ASCII only, so that no encoding matters."""
    text = as_json(value)
    (folder / DATA / f"{name}.json").write_text(text + "\n", encoding="ascii")
    script = f"paravt.receive({json.dumps(name)}, {text});\n"
    (folder / DATA / f"{name}.js").write_text(script, encoding="ascii")


def as_json(value: Any) -> str:
    """JSON that browsers read."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """The value with nothing in it that JSON cannot say: numbers that are none become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _link(files: Iterable[Path], folder: Path) -> None:
    """The same files in the folder, where the disk can without a second copy."""
    for path in files:
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copy(path, folder / path.name)
