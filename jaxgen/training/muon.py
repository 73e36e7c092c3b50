"""Muon's steps: the momentum of kernels, orthogonalised (Jordan et al. 2024).

Each kernel is a matrix [in, out] here, of all that is summed over and of what comes out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxgen import trees
from jaxgen.types import Array, Params

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b and c of every iteration, by Jordan et al.
ITERATIONS = 5


def kernels(params: Params, wanted: bool = True) -> Params:
    """Whether each leaf is a kernel, or whether it is not."""
    is_kernel = lambda path, leaf: path.endswith("kernel") and leaf.ndim > 1  # noqa: E731
    return trees.map_with_path(lambda path, leaf: is_kernel(path, leaf) == wanted, params)


def by_momentum(beta: float, size: float) -> optax.GradientTransformation:
    """Gradients of kernels -> steps whose root mean square is about `size`.

    The momentum is optax's, which asks for no iteration here: they are `orthogonal`'s.
    """
    momentum = contrib.scale_by_muon(
        ns_steps=0, beta=beta, weight_dimension_numbers=lambda tree: jax.tree.map(_as_matrix, tree)
    )

    def one(ahead: Array) -> Array:
        matrix = ahead.reshape(-1, ahead.shape[-1])
        # The root mean square of an orthogonal matrix is that of its longer side, inverted.
        step = size * max(matrix.shape) ** 0.5 * orthogonal(matrix)
        return step.reshape(ahead.shape)

    steps = optax.stateless(lambda tree, _: jax.tree.map(one, tree))
    return optax.chain(momentum, steps)


def orthogonal(x: Array) -> Array:
    """[n, m] of norm 1 -> nearly its closest orthogonal matrix: singular values of 0.7 to 1.2.

    An iteration is X <- (a + b G + c G^2) X with G = X X'. As polynomials of one G commute, G and
    the product of all factors are carried on, both n x n where n is the short side; the long side
    meets two products in the end, ten if X were. That is a third of the work on the kernels of a
    UNet, and of the operations to compile. The products ask for full precision: G has the squares
    of singular values, which TF32 or bfloat16 would not tell from zero.
    """
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T
    a, b, c = COEFFICIENTS
    with jax.default_matmul_precision("highest"):
        gram, one = x @ x.T, jnp.eye(len(x), dtype=x.dtype)
        product = one
        for _ in range(ITERATIONS):
            factor = a * one + b * gram + c * gram @ gram
            gram, product = factor @ gram @ factor, factor @ product
        return product @ x


def _as_matrix(leaf: Any) -> contrib.MuonDimensionNumbers:
    return contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
