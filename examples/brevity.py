"""A reward of one's own: right answers in the strict form, and few words on the way.

python train/main.py --set rewards.scheme=examples/brevity.py:brief --set objective.anchor=sequence
"""

from paravt_jax.protocol import parses_strictly
from paravt_jax.rewards import Attempt, reward_terms

ENOUGH = 100
"""Words of a rollout that cost all of the penalty."""


@reward_terms(accuracy=(0, 1), format=(0, 1), brevity=(-0.2, 0))
def brief(attempt: Attempt) -> dict[str, float]:
    """The terms of one rollout; their sum trains."""
    strict = [parses_strictly(turn, syntax=attempt.call_syntax) for turn in attempt.turns]
    words = len(attempt.text.split())
    return {
        "accuracy": attempt.accuracy(),
        "format": float(all(strict)),
        "brevity": -0.2 * min(words / ENOUGH, 1.0),
    }
