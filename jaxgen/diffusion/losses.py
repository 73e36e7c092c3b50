"""The diffusion loss: noise a clean latent, ask the network, weigh the squared error.

A draw is separate from what is made of it, so that a test, or another library, can bring its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion.schedule import Schedule, alphas_cumprod
from jaxgen.types import Array, Point, UserError, at_least_float32


@dataclass(frozen=True)
class Objective:
    """What a network learns to predict, and how the steps are weighed.

    Attributes:
        snr_gamma: least signal-to-noise ratio from which steps are weighed down (Min-SNR, Hang et
            al. 2023, 5 in the paper); None weighs all alike.
        offset_noise: share of noise that is one number for a whole channel, 0.1 where it is used.
        input_perturbation: further noise in the input that the target does not tell of (Ning et al.
            2023, 0.1 in the paper).
    """

    schedule: Schedule
    snr_gamma: float | None = None
    offset_noise: float = 0.0
    input_perturbation: float = 0.0

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise UserError(f"snr_gamma = {self.snr_gamma} is not above 0")
        for name in ("offset_noise", "input_perturbation"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)} is below 0")
        if self.schedule.rescale_betas_zero_snr and self.schedule.prediction_type == "epsilon":
            raise UserError("with zero terminal SNR noise cannot be predicted; use v_prediction")


class Draw(NamedTuple):
    """What chance brings to a batch; to each example by a key of its own."""

    time: Array  # [B] integer, of the schedule
    noise: Array  # [B, h, w, C] standard normal
    offset: Array  # [B, 1, 1, C] standard normal
    perturbation: Array  # [B, h, w, C] standard normal


class Question(NamedTuple):
    """What the network is asked, and what it should answer."""

    x: Array  # [B, h, w, C] noisy latents
    time: Array  # [B]
    target: Array  # [B, h, w, C]
    weight: Array  # [B]


def draw(keys: Array, shape: tuple[int, ...], steps: int) -> Draw:
    """Keys [B] -> times in [0, steps) and noise for latents of a shape (h, w, C)."""

    def one(key: Array) -> Draw:
        time, noise, offset, perturbation = jax.random.split(key, 4)
        return Draw(
            jax.random.randint(time, (), 0, steps),
            jax.random.normal(noise, shape),
            jax.random.normal(offset, (1, 1, shape[-1])),
            jax.random.normal(perturbation, shape),
        )

    return jax.vmap(one)(keys)


def ask(objective: Objective, latents: Array, chance: Draw) -> Question:
    """Noises clean latents [B, h, w, C]."""
    signal, noise, weight = (
        jnp.asarray(table, latents.dtype)[chance.time] for table in tables(objective)
    )
    signal, sigma = (a[:, None, None, None] for a in (signal, noise))
    eps = heard = chance.noise
    if objective.offset_noise:
        eps = heard = eps + objective.offset_noise * chance.offset
    if objective.input_perturbation:
        heard = eps + objective.input_perturbation * chance.perturbation
    x = signal * latents + sigma * heard
    target = {
        "epsilon": eps,
        "v_prediction": signal * eps - sigma * latents,
        "sample": latents,
    }[objective.schedule.prediction_type]
    return Question(x, chance.time, target, weight)


def tables(objective: Objective) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signal, noise and weight of each training timestep, float64 [T]."""
    power = alphas_cumprod(objective.schedule)
    weight = np.ones_like(power)
    if objective.snr_gamma is not None:
        with np.errstate(divide="ignore"):
            ratio = power / (1 - power)
        # Hang et al. 2023, eq. 8 and appendix: the weight of a clean image's error, brought to the
        # error of what is predicted. v at zero SNR has weight 0: that step would never be learned.
        clipped = np.minimum(ratio, objective.snr_gamma)
        share = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": np.ones_like(ratio)}
        weight = clipped / share[objective.schedule.prediction_type]
    return np.sqrt(power), np.sqrt(1 - power), weight


def point(time: Array) -> Point:
    """Where a question stands, for a denoiser: of a training timestep [B] it needs no more."""
    one, none = jnp.ones(()), jnp.zeros(())
    return Point(time, one, *[none] * (len(Point._fields) - 2))


def loss(prediction: Array, question: Question) -> Array:
    """The mean over a batch of the weighted squared error, in float32 at least; a scalar."""
    error = at_least_float32(prediction) - at_least_float32(question.target)
    return (question.weight * jnp.square(error).mean((1, 2, 3))).mean()
