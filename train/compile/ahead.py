"""The learner's largest batch as shapes, known without any rollout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import ModelPolicy
from paravt_jax.interfaces import routing_of
from paravt_jax.mesh import partition
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.records import LearnerBatch, VisionFeatures
from paravt_jax.shapes import bucket
from paravt_jax.shared_rows import Bounds, unit_of
from pipelines.preprocess import SPECS
from rollout.limits import AgentConfig
from train.batch import blank_batch
from train.data.settings import DataSettings
from train.rl.batches import LENGTH_UNIT, streams_per_row, streams_per_view, with_what_shaped
from train.rl.settings import RlSettings
from train.rl.subagents import possible_rows
from train.step import batch_axes

GRAMMAR_STATES = 256
"""Holds the grammar of any one of our tools; the real number takes a tokenizer to know."""
_ALL = PartitionSpec()
"""A whole copy on every device."""


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """What decides the shapes of the largest minibatch of a run."""

    rl: RlSettings
    agent: AgentConfig
    data: DataSettings
    policy: ModelPolicy
    compute_dtype: str
    objective: ObjectiveConfig = ObjectiveConfig()

    def abstract(self, mesh: Mesh) -> LearnerBatch:
        """Its shapes, laid out on the mesh."""

        def lay_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = batch_axes(leaf)
            home = NamedSharding(mesh, partition(dict(mesh.shape), axes, leaf.shape))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)

        return jax.tree.map(lay_out, jax.eval_shape(functools.partial(self._zeros, mesh)))

    def table(self, mesh: Mesh) -> jax.ShapeDtypeStruct | None:
        """Shape of the table of a grammar, on every device; None without one."""
        if not self.agent.sampling.constrain and not self.agent.subagent_sampling.constrain:
            return None
        shape, home = (GRAMMAR_STATES, self.policy.vocab_size), NamedSharding(mesh, _ALL)
        return jax.ShapeDtypeStruct(shape, jnp.int16, sharding=home)

    def _zeros(self, mesh: Mesh) -> LearnerBatch:
        agent, rl = self.agent, self.rl
        groups = rl.prompts_per_step // rl.minibatches
        seen = most_vision_tokens(self.data, self.policy, max(self.data.frame_budgets))
        responses = agent.rounds * agent.max_calls_per_turn * agent.response_tokens
        own = agent.generated_tokens + responses
        per_row = streams_per_row(rl.group_size, rl.micro_groups, mesh)
        longest = seen * 5 // 4 + 256
        unit = unit_of(mesh.devices.flat[0].platform, longest, own, rl.group_size)
        views = rl.group_size // streams_per_view(rl.group_size, rl.prompts_per_step, per_row, mesh)
        streams = groups * rl.group_size
        main = self._streams(streams, groups * views, seen, own, per_row, unit)
        main = with_what_shaped(main, agent.sampling)
        if not rl.trains_subagents:
            return main
        rows = groups * possible_rows(agent.rounds * agent.calls_run, rl.group_size)[-1]
        seen = most_vision_tokens(self.data, self.policy, self.data.crop_frames)
        crops = self._streams(rows, rows, seen, agent.subagent_tokens)
        crops = with_what_shaped(crops, agent.subagent_sampling)
        return dataclasses.replace(main, subagents=crops)

    def _streams(
        self, streams: int, groups: int, seen: int, own: int, per_row: int = 0, unit: int = 1
    ) -> LearnerBatch:
        """Streams that see `seen` vision tokens each and say or are told `own` tokens after them,
        `per_row` to a prompt; 0 makes each a row of its own. `groups` of them share frames."""
        policy, width = self.policy, self.policy.width
        proximal = self.objective.computes_proximal(self.rl.updates)
        routing = routing_of(policy) if self.rl.routing_replay else None
        prompt, dtype = seen * 5 // 4 + 256, jnp.dtype(self.compute_dtype)
        if per_row:
            unit = max(unit, LENGTH_UNIT)
            prompt, own = (-(-x // unit) * unit for x in (prompt, own))
            rows = streams // per_row
            batch = dataclasses.replace(
                blank_batch(rows, prompt + per_row * own, streams, own),
                starts=np.zeros(streams, np.int32),
                bounds=Bounds(prompt, own, unit),
            )
        else:
            batch = blank_batch(streams, bucket(prompt + own, LENGTH_UNIT))
        deepstack = groups, policy.deepstack_levels, seen, width
        return dataclasses.replace(
            batch,
            features=VisionFeatures(
                tokens=jnp.zeros((groups, seen, width), dtype),
                deepstack=jnp.zeros(deepstack, dtype),
            ),
            proximal_log_probs=batch.advantages if proximal else None,
            prompt_lengths=batch.tokens[:, 0],
            floors=batch.advantages,
            grammar=np.zeros(batch.loss_weights.shape, np.int32),
            routing=routing and jnp.zeros((*batch.tokens.shape, routing.choices), routing.dtype),
        )


def most_vision_tokens(data: DataSettings, policy: ModelPolicy, frames: int) -> int:
    """Vision tokens of a prompt of `frames` frames, padded as the learner pads them."""
    spec = SPECS[data.frames_as](*policy.patch_sizes)
    spec = spec.limited(data.min_pixels, data.max_pixels)
    return spec.group_count(frames) * spec.max_patches // spec.merge_size**2
