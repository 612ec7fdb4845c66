"""Settings of the questions of a run, and of how their videos are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

from paravt_jax.marks import Mark
from paravt_jax.plugins import Own
from paravt_jax.ranges import above, at_least, within
from paravt_jax.records import QuestionType, Row
from paravt_jax.remote import is_remote
from paravt_jax.settings import Refused, Settings, any_of


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
    """Which questions, and how their videos are shown."""

    path: Annotated[str | None, Mark.PATH] = None
    """Folder or file of questions about videos, or, in the sft stage, of conversations; None makes
    the needle world."""
    reader: Own | Callable[..., Row] | None = None
    """Your function that makes a question of each record of `path`, as `path/to/file.py:name` (see
    `pipelines.datasets.question_rows`); None reads the columns that are documented."""
    video_root: Annotated[str | None, Mark.PATH] = None
    """Folder below which all videos lie; None takes that of the data."""
    mixture: Annotated[tuple[str, ...], Mark.PATH] = ()
    """Further data sets that are mixed with `path`, or with the needle world."""
    weights: Annotated[tuple[float, ...], above(0)] = ()
    """How often each data set is drawn from, `path` first; empty goes by their sizes."""
    max_rejected: Annotated[float, within(0, 1), Mark.SAME_RESULTS] = 0.05
    """Largest share of rows of a data set whose files are missing or that cannot be used."""
    workers: Annotated[int, at_least(0), Mark.SAME_RESULTS] = 0
    """Processes of each host that decode and render prompts; 0 uses threads of this one."""
    decode_threads: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 4
    """Threads of each host, or of each of its `workers`, that do so."""
    steps_ahead: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 2
    """Steps whose prompts are made before they are asked for; each host keeps all of them."""
    cache_mb: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 512
    """MiB of decoded frames that each host keeps, for crops of what it has shown."""
    frame_budgets: Annotated[tuple[int, ...], at_least(1)] = (4, 8, 16, 32, 64)
    """Choices of K, drawn uniformly per prompt (frame gating). One value switches gating off."""
    frames_as: Literal["image", "video"] = "image"
    """`image`: each frame is one image with its time, as in ParaVT. `video`: frames in pairs."""
    video_marks: Literal["outer", "each"] | None = None
    """Vision marks of videos: `outer`, around each pair of frames and the whole video, as
    transformers from 5.10 on; `each`, as before. None: what the model folder says, else `outer`."""
    instructions: Literal["full", "terse", "timed"] = "full"
    """What the agent is told besides the question: `full` says how to answer and to crop, `terse`
    next to nothing, for a model that learned its protocol in a cold start. `timed` is `full`, and
    the reasoning is to say when, as VISD's rewards read it."""
    subtitles: bool = False
    """Show the subtitles beside each video (`NAME.srt` for `NAME.mp4`), with their times."""
    crop_fps: Annotated[float, above(0)] = 1.0
    """Frames per second of a crop."""
    crop_frames: Annotated[int, at_least(1)] = 16
    """At most this many frames in a crop."""
    min_pixels: Annotated[int, at_least(1)] = 784
    """Least pixels of a frame after resizing."""
    max_pixels: Annotated[int, at_least(1)] = 50176
    """Most pixels of a frame after resizing."""
    max_prompt_tokens: Annotated[int | None, at_least(1)] = None
    """Tokens of the longest prompt, shown with the most frames; rows with longer ones are left out
    and counted (`data.max_rejected`). None: what the model's `max_position_embeddings` leaves
    beside an episode. In the sft stage, of what stands before the first learned token."""
    overview_tokens: Annotated[int | None, at_least(1)] = None
    """Most vision tokens that the frames of a prompt share, as in Video-o3: they are made smaller
    until they fit. None: pixels alone decide."""
    question_types: tuple[QuestionType, ...] = (
        QuestionType.OPEN,
        QuestionType.GROUNDING,
        QuestionType.CHOICE,
    )
    """Which kinds of question to train and evaluate on."""
    train_videos: Annotated[int, at_least(1)] = 2000
    """Videos of the needle world to train on."""
    held_out_videos: Annotated[int, at_least(1)] = 256
    """Videos of the needle world that are only evaluated on, and as many that settings are not
    even compared by (`evaluation.split`)."""
    max_bad_rows: Annotated[float, within(0, 1), Mark.SAME_RESULTS] = 0.01
    """Largest share of the rows whose videos may turn out to be unreadable. Those are left out;
    a run with more of them stops."""
    decode_seconds: Annotated[float, above(0), Mark.SAME_RESULTS] = 300.0
    """Longest time that the frames of one overview or crop may take to decode. A video that takes
    longer counts as unreadable (`max_bad_rows`)."""
    fetched_gb: Annotated[float, above(0), Mark.SAME_RESULTS] = 50.0
    """GiB of videos and images of `gs://` and `s3://` that are kept on this host's disk, those that
    were used longest ago go first. Tables are kept beside them."""
    cache_dir: Annotated[str, Mark.PATH, Mark.SAME_RESULTS] = "data"
    """Where prepared data (videos of the needle world, ArrayRecord files) are kept."""

    @property
    def remote(self) -> bool:
        """Whether files of an object store are read."""
        return any(map(is_remote, (self.path, self.video_root, *self.mixture)))

    def check_together(self) -> None:
        """Refuse sizes and numbers that do not fit one another."""
        if not self.frame_budgets:
            raise Refused(self, "{frame_budgets}: give one number of frames, or several")
        if not self.question_types:
            raise Refused(self, "{question_types}: choose {kinds}", kinds=any_of(QuestionType))
        if self.overview_tokens is not None and self.overview_tokens < max(self.frame_budgets):
            raise Refused(
                self,
                "{overview_tokens} is less than one for each of {frames} frames; raise it or lower "
                "{frame_budgets:name}",
                frames=max(self.frame_budgets),
            )
        if self.min_pixels > self.max_pixels:
            raise Refused(self, "{min_pixels} is above {max_pixels}; lower it")
        if self.weights and self.mixture and len(self.weights) != 1 + len(self.mixture):
            raise Refused(
                self,
                "{weights}: give one weight for --data (or the needle world) and one for each of "
                "the {count} data sets of {mixture:name}",
                count=len(self.mixture),
            )
