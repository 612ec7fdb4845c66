"""The train steps: losses as sums and denominators, gradients over micro-batches, one update.

Law 5: the loss does not depend on micro-batching, device count or mesh. Each
micro-batch returns a sum and a count; both are added up and divided once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.log_probs import UNSHAPED, gathered_log_probs, preceding
from paravt_jax.mesh import constrain
from paravt_jax.objectives import ObjectiveConfig, ObjectiveMetrics, policy_loss
from paravt_jax.pytrees import ArrayLike
from paravt_jax.records import LearnerBatch, VisionFeatures
from paravt_jax.routing import RoutingGap, load_balance, routing_gap
from paravt_jax.shaping import Shaping
from train.state import FlatParams, TrainState


class RouterMetrics(NamedTuple):
    """What is known of the routers of a batch."""

    balance: Float[Array, " b"]
    """How evenly each stream used the experts, 0 in a dense model (see `load_balance`)."""
    gap: RoutingGap | None = None
    """How far they agree with what was replayed; None where nothing was."""


StepMetrics = dict[str, Any]
"""Metrics of one optimiser step: arrays by name, and those of the objective as sums."""


def batch_log_probs(
    policy: TrainablePolicy,
    params: FlatParams,
    batch: LearnerBatch,
    *,
    temperature: float,
    budget: int,
    shaping: Shaping = UNSHAPED,
) -> tuple[Float[Array, "b own"], Float[Array, "b own"], RouterMetrics]:
    """Log-probability and entropy of every token with a loss weight, by a full forward; and what
    is known of the routers. `budget` bounds such tokens of a stream."""
    before, router_logits = batch_hidden(policy, params, batch)
    log_probs, entropy = gathered_log_probs(
        before,
        batch.own_tokens,
        batch.trained > 0,
        policy.head(params),
        temperature=temperature,
        budget=budget,
        lanes=batch.streams_per_row,
        shaping=shaping,
    )
    return log_probs, entropy, _router_metrics(policy, router_logits, batch)


def shaping_of(batch: LearnerBatch, penalty: float, table: ArrayLike | None) -> Shaping:
    """What shaped the draws of a batch: the penalty of its sampling settings, the table of its
    engine's automata, and what the batch holds."""
    return Shaping(
        penalty=None if penalty == 1 else penalty,
        prompt_lengths=batch.prompt_lengths if batch.shared is None else None,
        floors=batch.floors,
        grammar=batch.grammar,
        table=table,
    )


def batch_hidden(
    policy: TrainablePolicy, params: FlatParams, batch: LearnerBatch
) -> tuple[Float[Array, "b own d"], Float[Array, "l rows t e"] | None]:
    """The hidden states that predict the tokens of all streams (see `preceding`), and what the
    routers said, see `hidden_and_router`."""
    hidden, router_logits = policy.hidden_and_router(
        params,
        batch.tokens,
        batch.positions,
        batch.vision_index,
        _row_features(policy, params, batch),
        batch.segments,
        batch.hidden_keys,
        batch.shared,
        batch.routing,
    )
    return preceding(hidden, batch.shared), router_logits


def _router_metrics(
    policy: TrainablePolicy, router_logits: Array | None, batch: LearnerBatch
) -> RouterMetrics:
    if router_logits is None:
        return RouterMetrics(jnp.zeros(batch.loss_weights.shape[0]))
    real, gap = _real(batch), None
    if batch.routing is not None:
        gap = routing_gap(router_logits, batch.routing, real)
    return RouterMetrics(
        load_balance(router_logits, real, policy.experts_per_token, batch.shared), gap
    )


def _real(batch: LearnerBatch) -> Bool[Array, "rows t"]:
    """Which tokens are no padding."""
    slots = batch.tokens.shape[1]
    if batch.shared is not None:
        return batch.shared.segments(slots) >= 0
    return jnp.arange(slots)[None] < jnp.asarray(batch.lengths)[:, None]


def _row_features(
    policy: TrainablePolicy, params: FlatParams, batch: LearnerBatch
) -> VisionFeatures | None:
    """Vision features of each row; computed once per group and repeated for its rows, if there are
    several."""
    features = batch.features
    if features is None and batch.patches is not None and batch.grids is not None:
        features = policy.encode(params, batch.patches, batch.grids)
    if features is None:
        return None
    copies = batch.tokens.shape[0] // features.tokens.shape[0]
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), features)


