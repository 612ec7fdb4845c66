"""Settings of what a run leaves in its workdir."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from paravt_jax.ranges import at_least
from paravt_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class OutputSettings(Settings):
    """What a run leaves in its workdir."""

    checkpoint_every: Annotated[int, at_least(0)] = 0
    """Steps between checkpoints; 0 leaves it to the minutes. The last step is always saved, and so
    is the state that a signal finds."""
    checkpoint_minutes: Annotated[float, at_least(0)] = 10.0
    """Minutes between checkpoints, at the next step; 0 leaves it to the steps."""
    keep_checkpoints: Annotated[int, at_least(1)] = 2
    """The newest ones that stay. With one there is none to fall back to if it is damaged."""
    keep_minutes: Annotated[float, at_least(0)] = 0.0
    """Of older ones, the first stays and then each that is so many minutes younger than the last
    that stays; 0: none."""
    keep_best: Annotated[int, at_least(0)] = 0
    """The states that evaluated best in the midst of the run (`evaluation.every`, by
    `evaluation.best`) are saved at once, and so many of them stay."""
    rollouts: bool = True
    """Write `rollouts/*.jsonl`."""
    details_mb: Annotated[float, at_least(0)] = 0.0
    """MiB of `details/`, which hold what a page shows of rollouts besides their text: of every
    token the learner's log-probability, its advantage and what the format anchor adds to that, and
    frames as small JPEGs. Steps that are told so are spread evenly over the run; 0 tells none."""
    report: bool = True
    """Write `report/` at the end, the page of the run."""
    export_hf: bool = True
    """Write `hf/` at the end."""
    compile_cache: str | None = "~/.cache/paravt_jax/compiled"
    """Folder that keeps compiled programs, so that a later run need not compile them again;
    `JAX_COMPILATION_CACHE_DIR` comes first. None keeps none."""
    compile_cache_gb: Annotated[float, at_least(0)] = 4.0
    """GiB that this folder is cut down to before a run, programs that were longest not used first;
    0 keeps all."""
