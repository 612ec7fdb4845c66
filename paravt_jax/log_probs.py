"""Log-probabilities of chosen tokens, without ever holding `[b, t, vocab]`.

Only positions that count are sent through the vocabulary head: they are gathered
first (a fixed number per row), then taken in chunks whose logits are recomputed in
the backward pass. Peak memory of the head is `b * chunk * vocab`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.shaping import Shaper, Shaping, within

Head = Callable[[Float[Array, "b c d"]], Float[Array, "b c vocab"]]
UNSHAPED = Shaping()


def gathered_log_probs(
    hidden: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    chosen: Bool[Array, "b t"],
    head: Head,
    *,
    temperature: Float[Array, ""] | float,
    budget: int,
    chunk: int = 128,
    shaping: Shaping = UNSHAPED,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Log-probability of each chosen token given those before it, and the entropy there.

    `log p(y_t) = z_t[y_t] / T - logsumexp(z_t / T)` where `z_t` are the logits at t - 1, penalised
    and restricted as they were when the token was drawn (`paravt_jax.shaping`).

    Args:
      hidden: final hidden states of the whole stream.
      chosen: which tokens count; position 0 has no predecessor and never does.
      head: maps hidden states to float32 logits.
      temperature: the sampler's temperature, so that learner and sampler agree.
      budget: most chosen tokens in a row (static). Chosen tokens beyond it are dropped,
        so the caller must pass a bound.
      chunk: positions whose logits exist at one time.
      shaping: what shaped the draws besides temperature.

    Returns:
      log-probabilities and entropies (no gradient), both 0 where not chosen.
    """
    budget, chunk = _whole_chunks(budget, chunk)
    index, inputs = _before_chosen(hidden, chosen, budget)
    targets = jnp.take_along_axis(tokens, index, axis=1)
    shaper = Shaper(shaping, tokens, _vocab(head, inputs), temperature)

    @jax.checkpoint
    def one_chunk(_, piece):
        own, target, places = piece
        scores = shaper.tempered(head(own), places)
        return None, _token_statistics(scores, target, shaper.support(scores, target, places))

    pieces = _chunks((inputs, targets, shaping.places(index)), chunk)
    _, (log_probs, entropies) = jax.lax.scan(one_chunk, None, pieces)
    shape = tokens.shape
    entropies = jax.lax.stop_gradient(_scatter(index, entropies, shape))
    return _scatter(index, log_probs, shape), entropies


@dataclasses.dataclass(frozen=True)
class View:
    """What one policy makes of streams: those of the other policy, after prompts of its own."""

    hidden: Float[Array, "b t d"]
    """Final hidden states of the whole streams."""
    chosen: Bool[Array, "b t"]
    """Where the tokens stand that both compare: as many in each row, in the same order."""
    head: Head


def teacher_gap(
    teacher: View,
    student: View,
    tokens: Int[Array, "b t"],
    *,
    support: int,
    full_weight: float = 0.0,
    temperature: Float[Array, ""] | float,
    budget: int,
    chunk: int = 128,
    shaping: Shaping = UNSHAPED,
) -> Float[Array, "b t"]:
    """By how much a teacher finds each chosen token of the student likelier than the student does.

        delta_t = log p_T(y_t | S) - log p_S(y_t | S)

    where S holds the teacher's `support` likeliest tokens and y_t itself, and both policies are
    renormalised on it (VISD, arXiv 2605.06094): the tail of the vocabulary, where two policies
    differ by noise, has no say. Both are shaped as the student's draws were. No gradient.

    Args:
      tokens: the student's streams.
      support: likeliest tokens of the teacher.
      full_weight: share of the gap on the whole vocabulary in the result; 1 leaves nothing of S.
      temperature, budget, chunk, shaping: see `gathered_log_probs`.

    Returns:
      the gap at the student's chosen tokens, 0 elsewhere.
    """
    budget, chunk = _whole_chunks(budget, chunk)
    index, ours = _before_chosen(student.hidden, student.chosen, budget)
    _, theirs = _before_chosen(teacher.hidden, teacher.chosen, budget)
    targets = jnp.take_along_axis(tokens, index, axis=1)
    shaper = Shaper(shaping, tokens, _vocab(student.head, ours), temperature)

    def one_chunk(_, piece):
        own, other, target, places = piece
        # What the student had said and could say there holds for its teacher too.
        view = shaper.tempered(student.head(own), places)
        advised = shaper.tempered(teacher.head(other), places)
        inside = shaper.support(view, target, places)
        return None, _gap(
            within(inside, advised), within(inside, view), target, support, full_weight
        )

    pieces = _chunks((ours, theirs, targets, shaping.places(index)), chunk)
    _, gaps = jax.lax.scan(one_chunk, None, pieces)
    return jax.lax.stop_gradient(_scatter(index, gaps, tokens.shape))


