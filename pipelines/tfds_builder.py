"""Question rows as a TensorFlow Datasets data set, without TensorFlow.

Rows are written once as ArrayRecord files and then read at random, row by row, so that a
data set of any size costs no memory and Grain can shuffle it globally.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from paravt_jax.records import Row, VideoRef

SPLIT = "train"


class QuestionRows(tfds.core.GeneratorBasedBuilder):
    """Builder of question rows.

    Args:
        rows: the rows, in the order in which they are kept.
        data_dir: folder below which the data set gets a folder named after its content, so
            that other rows never meet it.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. Looking for them anyway, TFDS 4.9.10 would
    # import importlib_resources, which it does not declare for current Pythons.
    url_infos = None

    def __init__(self, rows: Sequence[Row], data_dir: str):
        self._rows = rows
        folder = os.path.join(data_dir, f"rows-{fingerprint(rows)}")
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "row_id": text(doc="Unique within the data set."),
                "video": text(doc="Absolute path of the video file."),
                "duration": tfds.features.Scalar(np.float64, doc="Seconds."),
                "question": text(),
                "answer": text(),
                "question_type": text(doc="oe, mcq or tvg."),
                "evidence": tfds.features.Tensor(
                    shape=(None, 2), dtype=np.float64, doc="Windows in seconds."
                ),
            }
        )
        # Grain shuffles, anew in every epoch; the files keep the order of the rows.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, row in enumerate(self._rows):
            flat = _flat(row)
            yield index, flat | {"evidence": np.array(flat["evidence"], np.float64).reshape(-1, 2)}


class RowSource:
    """Random access to the rows of a built data set: `len(source)`, `source[i] -> Row`.

    Args:
        folder: where TFDS put the data set. A copy sent to another process opens it anew.
    """

    def __init__(self, folder: str):
        self._folder = folder
        # A decorator hides the signature of `as_data_source` from type checkers.
        open_split: Any = tfds.builder_from_directory(folder).as_data_source
        self._source = open_split(split=SPLIT)

    def __reduce__(self) -> tuple:
        return RowSource, (self._folder,)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        values = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in self._source[index].items()
        }
        video = VideoRef(values.pop("video"), float(values.pop("duration")))
        evidence = tuple((float(start), float(end)) for start, end in values.pop("evidence"))
        return Row(video=video, evidence=evidence, **values)

    def __repr__(self) -> str:
        return f"RowSource({len(self)} rows)"


def row_source(rows: Sequence[Row], cache_dir: str) -> RowSource:
    """Write rows as ArrayRecord below `cache_dir`, unless these very rows are there, and open them.

    Raises:
        ValueError: there are no rows, or two of them share an id.
    """
    if not rows:
        raise ValueError("no rows to write: check the question types and the question file")
    if len({row.row_id for row in rows}) < len(rows):
        raise ValueError("two rows share a row_id; seeds are derived from it, make it unique")
    tfds.disable_progress_bar()
    # TFDS tells its progress on standard output, which belongs to the run's own report.
    with contextlib.redirect_stdout(io.StringIO()):
        builder = QuestionRows(rows, data_dir=cache_dir)
        builder.download_and_prepare()
    return RowSource(os.fspath(builder.data_path))


def fingerprint(rows: Sequence[Row]) -> str:
    """A short hash of the rows' content and order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(_flat(row)).encode())
    return digest.hexdigest()[:16]


def _flat(row: Row) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    values["question_type"] = str(row.question_type)
    evidence = [list(window) for window in row.evidence]
    return values | {
        "video": row.video.path,
        "duration": row.video.duration,
        "evidence": evidence,
    }
