"""A surrogate of one's own: CISPO (MiniMax-M1, arXiv 2506.13585, equation 4).

    python train/main.py --set objective.surrogate=examples/cispo.py:cispo --set rl.minibatches=4

    l_t = -sg(min(q_t, 5)) A_t log pi_t

PPO's clip stops the gradient of a token whose ratio has left its bounds, and with it that of the
rare tokens at which an answer turns. Here the ratio is a weight that is clipped and has no
gradient, so that every token goes on learning.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

HIGHEST = 5.0


def cispo(ratio, advantages):
    """The loss of each token. log(ratio) has the gradient of log pi: the rest is constant."""
    weight = stop_gradient(jnp.minimum(ratio, HIGHEST))
    return -weight * advantages * jnp.log(ratio)
