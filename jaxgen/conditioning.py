"""What a plan's texts and pictures are to the network: encoded, side by side for guidance.

Without weights, what a prompt is here is what a caption is to training (`tasks/base.py`): the
encoder's own tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen import sharding
from jaxgen.denoiser import Model
from jaxgen.models.clip import TextEncoder
from jaxgen.models.vae import VAE
from jaxgen.plan import Plan
from jaxgen.types import Array, Control, Inputs, Params


class Guidance(NamedTuple):
    """How the branches of a batch are combined; the number of scales says how many there are."""

    scales: Array  # [G - 1]
    rescale: Array  # []
    low: Array  # [] fraction of the run where guidance starts to act
    high: Array  # [] and stops


class Pictures(NamedTuple):
    """What a plan's image and mask are to the network, encoded once; empty without them."""

    known: tuple[Array, ...] = ()  # [1, h, w, C] clean latents that the run starts from
    mask: tuple[Array, ...] = ()  # [1, h, w, 1], 1 where repainted
    channels: tuple[Array, ...] = ()  # [1, h, w, C'] what the UNet reads beside x


def encode_pictures(model: Model, params: Params, checked: Plan) -> Pictures:
    """The latents of a plan's image: as a start, as what stays, or as further input channels."""
    if not checked.image.size:
        return Pictures()
    encode = partial(encode_image, params["vae"], vae=model.vae)
    image = unit(checked.image)[None]
    if checked.edits:  # such models read the latents unscaled
        return Pictures(channels=(encode(image) / model.vae.config.scaling_factor,))
    known = () if checked.from_noise and checked.inpaints else (encode(image),)
    if not checked.mask.size:
        return Pictures(known)
    mask = jnp.asarray(checked.mask[None, :, :, None], jnp.float32)
    if not checked.inpaints:
        return Pictures(known, (mask,))
    hidden = encode(image * ~checked.pixel_mask[None, :, :, None])
    return Pictures(known, channels=(jnp.concatenate([mask, hidden], -1),))


def condition(
    model: Model,
    params: Params,
    checked: Plan,
    pictures: Pictures,
    indices: list[int],
    mesh: Mesh,
) -> tuple[Guidance, Inputs]:
    """The branches of guidance and their inputs, side by side for each image: [B * G, ...].

    Least conditioned first: (negative, prompt); for editing (nothing, image, image and prompt).
    """
    request = checked.request
    guided = request.guidance > 1 and not model.distilled
    rows = [0, 1] if guided else [1]  # of each text: 0 is the negative
    scales = [request.guidance] if guided else []
    if guided and checked.edits:
        rows, scales = [0, 0, 1], [checked.image_guidance, request.guidance]

    texts = [checked.texts[i // request.count] for i in indices]
    ids, weights = (np.concatenate([pair[j][rows] for pair in texts]) for j in (0, 1))
    ids, weights = sharding.split_batch((ids, weights), mesh)
    encode = partial(encode_text, params["text_encoder"], ids, weights, encoder=model.text_encoder)
    text = encode(skip=request.clip_skip)
    if request.clip_skip and guided:  # as in diffusers, of the prompt alone
        negative = np.tile(np.array(rows) == 0, len(indices))
        text = jnp.where(negative[:, None, None], encode(), text)
    inputs = Inputs(text, concat=_channels(checked, pictures, len(indices), len(rows)))
    inputs = inputs._replace(controls=_controls(model, checked, text, indices, mesh))
    if model.distilled:
        inputs = inputs._replace(guidance=(jnp.full(len(ids), request.guidance, jnp.float32),))
    low, high = request.guidance_interval
    numbers = (np.asarray(n, np.float32) for n in (scales, request.rescale, low, high))
    guidance = Guidance(*numbers)  # type: ignore[arg-type]
    return sharding.replicate(guidance, mesh), inputs


def _controls(
    model: Model, checked: Plan, text: Array, indices: list[int], mesh: Mesh
) -> tuple[Control, ...]:
    """Hints, and how their residuals weigh; in guess mode the last branch alone sees them."""
    nets = [net.config for net in model.controls]
    guess = checked.request.guess or bool(nets and nets[0].global_pool_conditions)  # as diffusers
    branches = len(text) // len(indices)
    texts = (text.reshape(len(indices), branches, *text.shape[1:]),) * (guess and branches > 1)
    out = []
    for hint, net in zip(checked.hints, nets):
        weights = np.ones(net.residuals)
        if guess and not net.global_pool_conditions:
            weights = np.logspace(-1, 0, net.residuals)
        weights = sharding.replicate((hint.scale * weights).astype(np.float32), mesh)
        span = () if hint.span == (0.0, 1.0) else tuple(map(np.float32, hint.span))
        span = sharding.replicate(span, mesh)
        if hint.picture.ndim == 3:  # encoded once for all
            pixels = sharding.replicate(hint.picture[None].astype(np.float32) / 255, mesh)
        else:
            rows_of = hint.picture[np.array(indices) // checked.request.count]
            pixels = sharding.split_batch(rows_of.astype(np.float32) / 255, mesh)
        out.append(Control(pixels, weights, span, texts))
    return tuple(out)


def _channels(checked: Plan, pictures: Pictures, images: int, branches: int) -> tuple[Array, ...]:
    """The further channels for every branch of every image, [B * G, h, w, C'] or nothing."""
    out = []
    for channels in pictures.channels:
        rows = jnp.repeat(channels, branches, 0)
        if checked.edits and branches > 1:
            rows = rows.at[0].set(0)  # the least conditioned branch sees no image
        out.append(jnp.tile(rows, (images, 1, 1, 1)))
    return tuple(out)


@partial(jax.jit, static_argnames=("encoder", "skip"))
def encode_text(
    params: Params, ids: Array, weights: Array, *, encoder: TextEncoder, skip: int = 0
) -> Array:
    """Token ids and weights [R, n, T] -> embeddings [R, n * T, C].

    Weights multiply the embeddings of their tokens; then each row's mean is restored. Rows whose
    weights are all 1 are the encoder's own, to the bit.
    """
    rows, chunks, length = ids.shape
    tokens, _ = encoder.apply(params, ids.reshape(-1, length), skip)
    tokens = tokens.reshape(rows, chunks * length, -1)
    weights = weights.reshape(rows, -1, 1)
    weighted = tokens * weights
    mean, changed, size = (
        jnp.mean(t, (1, 2), keepdims=True) for t in (tokens, weighted, jnp.abs(weighted))
    )
    # The norm of an encoder that has not learned leaves no mean but rounding, which scales nothing.
    told = jnp.minimum(jnp.abs(mean), jnp.abs(changed)) > 1e-4 * size
    scale = jnp.where(told, mean / jnp.where(told, changed, 1), 1)
    return jnp.where(jnp.any(weights != 1, (1, 2), keepdims=True), weighted * scale, tokens)


@partial(jax.jit, static_argnames="vae")
def encode_image(params: Params, image: Array, *, vae: VAE) -> Array:
    """[1, H, W, 3] in [-1, 1] -> latents [1, h, w, C], the posterior mean."""
    return vae.encode(params, image)


def unit(pixels: Any) -> Any:
    """uint8 [...] -> float32 in [-1, 1], of numpy or of JAX as they came."""
    return pixels.astype(np.float32) / 255 * 2 - 1
