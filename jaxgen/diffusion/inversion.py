"""Inversion: the noise that DDIM leads to a given picture."""

import dataclasses

import jax
import numpy as np

from jaxgen.diffusion import samplers
from jaxgen.diffusion.grids import Grid, conversion, grid
from jaxgen.diffusion.schedule import Schedule
from jaxgen.types import Array, Denoiser, Point, UserError


def backwards(schedule: Schedule, steps: int) -> Grid:
    """DDIM's grid from the clean end to the noisy one: `samplers.ddim` at its rows inverts.

    A row undoes the forward step between the same two points. The network is told that step's own
    time and number, and given what the step came to: the eps of both is taken to be the same
    (Dhariwal & Nichol 2021, section F; Mokady et al. 2023, eq. 2), which many steps make nearly so.

    Args:
        schedule: of the model; whatever its sampler, the grid is DDIM's.
        steps: of the whole way.
    """
    schedule = dataclasses.replace(schedule, sampler="ddim")
    forward = grid(schedule, steps)
    points = jax.tree.map(lambda field: field[::-1], forward.points)
    signal, noise = (n.astype(np.float64) for n in (points.signal_next, points.noise_next))
    if schedule.prediction_type == "sample" and not noise.all():
        raise UserError(
            "a network that predicts the clean sample says nothing of the noise in a clean picture:"
            " inversion needs prediction_type epsilon or v_prediction, or set_alpha_to_one = False"
        )
    clean, eps = conversion(schedule.prediction_type, signal, noise, np.ones(steps))
    turned = points._replace(
        signal=points.signal_next,
        noise=points.noise_next,
        signal_next=points.signal,
        noise_next=points.noise,
        keep=points.noise,
        clean=clean.astype(np.float32),
        eps=eps.astype(np.float32),
    )
    return Grid(turned, forward.initial, steps)


def invert(denoise: Denoiser, latents: Array, points: Point) -> tuple[Array, Array]:
    """The noise, of about unit variance, that DDIM leads to clean latents [B, h, w, C].

    Without guidance the way back is nearly the way there; under guidance it is not, and ends off
    the Gaussian shell (Mokady et al. 2023, section 3.2).

    Args:
        denoise: (x, point) -> raw prediction.
        latents: [B, h, w, C].
        points: of the grid that `backwards` makes.

    Returns:
        The noise, and the latents after each step [S, B, h, w, C], the noise last: what null-text
        inversion compares its way with.
    """
    state, way = samplers.trail(samplers.ddim, denoise, samplers.State(latents, ()), points, None)
    return state.x, way
