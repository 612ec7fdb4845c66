"""Parts of a model that can be frozen, or learn at a rate of their own.

Each family's table of parameters says which of them belong to which (`ParamSpec.part`).
"""

from __future__ import annotations

from typing import Literal

Part = Literal["vision", "mergers", "embedding", "layers", "router", "head"]
"""`vision`: the tower without its `mergers`, which make tokens of what it sees. `embedding`: of
words, and the head where both are one. `layers`: of the language model, with the last norm, without
the `router` of experts. `head`: that of the vocabulary."""
SEEN: tuple[Part, ...] = ("vision", "mergers")
"""Parts that train only with `model.train_vision`."""
