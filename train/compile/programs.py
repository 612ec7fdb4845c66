"""The programs of a run as shapes, and how often a step calls each: what `--compile-only` compiles.

Shapes come from the code that makes them in a run; numbers of calls are those of a step in which
every rollout takes all that its limits allow. A batch of prompts or of tool responses counts as one
call of the largest shape, although it may come in several.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from paravt_jax.blocks import text_block
from paravt_jax.mesh import partition
from paravt_jax.params import abstract_params
from paravt_jax.records import Pack, Patches, Prompt, Row
from rollout.engine.programs import EngineCall, EngineCalls
from rollout.limits import CROP, MAIN
from train import setup
from train.batch import LearnerStream, learner_batch, packed_batch
from train.compile.ahead import LargestBatch
from train.compile.footprint import footprint, local_bytes
from train.compile.input_sizes import agent_input_sizes
from train.compile.layout import open_layout
from train.compile.program import Program, Weights
from train.config import Config, Stage
from train.optimizer import make_optimizer
from train.rl.batches import streams_per_row, streams_per_view
from train.rl.learner import minibatch_step
from train.sft.batches import PACKS
from train.state import abstract_state, split, trainable_names
from train.step import SftStep


def programs_of(config: Config, mesh: Mesh, rows: list[Row]) -> list[Program]:
    """The programs of a run on this mesh, which must be active; `rows` are questions as long as
    any."""
    if config.stage is Stage.SFT:
        return list(_SftPrograms(config, mesh))
    return list(_RlPrograms(config, mesh, rows))


class _Programs:
    """What both stages share."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.parts = setup.Parts(config)
        self.policy = self.parts.policy
        self.spec = self.parts.renderer.spec
        self.weights = Weights.of(self.policy)
        self.params = abstract_params(self.policy.table, mesh)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        config = self.config
        return make_optimizer(config.optimizer, config.optimizer_steps, self.policy.table)

    @functools.cached_property
    def taught(self) -> bool:
        return self.config.teacher.strength > 0

    @functools.cached_property
    def trained(self) -> set[str]:
        return trainable_names(self.policy.table, self.config.model)

    @functools.cached_property
    def state(self) -> Any:
        return self._state_of(self.params)

    def _state_of(self, params: dict[str, Any]) -> Any:
        return abstract_state(params, self.trained, self.mesh, self.optimizer, self.taught)

    def lay_out(self, tree: Any, rows: int | None = None) -> Any:
        """Shapes as `train.batch.to_mesh` puts arrays on the mesh, with so many rows."""

        def home(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = leaf.shape if rows is None else (rows, *leaf.shape[1:])
            axes = ("batch", *(None,) * (len(shape) - 1))
            placed = jax.sharding.NamedSharding(
                self.mesh, partition(dict(self.mesh.shape), axes, shape)
            )
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=placed)

        return jax.tree.map(home, tree)

    def seen_flops(self, rows: int, frames: int) -> float:
        """Of the vision tower, forward."""
        return 2 * self.weights.vision * rows * frames * self.spec.max_patches