def _gap(
    teacher: Float[Array, "b c vocab"],
    student: Float[Array, "b c vocab"],
    targets: Int[Array, "b c"],
    support: int,
    full_weight: float,
) -> Float[Array, "b c"]:
    _, likeliest = jax.lax.top_k(teacher, min(support, teacher.shape[-1]))
    among = jnp.any(likeliest == targets[..., None], axis=-1)

    def gain(logits: Float[Array, "b c vocab"]) -> Float[Array, "b c"]:
        """Log-probability of the token on S, mixed with that on the vocabulary."""
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        # The token counts once: alone only where it is not among the likeliest.
        once = jnp.where(among[..., None], -jnp.inf, own)
        on_support = jnp.concatenate([jnp.take_along_axis(logits, likeliest, axis=-1), once], -1)
        small, full = (jax.nn.logsumexp(z, axis=-1) for z in (on_support, logits))
        return own[..., 0] - (1 - full_weight) * small - full_weight * full

    return gain(teacher) - gain(student)


def _whole_chunks(budget: int, chunk: int) -> tuple[int, int]:
    """Budget and chunk such that the budget is a number of chunks."""
    budget = -(-budget // chunk) * chunk if budget > chunk else budget
    return budget, min(chunk, budget)


def _before_chosen(
    hidden: Float[Array, "b t d"], chosen: Bool[Array, "b t"], budget: int
) -> tuple[Int[Array, "b c"], Float[Array, "b c d"]]:
    """Where the chosen tokens stand (0: nowhere), and the hidden states that predict them."""
    # Index 0 fills up rows with fewer chosen tokens, so it must stand for none.
    chosen = chosen.at[:, 0].set(False)
    index = jax.vmap(lambda row: jnp.nonzero(row, size=budget, fill_value=0)[0])(chosen)
    return index, jnp.take_along_axis(hidden, jnp.maximum(index - 1, 0)[..., None], axis=1)


def _scatter(
    index: Int[Array, "b c"], chunks: Float[Array, "n b s"], shape: tuple[int, ...]
) -> Float[Array, "b t"]:
    """Values of chosen tokens, in chunks, back to where the tokens stand."""
    back = jax.vmap(lambda place, value, size: size.at[place].add(value))
    return back(index, jnp.where(index > 0, _unchunk(chunks), 0.0), jnp.zeros(shape, jnp.float32))


def _token_statistics(
    logits: Float[Array, "b c vocab"],
    targets: Int[Array, "b c"],
    support: Bool[Array, "b c vocab"] | None,
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Log-probabilities of the targets, which are in the support, and entropies."""
    logits = within(support, logits)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    probabilities = jnp.exp(logits - normaliser[..., None])
    # What is impossible has no part in the entropy: 0 times minus infinity is no number.
    possible = logits if support is None else jnp.where(support, logits, 0.0)
    entropy = normaliser - jnp.sum(probabilities * possible, axis=-1)
    return picked - normaliser, jax.lax.stop_gradient(entropy)


def _vocab(head: Head, inputs: Float[Array, "b c d"]) -> int:
    return jax.eval_shape(head, inputs[:, :1]).shape[-1]


def _chunks(tree: Any, size: int) -> Any:
    """Every `[b, c, ...]` as `[c / size, b, size, ...]`."""

    def cut(x: Array) -> Array:
        rows, length = x.shape[:2]
        return jnp.swapaxes(x.reshape(rows, length // size, size, *x.shape[2:]), 0, 1)

    return jax.tree.map(cut, tree)


def _unchunk(x: Array) -> Array:
    pieces, rows, size = x.shape
    return jnp.swapaxes(x, 0, 1).reshape(rows, pieces * size)
