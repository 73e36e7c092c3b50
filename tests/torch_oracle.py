"""Oracles in PyTorch: random weights everywhere, and conversion between the two worlds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgen import trees
from jaxgen.types import Params
from jaxgen.weights import rename

# For what runs once and is tiny: the same program, of which the compiler makes less.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Idle threads of torch spin, and take the cores from XLA's: one will do for tiny models.
torch.set_num_threads(1)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, scaled so that activations stay near 1: no rename can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1 and "embedding." not in name:
                p.copy_(noise * p[0].numel() ** -0.5)
            elif name.endswith("weight") and p.ndim == 1:
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise if p.ndim < 2 else noise)
    return module.eval()


def params_of(module: torch.nn.Module, prefix: str = "") -> Params:
    """A torch module's parameters as our tree, by the rename rule alone."""
    flat = {}
    for key, value in module.state_dict().items():
        if key.endswith("position_ids"):
            continue
        path = rename.to_path(prefix + key, value.ndim)
        array = value.detach().numpy()
        if path.endswith("/kernel"):
            array = array.transpose(rename.TO_FLAX[array.ndim])
        flat[path] = jnp.asarray(array)
    return trees.unflatten(flat)


def nhwc(x: torch.Tensor) -> np.ndarray:
    """[B, C, H, W] torch -> [B, H, W, C] numpy."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(actual, expected) -> float:
    """max |difference| / max |expected|, the measure of every tolerance."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
