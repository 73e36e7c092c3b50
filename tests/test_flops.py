"""The counter of operations against closed forms."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import flops


def test_a_product_inside_a_scan_counts_as_often_as_it_runs():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))

    def ten(x, w):
        return lax.scan(lambda h, _: (h @ w, None), x, None, length=10)[0]

    assert flops.count(ten, x, w) == 10 * 2 * 8 * 16 * 16


def test_a_convolution_counts_its_products_and_a_gradient_its_three():
    x, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    once = 2 * 2 * 6 * 6 * 9 * 3 * 5
    assert flops.count(convolve, x, kernel) == once
    x, w = jnp.ones((8, 16)), jnp.ones((16, 4))
    both = jax.grad(lambda x, w: jnp.sum(jnp.square(x @ w)), (0, 1))
    assert flops.count(both, x, w) == 3 * 2 * 8 * 16 * 4
