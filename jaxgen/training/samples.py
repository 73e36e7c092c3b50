"""Pictures that a run draws of itself on the way. That they fail is no reason to stop."""

import logging

import jax
import numpy as np

from jaxgen import generate, sharding
from jaxgen.data.images import grid
from jaxgen.denoiser import Model
from jaxgen.load import DTYPES
from jaxgen.training import metrics, setup
from jaxgen.training.checkpoint import memory_is_full
from jaxgen.training.recipe import Train
from jaxgen.types import Params, UserError

logger = logging.getLogger(__name__)


def show(log: metrics.Log, step: int, model: Model, params: Params, recipe: Train) -> None:
    """Logs a grid of the recipe's prompts, or why there is none."""
    try:
        log.images(step, "samples", grid(pictures(model, params, recipe)))
    except UserError as error:
        logger.warning("no samples of step %d: %s", step, error)
    except jax.errors.JaxRuntimeError as error:
        if not memory_is_full(error):
            raise
        logger.warning("no samples of step %d: too little memory beside what trains", step)


def pictures(model: Model, params: Params, recipe: Train) -> np.ndarray:
    """uint8 [N, H, W, 3], a picture for each prompt, on this process' first device."""
    dtype = DTYPES[recipe.dtype]  # of what learned, too: a network has one
    params = jax.tree.map(lambda x: x.astype(dtype, copy=False), params)
    return generate.sample(
        model,
        jax.device_put(params, jax.local_devices()[0]),
        list(recipe.samples.prompts),
        mesh=sharding.local_mesh(),
        **setup.sampling(recipe),
    )
