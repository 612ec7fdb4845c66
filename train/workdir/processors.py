"""How the model folder of a run says what frames it was trained with.

transformers resizes and samples by the processor settings of a folder. Those of the base model are
not those of a run, whose limits are `data.min_pixels` and `data.max_pixels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.preprocess import MARKS, SPECS, FrameSpec, VideoSpec


def write_processors(
    spec: FrameSpec, pixels: tuple[int, int], sampling: Mapping[str, Any], folder: Path
) -> None:
    """Write the frames of a run into the processor settings of a folder, for images and videos.

    What those cannot say: a least size of each frame of a video (see `VideoSpec`), and the quotas
    `data.overview_tokens` and `agent.clip_tokens`, which differ between overview and clips. Before
    5.16, transformers had no most of a frame either.

    Args:
      spec: how the run shows frames.
      pixels: least and most of a frame.
      sampling: how many frames of a video are taken, see `frames_sampled`.
      folder: a Hugging Face model folder.
    """
    more: dict[str, Any] = {}
    if isinstance(spec, VideoSpec):
        # For transformers, which reads the numbers, and for whoever chooses its version.
        more = {"video_marks": spec.marks, "video_marks_as_in": MARKS[spec.marks], **sampling}
    for kind in SPECS.values():
        kind.limit_folder(str(folder), pixels, more if kind is VideoSpec else {})


def frames_sampled(counts: Sequence[int], fps: float | None = None) -> dict[str, float]:
    """Settings of a video processor: from the fewest to the most of these numbers of frames."""
    # Two at least: a processor refuses a lone frame.
    few, many = max(min(counts), 2), max(*counts, 2)
    return ({} if fps is None else {"fps": fps}) | {"min_frames": few, "max_frames": many}
