"""What a token is drawn from, in plain float64 numpy: an oracle for sampler and learner."""

from __future__ import annotations

import numpy as np

from rollout.engine.sampler import SamplingConfig


def processed(
    logits: np.ndarray,
    own: SamplingConfig,
    seen: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Log-probabilities `[vocab]` after penalty, grammar, temperature, top-k, top-p and min-p;
    minus infinity where nothing can be drawn. Tokens that tie share their fate."""
    z = np.array(logits, np.float64)
    if seen is not None:
        factor = np.where(z < 0, own.repetition_penalty, 1 / own.repetition_penalty)
        z = np.where(seen, z * factor, z)
    if allowed is not None:
        z = np.where(allowed, z, -np.inf)
    z = z / (own.temperature or 1.0)
    if own.top_k:
        z = np.where(z >= np.sort(z)[::-1][: own.top_k][-1], z, -np.inf)
    if own.top_p < 1:
        likeliest = np.sort(z)[::-1]
        mass = np.cumsum(np.exp(likeliest - _log_sum(likeliest)))
        z = np.where(z >= likeliest[np.argmax(mass >= own.top_p)], z, -np.inf)
    if own.min_p:
        z = np.where(z >= z.max() + np.log(own.min_p), z, -np.inf)
    return z - _log_sum(z)


def _log_sum(z: np.ndarray) -> float:
    return z.max() + np.log(np.exp(z - z.max()).sum())
