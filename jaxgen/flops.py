"""Floating-point operations of a function, counted from its jaxpr with trip counts.

XLA's own count sees each loop body once; here a scan counts as often as it runs. Products alone are
counted (2 per multiply-add). While loops, whose trips are not known, count once; a `fori_loop` over
bounds that are Python numbers is a scan.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax

# Dense half-precision peak of one JAX device, FLOP/s, by the start of its `device_kind`; bfloat16,
# but float16 on a V100, which has no other. Of TPU v2 and v3 a device is one of a chip's two cores.
# Sources: cloud.google.com/tpu/docs/v2 ... v6e, "Peak compute per chip"; NVIDIA's data sheets of
# V100, A100, H100, H200 and HGX B200, whose figures "with sparsity" are halved.
_PEAKS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p names itself "TPU v5" or "TPU v5p"
    "TPU v6": 918e12,  # "TPU v6 lite" is v6e
    "Tesla V100-PCIE": 112e12,
    "Tesla V100": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(device: Any) -> float | None:
    """Peak FLOP/s of a device in half precision, dense; None where it is not known, as of CPUs."""
    starts = (start for start in _PEAKS if device.device_kind.startswith(start))
    return _PEAKS.get(max(starts, key=len, default=""))


def count(f: Callable, *args: Any) -> int:
    """Operations of matrix products and convolutions in `f(*args)`; arguments may be shapes.

    Over all devices. What a gradient computes again (`jax.checkpoint`) counts again.
    """
    return _of(jax.make_jaxpr(f)(*args).jaxpr)


def _of(jaxpr: Any) -> int:
    return sum(_operations(equation) for equation in jaxpr.eqns)


def _operations(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name.startswith("dot_product_attention"):
        return _fused_attention(equation)
    inner = [_of(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    trips = 1
    if name == "scan":
        trips = params["length"]
    elif name == "shard_map":  # the body is what one device does
        trips = prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return trips * sum(inner)


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * prod(equation.outvars[0].aval.shape) * prod(left[i] for i in contracted)


def _convolution(equation: Any) -> int:
    """Every tap meets every pixel it can: of the result, or of the image if that has fewer.

    The second holds for the gradient of a strided convolution, whose image is spread by zeros, so
    that forward and both gradients cost the same.
    """
    numbers = equation.params["dimension_numbers"]
    image, kernel = (v.aval.shape for v in equation.invars)
    result = equation.outvars[0].aval.shape
    features = kernel[numbers.rhs_spec[1]] * prod(result[i] for i in numbers.out_spec[:2])
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:])
    return 2 * features * prod(kernel[k] * min(image[i], result[o]) for i, k, o in axes)


def _fused_attention(equation: Any) -> int:
    """cuDNN's kernel: two products forward; backward four, and the scores once more."""
    q, k, v = (x.aval.shape for x in equation.invars[:3])
    batch, queries, heads, width = q
    scores = 2 * batch * heads * queries * k[1]
    if "_bwd" in equation.primitive.name:
        return scores * (3 * width + 2 * v[3])
    return scores * (width + v[3])


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs that an equation runs; of a custom derivative the function alone."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found
