"""`evaluation.json`: held-out figures before and after. Those of before outlive an interruption."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from paravt_jax.checksum import checksums
from paravt_jax.records import Row
from train.config import Config
from train.data.questions import identities
from train.hosts.cluster import is_first, texts_from_first
from train.state import FlatParams
from train.workdir.claim import write_whole
from train.workdir.config_file import SAME_RESULTS, flat_settings

Evaluation = dict[str, dict[str, float]]
"""Figures of each evaluation mode."""

FILE = "evaluation.json"
SECTIONS = ("model.", "data.", "agent.", "rewards.", "evaluation.")
"""Settings that an evaluation depends on."""


def fingerprint(config: Config, rows: Iterable[Row], weights: FlatParams) -> str:
    """What an evaluation is of: two with the same one have the same figures."""
    settings = {
        key: value
        for key, value in flat_settings(config).items()
        if key.startswith(SECTIONS) and not key.startswith(SAME_RESULTS)
    }
    said = json.dumps([settings, sorted(checksums(weights).items())], sort_keys=True).encode()
    for part in identities(rows):
        said += part
    return f"{zlib.crc32(said):08x}"


def read_before(workdir: Path, of: str) -> Evaluation | None:
    """The figures of before that the workdir holds, if they are of the same; on every host those
    of the first."""
    text = ""
    if is_first() and (workdir / FILE).exists():
        text = (workdir / FILE).read_text(encoding="utf-8")
    (text,) = texts_from_first([text])
    try:
        held = json.loads(text or "{}")
    except ValueError:
        return None  # damaged: evaluated anew
    return held.get("before") if held.get("of") == of else None


def write_figures(workdir: Path, of: str, before: Evaluation, after: Evaluation | None = None):
    """What is known so far."""
    if is_first():
        known = {"of": of, "before": before} | ({} if after is None else {"after": after})
        write_whole(workdir / FILE, json.dumps(known, indent=2) + "\n")
