"""A score whose slopes are computed along with it, so that nothing is computed again for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxgen.types import Array


def along(score: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of latents [B, ...] that gives each row's number, [B]; with another gradient.

    All that a search wants of decoder and encoder are the slopes at its latents, which are small:
    where a gradient is taken they are computed at once and kept. `jax.checkpoint` takes no less
    memory and computes the score a second time. A score alone costs what it did.

    Raises:
        TypeError: the gradient in what `score` closes over is asked for, parameters for example.
    """

    def scored(x: Array) -> Array:
        # A gradient is taken when the trace that `score` closes over is over: what it reads there
        # is handed over. NumPy's arrays have the dtype that they had in the program.
        program = jax.make_jaxpr(score)(x)
        held = [jnp.asarray(each, each.dtype) for each in program.consts]

        def value(x: Array, held: list) -> Array:
            return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, held))(x)[0]

        def forward(x: Any, held: Any) -> tuple[Array, Array]:
            if any(each.perturbed for each in held):
                raise TypeError("the gradient of a score is of its latents alone")
            values = [each.value for each in held]
            scores, pull = jax.vjp(lambda x: value(x, values), x.value)
            return scores, pull(jnp.ones_like(scores))[0]

        def backward(slopes: Array, gradient: Any) -> tuple[Array, None]:
            each = jnp.expand_dims(gradient, range(1, slopes.ndim))
            return (each * slopes).astype(slopes.dtype), None

        along_with = jax.custom_vjp(value)
        along_with.defvjp(forward, backward, symbolic_zeros=True)
        return along_with(x, held)

    return scored
