"""Functions of the user's own that are not there, fail, or are not what the setting takes."""

from tests.contracts.mistakes import Mistake

MINE = {
    "mine.py": "def reward(attempt):\n    return {}\ndef credit(structure, rewards): ...\n",
    "broken.py": "x = 1\ny = x / 0\n",
}

ROWS = [
    Mistake("--set rewards.scheme=no.py:reward", ("rewards.scheme=no.py", "no such file")),
    Mistake("--set rewards.scheme=mine.py:", ("rewards.scheme=", "mine.py:", "file.py:name")),
    Mistake(
        "--set rewards.scheme=mine.py:reward",
        ("rewards.scheme=", "mine.py:reward", "@reward_terms"),
        files=MINE,
    ),
    Mistake(
        "--set objective.surrogate=mine.py:absent",
        ("objective.surrogate=mine.py:absent", "absent"),
        files=MINE,
    ),
    Mistake(
        "--set objective.surrogate=broken.py:loss",
        ("objective.surrogate=", "broken.py:2", "ZeroDivisionError"),
        files=MINE,
    ),
    Mistake(
        "--set objective.surrogate=no_such_package.losses:loss",
        ("objective.surrogate=", "no_such_package"),
    ),
    Mistake(
        "--set objective.anchor=mine.py:credit --set rewards.anchor_weight=0",
        ("objective.anchor=", "mine.py:credit", "objective.anchor_weight=0"),
        files=MINE,
    ),
    Mistake(
        "--set objective.anchor=mine.py:credit --set objective.anchor_weight=1",
        ("objective.anchor=", "rewards.anchor_weight=0.5"),
        files=MINE,
    ),
]