class _RlPrograms(_Programs):
    """Those of the `rl` stage."""

    def __init__(self, config: Config, mesh: Mesh, rows: list[Row]) -> None:
        super().__init__(config, mesh)
        self.rows, self.rl, self.agent = rows, config.rl, config.agent
        self.pools = self.parts.pools(rows)
        # The reference is a copy of what trains.
        reference, staleness = config.rl.reference_memory == "device", config.rl.staleness
        copies = (
            self.state,
            self.state.trainable if reference else {},
            [self.state.trainable] * staleness,
        )
        options = config.rollout_mesh, config.model.compute_dtype
        layout = open_layout(self.policy, mesh, *options, copies)
        agents = dataclasses.replace(self.parts.agents, layout=layout)
        self.engine = agents.engine(self.pools, routing=self.rl.routing_replay)
        self.rollout_mesh = self.engine.mesh or mesh
        arguments = self.policy, self.optimizer, config.model, mesh, self.taught, self.pools
        self.held = footprint(*arguments, self.engine.mesh, reference, staleness)
        dtype, objective = config.model.compute_dtype, config.objective
        self.minibatch = LargestBatch(
            config.rl, config.agent, config.data, self.policy, dtype, objective
        )

    def __iter__(self) -> Iterator[Program]:
        yield from self._hand_over()
        for call in self._engine_calls():
            yield self._of_engine(call)
        yield from self._learner()

    def _beside(self, *names: str) -> float:
        """Bytes of what lives all through a run, less these parts."""
        passing = {"gradients", "rollout weights", "rollout caches", *names}
        return float(sum(size for name, size in self.held.items() if name not in passing))

    def _hand_over(self) -> Iterator[Program]:
        """The learner's weights as rollouts take them: cast, then laid out on another mesh."""
        yield Program(
            "cast weights",
            lambda: jax.jit(self.policy.prepare).lower(self.params),
            self.mesh,
            calls=1.0,
            part="rollout",
            beside=self._beside("parameters"),
        )
        if self.rollout_mesh is not self.mesh:
            cast = self._prepared(self.mesh)
            yield Program(
                "hand-over",
                lambda: self.engine.handing_over(cast, self.rollout_mesh).lower(cast),
                self.mesh,
                calls=1.0,
                part="rollout",
                beside=self._beside(),
            )

    def _engine_calls(self) -> Iterator[EngineCall]:
        config, parts = self.config, self.parts
        sizes = agent_input_sizes(config.agent, config.data, parts.renderer, self.rows, parts.hints)
        values, weights = self.spec.patch_values, self._prepared(self.rollout_mesh)
        yield from EngineCalls(self.engine, weights, sizes, self.rollout_mesh, values)

    def _prepared(self, mesh: Mesh) -> Any:
        """Shapes of what `Policy.prepare` returns, laid out on a mesh."""
        made = jax.eval_shape(self.policy.prepare, self.params)
        return jax.tree.map(
            lambda leaf, home: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home),
            made,
            self.policy.shardings(made, mesh),
        )

    def _of_engine(self, call: EngineCall) -> Program:
        function = getattr(self.engine, call.function.split()[0])
        # What it is given of the caches is counted with its arguments.
        caches = self.held["rollout caches"] - self._caches_given(call)
        return Program(
            call.name,
            lambda: function.lower(*call.arguments),
            self.rollout_mesh,
            calls=float(self._calls(call)),
            part="rollout",
            tokens=call.rows * call.tokens,
            model_flops=self._flops(call),
            beside=self._beside() + caches,
            drawn=self.engine.steps_per_call if call.function == "decode" else 1,
            of_engine=True,
            spoken=call.function == "decode" or call.pools == (CROP,),
        )

    def _caches_given(self, call: EngineCall) -> int:
        states = () if call.function.startswith("encode") else call.arguments[1]
        return local_bytes([leaf for leaf in jax.tree.leaves(states) if leaf.ndim > 3])

    def _flops(self, call: EngineCall) -> float:
        weights = self.weights
        if call.function.startswith("encode"):
            return self.seen_flops(call.rows, call.frames)
        head = weights.head if call.function == "decode" else 0
        return 2 * (weights.layers + head) * call.rows * call.tokens

    def _calls(self, call: EngineCall) -> int:
        """How often a step calls a function; decoding is counted in tokens."""
        agent, rl = self.agent, self.rl
        rollouts = rl.prompts_per_step * rl.group_size
        if len(call.pools) > 1:
            return 0  # counted where its pools stand alone
        main = call.pools == (MAIN,)
        waves = math.ceil(rollouts * agent.calls_run / self.pools[CROP].rows) if not main else 0
        if call.function == "decode":
            crops = agent.rounds * waves * self.pools[CROP].suffix if not main else 0
            return agent.generated_tokens if main else crops
        if "append" in call.function:
            return agent.rounds * (1 if main else waves)
        requests = rl.prompts_per_step if main else rollouts * agent.rounds * agent.calls_run
        return math.ceil(requests / call.rows)

    def _learner(self) -> Iterator[Program]:
        rl, config = self.rl, self.config
        whole = dataclasses.replace(
            self.minibatch, rl=dataclasses.replace(rl, epochs=1, minibatches=1)
        )
        step = setup.open_rl_step(config, self.policy, self.optimizer)
        reference = dataclasses.replace(step, micro_batches=step.micro_batches * rl.minibatches)
        yield self._encode()
        batch, table = whole.abstract(self.mesh), self.minibatch.table(self.mesh)
        streams = batch.loss_weights.shape[0]
        positions = self.weights.layers * batch.tokens.size
        flops = 2 * (positions + self.weights.head * streams * step.budget)
        yield Program(
            "reference log-probs",
            lambda: jax.jit(reference.log_probs).lower(self.params, batch, table),
            self.mesh,
            calls=self._references(),
            part="learner",
            tokens=batch.tokens.size,
            model_flops=flops,
            beside=self._beside("reference"),
        )
        share = self.minibatch.abstract(self.mesh)
        trainable, frozen = split(self.params, self.trained)
        state = self._state_of(trainable)
        yield Program(
            "step",
            lambda: minibatch_step(step).lower(state, frozen, share, table),
            self.mesh,
            calls=float(rl.updates),
            part="learner",
            tokens=share.tokens.size,
            model_flops=3 * flops / rl.minibatches,
            beside=self._beside("parameters", "moments", "teacher"),
        )

    def _references(self) -> float:
        """Passes of a step without gradients: of the reference where something uses it, else now
        and then for a metric, and of the policy itself where ratios are measured from it."""
        config = self.config
        used = config.objective.kl_weight or config.advantages.kl_weight
        proximal = config.objective.computes_proximal(self.rl.updates)
        return (1.0 if used else 1.0 / self.rl.reference_every) + float(proximal)

    def _encode(self) -> Program:
        """The learner's own vision features, of all prompts at once."""
        rl, spec = self.rl, self.spec
        per_row = streams_per_row(rl.group_size, rl.micro_groups, self.mesh)
        shared = streams_per_view(rl.group_size, rl.prompts_per_step, per_row, self.mesh)
        rows = rl.prompts_per_step * rl.group_size // shared
        frames = spec.group_count(max(self.config.data.frame_budgets))
        shape = rows, frames, spec.max_patches, spec.patch_values
        values = jax.ShapeDtypeStruct(shape, jnp.float32)
        grids = jax.ShapeDtypeStruct((rows, frames, 2), jnp.int32)
        placed = self.lay_out((values, grids))
        return Program(
            "encode learner",
            lambda: jax.jit(self.policy.encode).lower(self.params, *placed),
            self.mesh,
            calls=1.0,
            part="learner",
            model_flops=self.seen_flops(rows, frames),
            beside=self._beside("parameters"),
        )


