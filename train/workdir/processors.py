"""How the model folder of a run says what frames it was trained with.

transformers resizes and samples by the processor settings of a folder. Those of the base model are
not those of a run, whose limits are `data.min_pixels` and `data.max_pixels`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.preprocess import MARKS, SPECS, FrameSpec, VideoSpec
from train.config import Config


def write_processors(config: Config, spec: FrameSpec, folder: Path) -> None:
    """Write the frames of a run into the processor settings of a folder, for images and videos.

    What those cannot say: a least size of each frame of a video (see `VideoSpec`), and the quotas
    `data.overview_tokens` and `agent.clip_tokens`, which differ between overview and clips. Before
    5.16, transformers had no most of a frame either.

    Args:
      config: the run.
      spec: how it shows frames.
      folder: a Hugging Face model folder.
    """
    pixels = (config.data.min_pixels, config.data.max_pixels)
    more = video_settings(config, spec) if isinstance(spec, VideoSpec) else {}
    for kind in SPECS.values():
        kind.limit_folder(str(folder), pixels, more if kind is VideoSpec else {})


def video_settings(config: Config, spec: VideoSpec) -> dict[str, Any]:
    """How many frames of a video are sampled, and where its vision marks stand: for transformers,
    which reads the numbers, and for whoever chooses its version."""
    said = {"video_marks": spec.marks, "video_marks_as_in": MARKS[spec.marks]}
    if config.packs_conversations:
        own = config.sft.packing
        rate, counts = {"fps": own.fps}, (1, own.max_frames)
    else:
        rate, counts = {}, config.data.frame_budgets
    # Two at least: a processor refuses a lone frame.
    few, many = max(min(counts), 2), max(*counts, 2)
    return said | rate | {"min_frames": few, "max_frames": many}
