"""Whether a model sees the frames that it is asked about: the guard of evaluations."""

from __future__ import annotations

import logging

import jax

from evaluate.model import Opened
from paravt_jax.mesh import batch_shards
from paravt_jax.records import Trajectory
from pipelines.render import ChatRenderer
from train.rl.batches import BatchShapes
from train.rl.sight import Sight

_LOG = logging.getLogger(__name__)


class Seeing:
    """How probable is what an answer rests on, with its frames and with grey ones: the first report
    on a crop, where there is one, else the last turn."""

    def __init__(self, model: Opened, renderer: ChatRenderer, patches: int):
        """
        Args:
          renderer: of crops.
          patches: of the largest frame of a prompt.
        """
        mesh, self._patches = model.mesh, patches
        shapes = BatchShapes(renderer.spec, renderer.pad_id, prompt_frames=0, crop_frames=0)
        rows = batch_shards(dict(mesh.shape))
        self._params = model.params
        self._sight = Sight(model.agents.policy, mesh, shapes, every=1, rows=rows)

    def __call__(self, rollout: Trajectory) -> dict[str, float]:
        """`seeing` and `blind` in nats a token; nothing where no frame was shown."""
        told, patches = (rollout.subagents[0], 0) if rollout.subagents else (rollout, self._patches)
        shown = told.prompt.patches
        if shown is None:
            return {}
        # Few sizes, as each is compiled.
        frames = 1 << (len(shown.values) - 1).bit_length()
        try:
            seeing, blind = self._sight.of(self._params, [told], frames, patches)
        except jax.errors.JaxRuntimeError as error:
            # A whole stream takes more memory than answering it did: no reason to end.
            _LOG.warning("not measured whether the model sees, see --sight: %s", error)
            return {}
        return {"seeing": seeing, "blind": blind}
