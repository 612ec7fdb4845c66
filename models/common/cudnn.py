"""Attention on GPUs by cuDNN: FlashAttention for whole rows, and for rows that share a prompt.

A row with lanes is two calls: its prompt among itself, and its lanes to the prompt and to
themselves, merged by their log-sum-exps. The gradient of a part needs nothing of the other but the
merged output and log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 2.3.2), and that is what
cuDNN's backward pass takes.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.common.kernels import WHOLE_ROWS, AttentionSplit, on_mesh
from paravt_jax.mesh import platform

SHORT = 256
"""Rows of fewer tokens are left to XLA."""

Inputs = tuple[Float[Array, "b t n h"], Float[Array, "b s k h"], Float[Array, "b s k h"]]


@functools.cache
def library() -> Any:
    """What JAX calls cuDNN by, a private module, which is not looked for until it is wanted.

    Raises:
      ValueError: this jax keeps it elsewhere.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as stablehlo

        stablehlo._dot_product_attention_bwd_p_wrapper  # noqa: B018  its gradient from outside sums
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model.attention=cudnn: jax {jax.__version__} does not hold what 0.10 calls cuDNN by "
            f"({error}); set it to auto"
        ) from error
    return stablehlo


@runtime_checkable
class Flash(Protocol):
    """Attention that tells its log-sum-exps, and its gradient from merged ones: to the first
    `lengths` keys, or causal where these are None."""

    def forward(
        self, inputs: Inputs, lengths: Int[Array, " b"] | None
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b n t"]]: ...

    def backward(
        self,
        inputs: Inputs,
        lengths: Int[Array, " b"] | None,
        mixed: Float[Array, "b t n h"],
        log_sums: Float[Array, "b n t"],
        grad: Float[Array, "b t n h"],
    ) -> Inputs: ...


class Cudnn(Flash):
    """cuDNN's, by what `jax.nn.dot_product_attention` calls: that itself rounds log-sum-exps to
    the type of its output, and has no gradient from others."""

    def forward(self, inputs: Inputs, lengths: Array | None) -> tuple[Array, Array]:
        counts, scale, kind = _terms(inputs, lengths)
        result: Any = library().dot_product_attention(
            *inputs,
            q_seqlen=counts[0],
            kv_seqlen=counts[1],
            scale=scale,
            mask_type=kind,
            return_residual=True,
        )
        return result[0], result[1]

    def backward(
        self, inputs: Inputs, lengths: Array | None, mixed: Array, log_sums: Array, grad: Array
    ) -> Inputs:
        counts, scale, kind = _terms(inputs, lengths)
        none = jnp.zeros(0, inputs[0].dtype)
        counts = [none if count is None else count for count in counts]
        kernels = library()
        query, key, value = kernels._dot_product_attention_bwd_p_wrapper.bind(
            *inputs, none, *counts, none, none, none, none, log_sums, mixed, grad,
            scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=kind,
            layout=kernels.AttentionLayout.BTNH.value, sliding_window_length=None,
        )  # fmt: skip
        return query, key, value


def _terms(inputs: Inputs, lengths: Array | None) -> tuple[list[Array | None], float, Any]:
    """Numbers of queries and keys of each row, scale and mask, as cuDNN takes them."""
    scale, kinds = inputs[0].shape[3] ** -0.5, library().MaskType
    if lengths is None:
        return [None, None], scale, kinds.CAUSAL
    return [jnp.full_like(lengths, inputs[0].shape[1]), lengths], scale, kinds.PADDING


CUDNN = Cudnn()


def serves(query: Float[Array, "b t n h"], key: Float[Array, "b s k h"]) -> bool:
    """Whether `attend` takes these: on a GPU, tokens of a row among themselves, 16 bits."""
    narrow = query.dtype == key.dtype and query.dtype in (jnp.bfloat16, jnp.float16)
    same = query.shape[1] == key.shape[1] and query.shape[1] >= SHORT
    return platform() == "gpu" and narrow and same and query.shape[3] in range(8, 129, 8)


def attend(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    *,
    lengths: Int[Array, " b"] | None = None,
    lanes: int = 0,
    prompt: int = 0,
    flash: Flash = CUDNN,
    split: AttentionSplit = WHOLE_ROWS,
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped heads, scaled by `h**-0.5`, of tokens among themselves.

    Queries see the first `lengths` keys of their row, or without these the keys up to themselves.
    With `lanes`, equal parts of what follows the first `prompt` slots, `lengths` are those of the
    prompts: a query sees the keys before it in the prompt and in its own lane. Splits rows and
    heads over the active mesh.
    """
    # A row without a key would be divided by nothing.
    lengths = None if lengths is None else jnp.maximum(lengths, 1)

    def rows(query: Array, key: Array, value: Array, lengths: Array | None) -> Array:
        if not lanes:
            return jnp.asarray(_whole(flash, (query, key, value), lengths))
        before = query[:, :prompt], key[:, :prompt], value[:, :prompt]
        after = query[:, prompt:], key[:, prompt:], value[:, prompt:]
        parts = _whole(flash, before, None), _continued(flash, lanes, after, before[1:], lengths)
        return jnp.concatenate([jnp.asarray(part) for part in parts], axis=1)

    return on_mesh(rows, query, key, value, lengths, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(flash: Flash, inputs: Inputs, lengths: Int[Array, " b"] | None) -> Array:
    return flash.forward(inputs, lengths)[0]


def _whole_forward(flash: Flash, inputs: Inputs, lengths: Array | None) -> tuple[Array, Any]:
    mixed, log_sums = flash.forward(inputs, lengths)
    return mixed, (inputs, lengths, mixed, log_sums)


def _whole_backward(flash: Flash, saved: Any, grad: Array) -> tuple[Inputs, None]:
    inputs, lengths, mixed, log_sums = saved
    return flash.backward(inputs, lengths, mixed, log_sums, grad), None


_whole.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _continued(
    flash: Flash,
    lanes: int,
    inputs: Inputs,
    prompt: tuple[Float[Array, "b p k h"], Float[Array, "b p k h"]],
    lengths: Int[Array, " b"],
) -> Float[Array, "b own n h"]:
    """Lanes to their prompt, of `lengths` tokens, and each to itself."""
    return _continued_forward(flash, lanes, inputs, prompt, lengths)[0]


def _continued_forward(
    flash: Flash, lanes: int, inputs: Inputs, prompt: tuple[Array, Array], lengths: Array
) -> tuple[Array, Any]:
    parts = [
        flash.forward((inputs[0], *prompt), lengths),
        flash.forward(_inputs_apart(lanes, inputs), None),
    ]
    mixed = [part[0].reshape(inputs[0].shape).astype(jnp.float32) for part in parts]
    log_sums = [parts[0][1], _sums_together(lanes, parts[1][1])]
    total = jnp.logaddexp(*log_sums)
    weights = [jnp.exp(part - total).swapaxes(1, 2)[..., None] for part in log_sums]
    merged = (mixed[0] * weights[0] + mixed[1] * weights[1]).astype(inputs[0].dtype)
    return merged, (inputs, prompt, lengths, merged, total)


def _continued_backward(
    flash: Flash, lanes: int, saved: Any, grad: Array
) -> tuple[Inputs, tuple[Array, Array], None]:
    inputs, prompt, lengths, merged, total = saved
    first, *to_prompt = flash.backward((inputs[0], *prompt), lengths, merged, total, grad)
    merged, grad, sums = _apart(lanes, merged), _apart(lanes, grad), _sums_apart(lanes, total)
    to_lane = flash.backward(_inputs_apart(lanes, inputs), None, merged, sums, grad)
    second, key, value = (part.reshape(x.shape) for part, x in zip(to_lane, inputs, strict=True))
    return (first + second, key, value), (to_prompt[0], to_prompt[1]), None


_continued.defvjp(_continued_forward, _continued_backward)


def _apart(lanes: int, tokens: Float[Array, "b own n h"]) -> Float[Array, "lanes t n h"]:
    """A row for each lane."""
    return tokens.reshape(-1, tokens.shape[1] // lanes, *tokens.shape[2:])


def _inputs_apart(lanes: int, inputs: Inputs) -> tuple[Array, Array, Array]:
    return _apart(lanes, inputs[0]), _apart(lanes, inputs[1]), _apart(lanes, inputs[2])


def _sums_apart(lanes: int, sums: Float[Array, "b n own"]) -> Float[Array, "lanes n t"]:
    b, n, tokens = sums.shape
    return sums.reshape(b, n, lanes, -1).swapaxes(1, 2).reshape(b * lanes, n, tokens // lanes)


def _sums_together(lanes: int, sums: Float[Array, "lanes n t"]) -> Float[Array, "b n own"]:
    rows, n, t = sums.shape
    return sums.reshape(-1, lanes, n, t).swapaxes(1, 2).reshape(rows // lanes, n, lanes * t)