def split_micro(batch: LearnerBatch, count: int, group_size: int | None = None) -> LearnerBatch:
    """Reshape every `[n, ...]` to `[count, n / count, ...]`, groups kept whole: `group_size`
    neighbouring streams, or those that share frames.

    Micro-batch i takes every count-th group: where a device holds several groups, it works on
    its own in each micro-batch.
    """
    groups = stream_groups(batch, group_size)

    def split(x: Array) -> Array:
        rows = x.shape[0] // groups
        x = x.reshape(groups // count, count, rows, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(count, groups // count * rows, *x.shape[3:])

    return jax.tree.map(split, batch)


def join_micro(pieces: Array, groups: int) -> Array:
    """Inverse of `split_micro` for one `[count, n / count, ...]` array of `groups` groups."""
    count, rows = pieces.shape[0], pieces.shape[0] * pieces.shape[1] // groups
    pieces = pieces.reshape(count, groups // count, rows, *pieces.shape[2:])
    return jnp.moveaxis(pieces, 0, 1).reshape(groups * rows, *pieces.shape[3:])


def encode_parts(
    policy: TrainablePolicy, params: FlatParams, batch: LearnerBatch, count: int
) -> VisionFeatures:
    """Vision features of every row's own frames, `1 / count` of the rows at a time."""
    features = jax.lax.map(
        lambda piece: policy.encode(params, piece.patches, piece.grids), split_micro(batch, count)
    )
    return jax.tree.map(lambda x: join_micro(x, vision_groups(batch)), features)


def minibatch(
    batch: LearnerBatch, index: int | Int[Array, ""], count: int, group_size: int
) -> LearnerBatch:
    """The `index`-th of `count` equal shares of a batch, laid out over the mesh like the whole."""
    pieces = split_micro(batch, count, group_size)
    return jax.tree.map(
        lambda x: constrain(x[index], *batch_axes(x[index])),
        pieces,
    )


def batch_axes(leaf: Any) -> tuple[str | None, ...]:
    """Logical axes of an array of a learner's batch. Vision features, by far the largest, are split
    by their width where tokens are shared (`paravt_jax.mesh.by_width`)."""
    wide = leaf.ndim > 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return "batch", *[None] * (leaf.ndim - 2), *["width" if wide else None] * (leaf.ndim > 1)


def stream_groups(batch: LearnerBatch, group_size: int | None) -> int:
    """Groups of neighbouring streams that stay together."""
    return batch.loss_weights.shape[0] // group_size if group_size else vision_groups(batch)


def vision_groups(batch: LearnerBatch) -> int:
    """Groups of neighbouring rows that share frames; every row is one where nothing is shown."""
    vision = batch.patches if batch.features is None else batch.features.tokens
    return batch.tokens.shape[0] if vision is None else vision.shape[0]


Sums = tuple[Array, Any, Any]
"""Count by which the loss is divided in the end, metrics as sums, and what is kept of every
micro-batch as it is."""


def accumulate(
    loss: Callable[[FlatParams, LearnerBatch], tuple[Array, Sums]],
    trainable: FlatParams,
    batch: LearnerBatch,
    micro_batches: int,
    merge: Callable[[Any, Any], Any] = lambda a, b: jax.tree.map(jnp.add, a, b),
    group_size: int | None = None,
) -> tuple[Array, FlatParams, Any, Any]:
    """Mean loss and its gradients over all micro-batches, merged metrics, and what was kept of each
    micro-batch, stacked.

    `loss` returns `(sum, (count, metrics, kept))`. Sums and counts are added up first and
    divided once, so the result is that of one large batch. Groups as in `split_micro`.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    pieces = split_micro(batch, micro_batches, group_size)
    first = jax.tree.map(lambda x: x[0], pieces)
    (value, (count, metrics, _)), slope = jax.eval_shape(gradient, trainable, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ((value, (count, metrics)), slope))

    def add(carry, piece):
        (total, (count, metrics)), gradients = carry
        (value, (more, extra, kept)), slope = gradient(trainable, piece)
        sums = (total + value, (count + more, merge(metrics, extra)))
        return (sums, jax.tree.map(jnp.add, gradients, slope)), kept

    ((total, (count, metrics)), gradients), kept = jax.lax.scan(add, zeros, pieces)
    # Once, at the end: a micro-batch of short rollouts would otherwise weigh as much as a long one.
    scale = 1.0 / jnp.maximum(count, 1.0)
    return total * scale, jax.tree.map(lambda g: g * scale, gradients), metrics, kept


def mean_metrics(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Metrics of optimiser steps as plain numbers: the objective's over all their tokens, any other
    as the mean of the steps."""
    told = jax.device_get(list(steps))
    watched = [step.pop("objective") for step in told if "objective" in step]
    means = {name: float(np.mean([step[name] for step in told])) for name in told[0]}
    if watched:
        totals = functools.reduce(lambda a, b: a.merge(b), watched)
        means |= {name: float(value) for name, value in totals.means().items()}
    return means


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, gradients: FlatParams
) -> TrainState:
    """One optimiser step. Non-finite gradients leave weights and moments as they were, and so does
    a rehearsal, whose steps count below 0."""
    learns = jnp.isfinite(optax.tree.norm(gradients)) & (state.step >= 0)
    # Optax's counts of steps are integers, and become floats by themselves.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
    weights = optax.apply_updates(state.trainable, updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(learns, a, b), new, old)

    return dataclasses.replace(
        state,
        trainable=keep(weights, state.trainable),
        optimizer=keep(moments, state.optimizer),
        step=state.step + 1,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class SftStep:
    """Supervised step: for each task the mean loss over its learned tokens, summed over tasks."""

    policy: TrainablePolicy
    optimizer: optax.GradientTransformation
    micro_rows: int
    """Rows per micro-batch; must divide the rows of each task."""
    budgets: Mapping[str, int]
    """Most learned tokens in a row, per task."""
    router_balance: float = 0.0
    """Weight of the loss that keeps experts evenly used."""

    def __call__(
        self, state: TrainState, batches: dict[str, LearnerBatch]
    ) -> tuple[TrainState, StepMetrics]:
        gradients = jax.tree.map(jnp.zeros_like, state.trainable)
        metrics: StepMetrics = {"loss": jnp.zeros(())}
        for task, batch in batches.items():
            loss = functools.partial(self._loss, frozen=state.frozen, budget=self.budgets[task])
            count = max(batch.tokens.shape[0] // self.micro_rows, 1)
            value, slope, _, _ = accumulate(loss, state.trainable, batch, count)
            gradients = jax.tree.map(jnp.add, gradients, slope)
            metrics |= {"loss": metrics["loss"] + value, f"loss/{task}": value}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        return apply_gradients(self.optimizer, state, gradients), metrics

    def _loss(
        self, trainable: FlatParams, batch: LearnerBatch, *, frozen: FlatParams, budget: int
    ) -> tuple[Array, Sums]:
        params = {**trainable, **frozen}
        log_probs, _, routers = batch_log_probs(
            self.policy, params, batch, temperature=1.0, budget=budget
        )
        weights, losses = batch.trained, -log_probs
        if self.router_balance:
            losses += self.router_balance * routers.balance[:, None]
        return jnp.sum(losses * weights), (jnp.sum(weights), (), ())


@dataclasses.dataclass(frozen=True, eq=False)
class RlStep:
    """Policy-gradient step on one batch of rollouts; `objective` decides which."""

    policy: TrainablePolicy
    optimizer: optax.GradientTransformation
    objective: ObjectiveConfig
    temperature: float
    micro_batches: int
    budget: int
    """Most generated tokens of a stream."""
    router_balance: float = 0.0
    """Weight of the loss that keeps experts evenly used."""
    group_size: int | None = None
    """Neighbouring streams that answer one prompt, which stay in one micro-batch. None takes those
    that share frames."""
    subagent_temperature: float = 1.0
    subagent_budget: int = 0
    """Most generated tokens of a sub-agent."""
    penalty: float = 1.0
    """Repetition penalty of the sampler."""
    subagent_penalty: float = 1.0
    keeps_log_probs: bool = False
    """Whether the metrics hold `log_probs`, float32 `[b, own]`: those of every learned token before
    the update."""

    def __call__(
        self, state: TrainState, batch: LearnerBatch, table: Int[ArrayLike, "s vocab"] | None = None
    ) -> tuple[TrainState, StepMetrics]:
        """`table` is that of the engine's automata, if a grammar constrained it."""
        loss = functools.partial(self._loss, frozen=state.frozen, table=table)
        value, gradients, (watched, balance, rows, gap), kept = accumulate(
            loss, state.trainable, batch, self.micro_batches, _merge, self.group_size
        )
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients), "objective": watched}
        if self.policy.experts_per_token:
            metrics["router/balance"] = balance / jnp.maximum(rows, 1.0)
        if gap is not None:
            metrics |= gap.means()
        if self.keeps_log_probs:
            metrics["log_probs"] = join_micro(kept, stream_groups(batch, self.group_size))
        return apply_gradients(self.optimizer, state, gradients), metrics

    def log_probs(
        self,
        params: FlatParams,
        batch: LearnerBatch,
        table: Int[ArrayLike, "s vocab"] | None = None,
    ) -> Float[Array, "b own"]:
        """Log-probabilities under any weights, in the micro-batches of the step itself."""
        pieces = jax.lax.map(
            lambda piece: self._of_tokens(params, piece, table)[0],
            split_micro(batch, self.micro_batches, self.group_size),
        )
        return join_micro(pieces, stream_groups(batch, self.group_size))

    def of_subagents(self) -> RlStep:
        """The step of sub-agents alone, whose rows share nothing."""
        return dataclasses.replace(
            self,
            temperature=self.subagent_temperature,
            budget=self.subagent_budget,
            penalty=self.subagent_penalty,
            group_size=None,
            keeps_log_probs=False,
        )

    def _of_tokens(
        self, params: FlatParams, batch: LearnerBatch, table: ArrayLike | None
    ) -> tuple[Float[Array, "b own"], Float[Array, "b own"], RouterMetrics]:
        """`batch_log_probs` in the distribution that the sampler drew from."""
        return batch_log_probs(
            self.policy,
            params,
            batch,
            temperature=self.temperature,
            budget=self.budget,
            shaping=shaping_of(batch, self.penalty, table),
        )

    def _loss(
        self,
        trainable: FlatParams,
        batch: LearnerBatch,
        *,
        frozen: FlatParams,
        table: ArrayLike | None,
    ) -> tuple[Array, Sums]:
        """Sums over main agents and sub-agents; divided by one count, they weigh alike."""
        params = {**trainable, **frozen}
        total, (count, watched, kept) = self._row_loss(params, batch, table)
        if batch.subagents is None:
            return total, (count, watched, kept)
        more, (rest, seen, _) = self.of_subagents()._row_loss(params, batch.subagents, table)
        return total + more, (count + rest, _merge(watched, seen), kept)

    def _row_loss(
        self, params: FlatParams, batch: LearnerBatch, table: ArrayLike | None
    ) -> tuple[Array, Sums]:
        log_probs, entropy, (balance, gap) = self._of_tokens(params, batch, table)
        weights = batch.trained
        proximal = batch.proximal_log_probs
        # Every learned token carries the balance of its row.
        evenness = jnp.broadcast_to(self.router_balance * balance[:, None], weights.shape)
        total, count, watched = policy_loss(
            log_probs,
            # Learned from once, the policy at the beginning of the batch is the current one.
            jax.lax.stop_gradient(log_probs) if proximal is None else proximal,
            batch.behaviour_log_probs,
            batch.advantages,
            weights,
            self.objective,
            batch.reference_log_probs,
            batch.structural,
            entropy,
            self.group_size,
            evenness if self.router_balance else None,
        )
        trained = weights.any(axis=1).astype(jnp.float32)
        sums = watched, jnp.sum(balance * trained), jnp.sum(trained), gap
        return total, (count, sums, log_probs if self.keeps_log_probs else ())


MetricSums = tuple[ObjectiveMetrics, Array, Array, RoutingGap | None]
"""Metrics of the objective, the sum of balances over rows, the rows, and what differs from what was
replayed."""


def _merge(a: MetricSums, b: MetricSums) -> MetricSums:
    return a[0].merge(b[0]), a[1] + b[1], a[2] + b[2], jax.tree.map(jnp.add, a[3], b[3])
