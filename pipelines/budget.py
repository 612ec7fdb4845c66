"""Frame gating: how many overview frames K each prompt shows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def check_budgets(choices: Sequence[int]) -> None:
    """Refuse choices of K that cannot be drawn from.

    Raises:
        ValueError: there is no choice, or one is not a positive number.
    """
    if not choices or min(choices) < 1:
        raise ValueError(
            f"frame budgets {tuple(choices)}: give at least one choice, all of them 1 or more"
        )


def frame_budget(seed: int, epoch: int, row_id: str, choices: Sequence[int]) -> int:
    """Draw K uniformly from `choices` for one row in one epoch (ParaVT's nFrames gating).

    A hash of the arguments decides, not a generator with a state: all rollouts of a group,
    every process and a resumed run draw the same K.

    Raises:
        ValueError: see `check_budgets`.
    """
    check_budgets(choices)
    key = "\x1f".join(("frame budget", str(seed), str(epoch), row_id))
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    # 64 bits over a handful of choices: the bias of the remainder is below 1e-17.
    return int(choices[number % len(choices)])


def shares(budget: int, videos: int) -> list[int]:
    """Frames of each of `videos` videos that share a budget, the first ones get what is left over.

    Even numbers where there are enough frames, so that videos shown in pairs of frames need no
    padding.

    Raises:
        ValueError: there are more videos than frames.
    """
    if videos > budget:
        raise ValueError(
            f"{videos} videos cannot share a frame budget of {budget}; raise the least of "
            "data.frame_budgets, or leave out such rows"
        )
    size = 2 if budget >= 2 * videos and budget % 2 == 0 else 1
    least, more = divmod(budget // size, videos)
    return [size * (least + (number < more)) for number in range(videos)]
