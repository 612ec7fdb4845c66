"""`evaluation.json` and its table: held-out metrics before and after a run.

Those of before outlive an interruption: a resumed run reads them where they are kept.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from paravt_jax.checksum import checksums
from paravt_jax.records import Row
from train.data.questions import identities
from train.evaluation.held_out import HeldOut, MetricsByMode
from train.evaluation.tables import INTERVALS, comparison_table, interval_table
from train.hosts.cluster import from_first, is_first
from train.state import FlatParams
from train.workdir.files import write_atomically

FILE = "evaluation.json"


class BeforeAfter:
    """Evaluates at the beginning of a run and at its end, and shows what became of it."""

    def __init__(
        self,
        held_out: HeldOut,
        settings: Mapping[str, Any],
        workdir: Path,
        title: str,
        console: Console,
    ) -> None:
        """
        Args:
          held_out: puts the questions to the agent.
          settings: those that decide what it finds, by their dotted names.
          workdir: where metrics are kept.
          title: of the table.
        """
        self._held_out, self._settings = held_out, settings
        self._workdir, self._title, self._console = workdir, title, console
        self._before: MetricsByMode = {}
        self._of = ""

    def before(self, params: FlatParams) -> None:
        """Evaluate what the run begins from, unless the workdir holds that already."""
        self._of = fingerprint(self._settings, self._held_out.rows, params)
        stored = read_before(self._workdir, self._of)
        self._before = self._held_out(params) if stored is None else stored
        # At once: a run that is interrupted before its end must not evaluate the start again.
        if stored is None:
            self._write({})

    def after(self, params: FlatParams, known: MetricsByMode | None = None) -> None:
        """Evaluate what the run ends with, unless that is known, and show the table."""
        after, before, rows = known or self._held_out(params), self._before, {}
        for mode, metrics in after.items():
            if mode in before:
                rows[f"{mode}, before"] = before[mode]
            rows[f"{mode}, after"] = metrics
        self._console.print(comparison_table(self._title, rows))
        self._console.print(interval_table(INTERVALS, rows))
        self._write({"after": after})

    def _write(self, more: Mapping[str, MetricsByMode]) -> None:
        if is_first():
            record = {"of": self._of, "before": self._before, **more}
            write_atomically(self._workdir / FILE, json.dumps(record, indent=2) + "\n")


def fingerprint(settings: Mapping[str, Any], rows: Iterable[Row], weights: FlatParams) -> str:
    """What an evaluation is of: two with the same one have the same metrics."""
    text = json.dumps([dict(settings), sorted(checksums(weights).items())], sort_keys=True).encode()
    for part in identities(rows):
        text += part
    return f"{zlib.crc32(text):08x}"


def read_before(workdir: Path, of: str) -> MetricsByMode | None:
    """The metrics of before that the workdir holds, if they are of the same; on every host those
    of the first."""
    text = ""
    if is_first() and (workdir / FILE).exists():
        text = (workdir / FILE).read_text(encoding="utf-8")
    try:
        record = json.loads(from_first(text) or "{}")
    except ValueError:
        return None  # damaged: evaluated anew
    return record.get("before") if record.get("of") == of else None
