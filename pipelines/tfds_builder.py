"""Rows as TensorFlow Datasets data sets, without TensorFlow.

Rows are written once as ArrayRecord files and then read at random, row by row, so that a
data set of any size costs no memory while it is used and Grain can shuffle it globally.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import tensorflow_datasets as tfds

from paravt_jax.records import Conversation, ImageRef, Message, Row, ToolCall, VideoRef

T = TypeVar("T", Row, Conversation)
SPLIT = "train"


class RowBuilder(tfds.core.GeneratorBasedBuilder, Generic[T], skip_registration=True):
    """Builder of a data set of questions or conversations.

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
        self._examples = list(map(_encoded, rows))
        digest = hashlib.sha256("".join(row["content"] for row in self._examples).encode())
        folder = os.path.join(data_dir, f"rows-{digest.hexdigest()[:16]}")
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "row_id": text(doc="Unique within the data set."),
                # One text: parts of messages nest deeper than tensors like.
                "content": text(doc="JSON of all fields of a `Row` or a `Conversation`."),
            }
        )
        # Grain shuffles, anew in every epoch; the files keep the order of the rows.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(self._examples)


def _encoded(row: Row | Conversation) -> dict[str, str]:
    return {"row_id": row.row_id, "content": json.dumps(dataclasses.asdict(row))}


def _decoded(content: str | bytes) -> Row | Conversation:
    fields = json.loads(content)
    if "messages" in fields:
        return Conversation(fields["row_id"], tuple(map(_message, fields["messages"])))
    fields["video"] = VideoRef(**fields["video"])
    fields["more_videos"] = tuple(VideoRef(**video) for video in fields["more_videos"])
    fields["evidence"] = tuple((float(start), float(end)) for start, end in fields["evidence"])
    return Row(**fields)


def _message(fields: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in fields["calls"])
    return Message(fields["role"], tuple(map(_part, fields["content"])), calls)


def _part(plain: str | dict[str, Any]) -> str | ImageRef | VideoRef:
    if isinstance(plain, str):
        return plain
    return VideoRef(**plain) if "duration" in plain else ImageRef(**plain)


class RowSource(Generic[T]):
    """Random access to the rows of a built data set: `len(source)`, `source[i] -> row`.

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

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _decoded(self._source[index]["content"])  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"RowSource({len(self)} rows)"


def row_source(rows: Sequence[T], cache_dir: str) -> RowSource[T]:
    """Write rows as ArrayRecord below `cache_dir`, unless these very rows are there, and open them.

    Raises:
        ValueError: there are no rows, or two of them share an id.
        OSError: they cannot be written.
    """
    if not rows:
        raise ValueError("no rows to write: check the question types and the question file")
    if len({row.row_id for row in rows}) < len(rows):
        raise ValueError("two rows share a row_id; seeds are derived from it, make it unique")
    tfds.disable_progress_bar()
    # TFDS tells its progress on standard output, which belongs to the run's own report.
    with contextlib.redirect_stdout(io.StringIO()):
        builder = RowBuilder(rows, data_dir=cache_dir)
        try:
            builder.download_and_prepare()
        except OSError:
            # Another host or run that shares the folder has written these very rows meanwhile.
            if not builder.data_path.exists():
                raise
    return RowSource(os.fspath(builder.data_path))
