"""What else a run has to know of a setting, written as an annotation beside the field.

    cache_dir: Annotated[str, Mark.PATH, Mark.SAME_RESULTS] = "data"

On the field of a section a mark stands for all settings in it. `paravt_jax.settings.marked` looks
them up.
"""

from __future__ import annotations

import enum


class Mark(enum.Enum):
    """One such thing."""

    SAME_RESULTS = enum.auto()
    """It decides where and how fast, not what is learned: a resumed run may give it anew."""
    MAY_CHANGE = enum.auto()
    """A resumed run may give it anew, although it changes what is learned."""
    EVALUATED = enum.auto()
    """Results of the evaluation before and after a run depend on it."""
    PATH = enum.auto()
    """It names a file or a folder, or several: compared by what it leads to."""
    MAY_BE_EMPTY = enum.auto()
    """An empty text means that there is none."""
    MAY_BE_BLANK = enum.auto()
    """Spaces and line breaks alone mean something."""
