"""A score whose slopes are computed along with it, so that nothing is computed again for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.types import Array


def with_slopes(score: Callable[[Array, Any], Array]) -> Callable[[Array, Any], Array]:
    """The same function of latents [B, ...] and a tree -> [B], differentiated otherwise.

    All that a search wants of decoder and encoder are the slopes at its latents, which are small:
    where a gradient is taken they are computed at once and kept, instead of all that leads to them
    (or of computing the score again, as under `jax.checkpoint`). A score alone costs what it did.

    Args:
        score: whose number for a row is of that row alone; gradients are in the latents, reverse
            mode, of any order.

    Raises:
        TypeError: the gradient in the tree is asked for.
    """

    def forward(x: Any, held: Any) -> tuple[Array, Array]:
        if any(leaf.perturbed for leaf in jax.tree.leaves(held, is_leaf=_is_argument)):
            raise TypeError("the gradient of a score is of its latents alone")
        values = jax.tree.map(lambda leaf: leaf.value, held, is_leaf=_is_argument)
        scores, pull = jax.vjp(lambda x: score(x, values), x.value)
        return scores, pull(jnp.ones_like(scores))[0]

    def backward(slopes: Array, gradient: Array) -> tuple[Array, None]:
        each = jnp.expand_dims(gradient, range(1, slopes.ndim))
        return (each * slopes).astype(slopes.dtype), None

    scored = jax.custom_vjp(score)
    scored.defvjp(forward, backward, symbolic_zeros=True)
    return scored


def _is_argument(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")
