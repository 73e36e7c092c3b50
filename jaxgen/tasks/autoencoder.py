"""Learning the autoencoder: pixels to latents and back."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.conditioning import unit
from jaxgen.denoiser import Model
from jaxgen.models.layers import Conv
from jaxgen.models.vae import VAE
from jaxgen.tasks import base
from jaxgen.tasks.base import Batch, Example, Metrics, Task
from jaxgen.types import Array, Params, UserError, at_least_float32, full_precision

PICTURES = 64  # at least, whose latents are scaled to unit variance: few differ from the rest


@dataclass(frozen=True)
class Autoencoder:
    """Learn to compress pictures (Esser et al. 2021; Rombach et al. 2022, section 3.1)."""

    model: str = "fresh:sd15"
    """What to start from: a folder, a hub id, a single file, or fresh:NAME."""
    fresh: tuple[str, ...] = ()
    """Parts that start from random parameters instead: vae."""
    learn: tuple[str, ...] = ("vae/",)
    """Patterns of the parameter paths that learn; vae/decoder alone keeps the latents."""
    kl: float = 1e-6
    """Weight of the posterior's divergence from a standard normal, per latent number."""
    adversarial: float = 0.0
    """Weight of a critic that tells patches of pictures from their reconstructions; 0 is none."""

    def build(self, model: Model) -> Task:
        """The task on any model; its latents' scale is set in the end, from the data."""
        if self.kl < 0 or self.adversarial < 0:
            raise UserError(f"kl {self.kl} and adversarial {self.adversarial} must be from 0")
        critic = self.adversarial > 0

        def init(key: Array, given: Params) -> Params:
            if not critic:
                return dict(given)
            return {**given, "critic": Critic().init(key, jnp.zeros((1, 32, 32, 3)))["params"]}

        patterns = (*self.learn, "critic/") if critic else self.learn
        loss = partial(reconstruction_loss, model.vae, self.kl, self.adversarial)
        task = Task(model, init, base.by_patterns(patterns), loss, picture_alone)
        return task._replace(finished=scaled)


@full_precision
def reconstruction_loss(
    vae: VAE, kl: float, adversarial: float, params: Params, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Mean absolute error per number, the divergence, and what a critic sees."""
    images = unit(batch["image"])
    mean, std = vae.posterior(params["vae"], images)
    noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(base.example_keys(key, batch))
    scale = vae.config.scaling_factor
    copies = vae.decode(params["vae"], scale * (mean + std * noise))

    error = jnp.abs(copies - images).mean()
    divergence = 0.5 * (jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std)).mean()
    total = error + kl * divergence
    metrics = {"error": error, "divergence": divergence}
    if adversarial:
        # One loss serves both players, each of whom takes the other as given. The critic's is the
        # hinge; the copies' is the score itself, which pulls where the hinge is flat: where the
        # critic is sure (Rombach et al. 2022, their code).
        critic, still = params["critic"], jax.lax.stop_gradient
        real, fake = nn.relu(1 - score(critic, images)), nn.relu(1 + score(critic, still(copies)))
        doubt = (real + fake).mean()
        total = total + doubt - adversarial * score(still(critic), copies).mean()
        metrics = metrics | {"doubt": doubt}
    return total, metrics


def score(critic: Params, images: Array) -> Array:
    """How real a critic finds the patches of pictures [B, H, W, 3], in its parameters' dtype."""
    return Critic().apply({"params": critic}, images.astype(critic["conv_out"]["kernel"].dtype))


class Critic(nn.Module):
    """Convolutions that score overlapping patches (Isola et al. 2017)."""

    features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, 3] -> scores [B, ~H/8, ~W/8, 1]."""
        for i in range(3):
            x = Conv(self.features * 2**i, kernel=4, stride=2, name=f"conv_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return at_least_float32(Conv(1, name="conv_out")(x))


def picture_alone(example: Example, rng: np.random.Generator) -> Example:
    """The picture is all that is read."""
    return {"image": example["image"]}


def scaled(
    model: Model, params: Params, batches: Iterator[Example], learned: Collection[str]
) -> Model:
    """The model with the scaling factor that gives latents of some pictures unit variance.

    What a UNet is trained on later (Rombach et al. 2022, appendix G). Where the latents are what
    they were, because only the decoder learned, so is their scale, which a UNet may know.
    """
    if not any(path.startswith(base.ENCODERS["vae"]) for path in learned):
        return model
    posterior, seen, moments = jax.jit(model.vae.posterior), 0, []
    while seen < PICTURES:
        images = next(batches)["image"]
        mean, std = posterior(params["vae"], unit(images))
        moments.append((float(mean.mean()), float((jnp.square(mean) + jnp.square(std)).mean())))
        seen += len(images)
    first, second = np.mean(moments, 0)
    config = replace(model.vae.config, scaling_factor=float(1 / np.sqrt(second - first**2)))
    return replace(model, vae=replace(model.vae, config=config))
