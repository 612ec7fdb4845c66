"""Rollouts made by hand: what they said, or what they were given for it."""

from __future__ import annotations

import numpy as np

from paravt_jax.records import CallResult, Prompt, StopReason, ToolCall, Trajectory, Turn

NONE = np.zeros(0, np.int32)

ANSWER = "<think>\nI saw a red circle.\n</think>\n<answer>red</answer><|im_end|>"


def trajectory(*texts: str, calls: int = 0, executed: int = 0) -> Trajectory:
    """A rollout of one turn per text; its first turn makes the calls."""
    none = np.zeros(0, np.int32)
    turns = tuple(
        Turn(
            prefix=none,
            tokens=none,
            log_probs=none.astype(np.float32),
            stop_reason=StopReason.END,
            text=text,
            calls=tuple(ToolCall("crop_video", {}) for _ in range(calls if not number else 0)),
            results=tuple(CallResult("", n < executed) for n in range(calls if not number else 0)),
        )
        for number, text in enumerate(texts)
    )
    prompt = Prompt(none, none.reshape(0, 3), none)
    return Trajectory(
        prompt=prompt,
        tokens=np.zeros(4, np.int32),
        generated=np.array([True, True, False, True]),
        log_probs=np.zeros(4, np.float32),
        turns=turns,
        scored_text="".join(texts),
        full_text="".join(texts),
    )


def rewarded(total, accuracy=0.0, length=0) -> Trajectory:
    """A rollout of `2 * length` tokens, half of them generated, with these rewards."""
    rewards = {"total": total, "accuracy": accuracy, "format": 0.0, "tool": 0.0, "task": total - 1}
    return Trajectory(
        prompt=Prompt(NONE, NONE.reshape(0, 3), NONE),
        tokens=np.zeros(2 * length, np.int32),
        generated=np.arange(2 * length) < length,
        log_probs=np.zeros(2 * length, np.float32),
        turns=(),
        scored_text="",
        full_text="",
        rewards=rewards,
    )
