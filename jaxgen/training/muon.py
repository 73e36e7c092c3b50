"""Muon's steps: the momentum of kernels, orthogonalised (Jordan et al. 2024).

Each kernel is a matrix [in, out] here, of all that is summed over and of what comes out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen.types import Array, Params

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b and c of every iteration, by Jordan et al.
# Iterations from one product X X' to the next. Carried over all five, its smallest eigenvalues
# would be rounding, which they enlarge.
SPANS, DIRECT = (2, 3), (1, 1, 1, 1, 1)
LONG = 1.5  # sides of a matrix for which SPANS are less work


class Momentum(NamedTuple):
    """What Muon keeps."""

    done: Array  # [] steps
    mean: Params  # of gradients, decaying


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether Muon moves this parameter."""
    return path.endswith("kernel") and leaf.ndim > 1


def steps(beta: float, size: float) -> optax.GradientTransformation:
    """Gradients of kernels -> steps whose root mean square is `size`, of those of full rank.

    The momentum is Nesterov's, its start corrected as Adam's is.
    """

    def init(params: Params) -> Momentum:
        return Momentum(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Params, state: Momentum, params: Any = None) -> tuple[Params, Momentum]:
        count = state.done + 1
        mean = optax.tree.update_moment(grads, state.mean, beta, 1)
        ahead = optax.tree.bias_correction(mean, beta, count + 1)
        now = optax.tree.bias_correction(grads, beta, count)
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        return jax.tree.map(lambda x: _step(x, size), ahead), Momentum(count, mean)

    return optax.GradientTransformation(init, update)


def _step(ahead: Array, size: float) -> Array:
    matrix = ahead.reshape(-1, ahead.shape[-1])
    # Orthonormal rows or columns have a root mean square of 1 / sqrt(longer side).
    return (size * max(matrix.shape) ** 0.5 * orthogonal(matrix)).reshape(ahead.shape)


def orthogonal(x: Array) -> Array:
    """[n, m] -> nearly the closest orthogonal matrix, by five iterations of Newton and Schulz.

    Singular values become 0.68 to 1.21 where they were above 0.002 of the norm, and 485 times what
    they were far below.

    An iteration is X <- (a + b G + c G^2) X with G = X X'. Polynomials of one G commute, so that
    between two products with the long side its iterations are products of the short side alone:
    half of the work on a 3x3 kernel ("Gram Newton-Schulz", Zhang et al. 2026). That takes the full
    precision which products have on a CPU; elsewhere X itself is carried on, by fast products.
    """
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (jnp.linalg.norm(x) + 1e-8)
    spans = jax.default_backend() == "cpu" and x.shape[1] > LONG * len(x)
    for count in SPANS if spans else DIRECT:
        x = _iterations(x, count)
    return x


def _iterations(x: Array, count: int) -> Array:
    a, b, c = COEFFICIENTS
    gram, one = x @ x.T, jnp.eye(len(x), dtype=x.dtype)
    factor = product = a * one + b * gram + c * gram @ gram
    for _ in range(count - 1):
        gram = factor @ gram @ factor
        factor = a * one + b * gram + c * gram @ gram
        product = factor @ product
    return product @ x
