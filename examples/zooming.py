"""A recipe of your own: the demo, with a tool, a surrogate and a reward from the files beside it.

    python train/main.py --recipe examples/zooming.py:zooming

A recipe says what differs from another one. It may hold functions themselves; config.json keeps
their file and name, and a resumed run finds them again or says which is gone.
"""

from brevity import brief
from cispo import cispo
from zoom_image import zoom_image

from train.config import Config
from train.recipes import get_recipe
from train.settings.override import based_on


def zooming() -> Config:
    """Crops and enlarged boxes, rewarded for few words, two updates of each batch."""
    changes = {
        "agent.tools": ("crop_video", zoom_image),
        "rewards.scheme": brief,
        "objective.surrogate": cispo,
        "objective.anchor": "sequence",
        "rl.minibatches": 2,
    }
    return based_on(get_recipe("needle_rl"), changes)
