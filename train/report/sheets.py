"""Small frames of a prompt and its crops on one sheet, as a JPEG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from paravt_jax.records import Patches
from pipelines.preprocess import FrameSpec, from_patches

COLUMNS = 16
"""Frames side by side."""
LARGEST = (128, 96)
"""Most pixels of a small frame, width and height."""
MOST = 1024
"""Frames of a sheet, whose sides JPEG limits."""
BLOCK = 16
"""Cells are multiples of it, so that neighbours share no block of the compression."""
QUALITY = 75


class Sheet:
    """Frames as the model saw them, each set of them once."""

    def __init__(self, spec: FrameSpec) -> None:
        self._spec = spec
        self._frames: list[Image.Image] = []
        self._placed: dict[int, tuple[Patches, dict[str, Any]]] = {}

    def add(self, patches: Patches, times: np.ndarray) -> dict[str, Any] | None:
        """Frames with their times; the cell of the first of them. None if the sheet is full."""
        # By identity: rollouts that ask for the same share what they are shown.
        if id(patches) in self._placed:
            return self._placed[id(patches)][1]
        if len(self._frames) + len(times) > MOST:
            return None
        place = {"first": len(self._frames), "times": [round(t, 3) for t in times.tolist()]}
        self._placed[id(patches)] = patches, place  # held, or another could take its id
        for frame in from_patches(patches, self._spec, len(times)):
            small = Image.fromarray(frame)
            small.thumbnail(LARGEST)
            self._frames.append(small)
        return place

    def jpeg(self) -> tuple[bytes, dict[str, int]]:
        """The sheet, empty without frames, and how its cells lie."""
        if not self._frames:
            return b"", {}
        width, height = (max(frame.size[axis] for frame in self._frames) for axis in (0, 1))
        cell = tuple(-(-side // BLOCK) * BLOCK for side in (width, height))
        rows = -(-len(self._frames) // COLUMNS)
        columns = min(COLUMNS, len(self._frames))
        whole = Image.new("RGB", (columns * cell[0], rows * cell[1]))
        for number, frame in enumerate(self._frames):
            row, column = divmod(number, COLUMNS)
            whole.paste(frame, (column * cell[0], row * cell[1]))
        out = io.BytesIO()
        whole.save(out, "JPEG", quality=QUALITY)
        lie = {"columns": columns, "rows": rows, "cell_width": cell[0], "cell_height": cell[1]}
        return out.getvalue(), {**lie, "width": width, "height": height}
