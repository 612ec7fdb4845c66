"""Rows as TensorFlow Datasets data sets, without TensorFlow.

Rows are written once as ArrayRecord files and then read at random, row by row, so that a
data set of any size costs no memory while it is used and Grain can shuffle it globally.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from paravt_jax.records import Conversation, ImageRef, Message, Row, ToolCall, VideoRef

T = TypeVar("T", Row, Conversation)
SPLIT = "train"


class RowBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC, Generic[T], skip_registration=True):
    """Builder of a data set of rows.

    Args:
        rows: the rows, in the order in which they are kept.
        data_dir: folder below which the data set gets a folder named after its content, so
            that other rows never meet it.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. Looking for them anyway, TFDS 4.9.10 would
    # import importlib_resources, which it does not declare for current Pythons.
    url_infos = None

    def __init__(self, rows: Sequence[T], data_dir: str):
        self._rows = rows
        folder = os.path.join(data_dir, f"rows-{self.fingerprint(rows)}")
        super().__init__(data_dir=folder, file_format="array_record")

    @staticmethod
    @abc.abstractmethod
    def features() -> tfds.features.FeaturesDict:
        """What is written of a row."""

    @staticmethod
    @abc.abstractmethod
    def encode(row: T) -> dict[str, Any]:
        """A row as its features."""

    @staticmethod
    @abc.abstractmethod
    def decode(values: dict[str, Any]) -> T:
        """The row of its features."""

    @classmethod
    def fingerprint(cls, rows: Sequence[T]) -> str:
        """A short hash of the rows' content and order, and of how they are written."""
        digest = hashlib.sha256(",".join(cls.features()).encode())
        for row in rows:
            digest.update(json.dumps(cls.encode(row), default=np.ndarray.tolist).encode())
        return digest.hexdigest()[:16]

    def _info(self) -> tfds.core.DatasetInfo:
        # Grain shuffles, anew in every epoch; the files keep the order of the rows.
        return tfds.core.DatasetInfo(builder=self, features=self.features(), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(map(self.encode, self._rows))


class QuestionRows(RowBuilder[Row]):
    """Questions about videos: the needle world's, a user's own, ParaVT-Parquet's `rl`."""

    @staticmethod
    def features() -> tfds.features.FeaturesDict:
        """One entry per field of a row; its videos as paths and lengths."""
        text, tensor = tfds.features.Text, tfds.features.Tensor
        return tfds.features.FeaturesDict(
            {
                "row_id": text(doc="Unique within the data set."),
                "videos": tensor(shape=(None,), dtype=np.str_, doc="Absolute paths."),
                "durations": tensor(shape=(None,), dtype=np.float64, doc="Seconds."),
                "question": text(),
                "answer": text(),
                "question_type": text(doc="oe, mcq or tvg."),
                "evidence": tensor(shape=(None, 2), dtype=np.float64, doc="Windows in seconds."),
            }
        )

    @staticmethod
    def encode(row: Row) -> dict[str, Any]:
        """See `features`."""
        return {
            "row_id": row.row_id,
            "videos": np.array([video.path for video in row.videos], object),
            "durations": np.array([video.duration for video in row.videos], np.float64),
            "question": row.question,
            "answer": row.answer,
            "question_type": str(row.question_type),
            "evidence": np.array(row.evidence, np.float64).reshape(-1, 2),
        }

    @staticmethod
    def decode(values: dict[str, Any]) -> Row:
        """See `features`."""
        paths, durations = values.pop("videos"), values.pop("durations")
        videos = map(VideoRef, map(_text, paths), map(float, durations))
        windows = values.pop("evidence").tolist()
        return Row(
            video=next(videos),
            more_videos=tuple(videos),
            evidence=tuple((start, end) for start, end in windows),
            **{name: _text(value) for name, value in values.items()},
        )


class Conversations(RowBuilder[Conversation]):
    """Conversations to learn from: ParaVT-Parquet's `sft`."""

    @staticmethod
    def features() -> tfds.features.FeaturesDict:
        """Messages are one JSON text: their parts nest deeper than tensors like."""
        text = tfds.features.Text
        return tfds.features.FeaturesDict(
            {
                "row_id": text(doc="Unique within the data set."),
                "messages": text(doc="JSON: [role, [part, ...], [call, ...]] of each message."),
            }
        )

    @staticmethod
    def encode(row: Conversation) -> dict[str, Any]:
        """See `features`."""
        messages = [
            [m.role, list(map(_plain_part, m.content)), list(map(dataclasses.asdict, m.calls))]
            for m in row.messages
        ]
        return {"row_id": row.row_id, "messages": json.dumps(messages)}

    @staticmethod
    def decode(values: dict[str, Any]) -> Conversation:
        """See `features`."""
        messages = tuple(
            Message(role, tuple(map(_part, parts)), tuple(ToolCall(**call) for call in calls))
            for role, parts, calls in json.loads(values["messages"])
        )
        return Conversation(_text(values["row_id"]), messages)


BUILDERS: dict[str, type[RowBuilder]] = {
    builder.name: builder for builder in (QuestionRows, Conversations)
}
"""By the name that TFDS writes beside a data set."""


class RowSource(Generic[T]):
    """Random access to the rows of a built data set: `len(source)`, `source[i] -> row`.

    Args:
        folder: where TFDS put the data set. A copy sent to another process opens it anew.
    """

    def __init__(self, folder: str):
        self._folder = folder
        builder = tfds.builder_from_directory(folder)
        self._decode = BUILDERS[builder.name].decode
        # A decorator hides the signature of `as_data_source` from type checkers.
        open_split: Any = builder.as_data_source
        self._source = open_split(split=SPLIT)

    def __reduce__(self) -> tuple:
        return RowSource, (self._folder,)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._decode(dict(self._source[index]))

    def __repr__(self) -> str:
        return f"RowSource({len(self)} rows)"


def row_source(rows: Sequence[T], cache_dir: str) -> RowSource[T]:
    """Write rows as ArrayRecord below `cache_dir`, unless these very rows are there, and open them.

    Raises:
        ValueError: there are no rows, or two of them share an id.
    """
    if not rows:
        raise ValueError("no rows to write: check the question types and the question file")
    if len({row.row_id for row in rows}) < len(rows):
        raise ValueError("two rows share a row_id; seeds are derived from it, make it unique")
    tfds.disable_progress_bar()
    kind = QuestionRows if isinstance(rows[0], Row) else Conversations
    # TFDS tells its progress on standard output, which belongs to the run's own report.
    with contextlib.redirect_stdout(io.StringIO()):
        builder = kind(rows, data_dir=cache_dir)  # type: ignore[arg-type]
        builder.download_and_prepare()
    return RowSource(os.fspath(builder.data_path))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _plain_part(part: str | ImageRef | VideoRef) -> str | dict[str, Any]:
    return part if isinstance(part, str) else dataclasses.asdict(part)


def _part(plain: str | dict[str, Any]) -> str | ImageRef | VideoRef:
    if isinstance(plain, str):
        return plain
    return VideoRef(**plain) if "duration" in plain else ImageRef(**plain)
