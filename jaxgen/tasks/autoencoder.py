"""Learning the autoencoder: pixels to latents and back."""

from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoiser import Model
from jaxgen.models.layers import Conv
from jaxgen.models.vae import VAE
from jaxgen.tasks import base
from jaxgen.tasks.base import Batch, Example, Metrics, Task
from jaxgen.types import Array, Params, UserError, at_least_float32


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


def reconstruction_loss(
    vae: VAE, kl: float, adversarial: float, params: Params, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Mean absolute error per number, the divergence, and what a critic sees."""
    images = base.unit(batch["image"])
    mean, std = vae.posterior(params["vae"], images)
    noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(base.example_keys(key, batch))
    scale = vae.config.scaling_factor
    copies = vae.decode(params["vae"], scale * (mean + std * noise))

    error = jnp.abs(copies - images).mean()
    divergence = 0.5 * (jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std)).mean()
    total = error + kl * divergence
    metrics = {"error": error, "divergence": divergence}
    if adversarial:
        judge = lambda x: Critic().apply({"params": params["critic"]}, x)  # noqa: E731
        # The critic learns to tell (hinge loss); what comes back to the copies has its sign turned,
        # so that one loss serves both players.
        real, fake = nn.relu(1 - judge(images)), nn.relu(1 + judge(reverse(copies, adversarial)))
        doubt = (real + fake).mean()
        total, metrics = total + doubt, metrics | {"doubt": doubt}
    return total, metrics


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def reverse(x: Array, weight: float) -> Array:
    """The identity, whose gradient is -weight times what comes back (Ganin & Lempitsky 2015)."""
    return x


reverse.defvjp(lambda x, weight: (x, None), lambda weight, _, g: (-weight * g,))


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


def scaled(model: Model, params: Params, batch: Example) -> Model:
    """The model with the scaling factor that gives latents of these pictures unit variance.

    What a UNet is trained on later (Rombach et al. 2022, appendix G).
    """
    mean, std = jax.jit(model.vae.posterior)(params["vae"], base.unit(batch["image"]))
    spread = jnp.sqrt(jnp.var(mean) + jnp.mean(jnp.square(std)))
    vae = VAE(replace(model.vae.config, scaling_factor=float(1 / spread)))
    return replace(model, vae=vae)
