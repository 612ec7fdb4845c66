"""An anchor of one's own: the tags that end a thought or an answer earn what the format earned.

python train/main.py --set objective.anchor=examples/closing_tags.py:closing_tags \\
    --set objective.anchor_weight=0.5 --set rewards.anchor_weight=0
"""


def closing_tags(structure, rewards):
    """The credit of each token: the format reward above its group's mean, at closing tags."""
    above = rewards["format"] - rewards["format"].mean(axis=1, keepdims=True)
    return structure.mask("</think>", "</answer>") * above.reshape(-1, 1)