class _SftPrograms(_Programs):
    """Those of the `sft` stage: its step."""

    def __iter__(self) -> Iterator[Program]:
        sft = self.config.sft
        batches, budgets = self._packs() if self.config.packs_conversations else self._tasks()
        update = SftStep(
            policy=self.policy,
            optimizer=self.optimizer,
            micro_rows=sft.micro_rows,
            budgets=budgets,
            router_balance=self.config.model.router_balance,
        )
        yield Program(
            "step",
            lambda: jax.jit(update, donate_argnums=0).lower(self.state, batches),
            self.mesh,
            calls=1.0,
            part="learner",
            tokens=sum(batch.tokens.size for batch in batches.values()),
            model_flops=3
            * sum((self._flops(batches[task], budgets[task]) for task in batches), 0.0),
        )

    def _flops(self, batch: Any, budget: int) -> float:
        """Forward; a tower that does not train has no gradients, which is not told apart."""
        rows, length = batch.tokens.shape
        seen = 0 if batch.patches is None else batch.patches.shape[1]
        spoken = self.weights.layers * length + self.weights.head * budget
        return 2 * spoken * rows + self.seen_flops(rows, seen)

    def _packs(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Rows of packed conversations that are full of frames."""
        packing, spec = self.config.sft.packing, self.spec
        tokens = packing.tokens
        pack = Pack(self._shown(tokens), np.zeros(tokens, np.float32), np.ones(tokens, np.int32))
        batch = packed_batch(
            [pack],
            length=tokens,
            pad_id=0,
            frames=packing.frames,
            frame_patches=spec.max_patches,
        )
        return {PACKS: self.lay_out(batch, packing.rows)}, {PACKS: tokens}

    def _tasks(self) -> tuple[dict[str, Any], dict[str, int]]:
        """The largest phase of a schedule of tasks of the needle world."""
        sft = self.config.sft
        phase = max(sft.phases, key=lambda phase: sum(phase.rows.values()))
        batches = {}
        for task, rows in phase.rows.items():
            shape, nothing = sft.tasks[task], np.zeros(0, np.float32)
            block = self._shown(1) if shape.frames else text_block([0])
            stream = LearnerStream(block, nothing.astype(np.int32), nothing, nothing)
            batch = learner_batch(
                [stream],
                length=shape.length,
                pad_id=0,
                frames=shape.frames,
                frame_patches=self.spec.max_patches,
            )
            batches[task] = self.lay_out(batch, rows)
        return batches, {task: shape.learned for task, shape in sft.tasks.items()}

    def _shown(self, tokens: int) -> Prompt:
        """A stream that shows one frame of one vision token."""
        spec, block = self.spec, text_block([0] * tokens)
        block.vision_index[0] = 0
        values = np.zeros((1, spec.max_patches, spec.patch_values), np.float32)
        patches = Patches(values, np.full((1, 2), spec.merge_size, np.int32))
        return dataclasses.replace(block, patches=patches)
