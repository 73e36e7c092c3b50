"""CLIP's image encoder: what pictures mean, in the space shared with texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxgen import config
from jaxgen.models.clip import Layers, Table
from jaxgen.models.clip_config import FIXED, VisionConfig
from jaxgen.models.layers import Conv, Dense
from jaxgen.models.norms import LayerNorm
from jaxgen.types import Array, Params, UserError, at_least_float32, full_precision


class VisionEmbeddings(nn.Module):
    """Patches after a class token, and their positions."""

    config: VisionConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, 3] -> [B, 1 + patches, C]."""
        cfg = self.config
        nothing = ((0, 0), (0, 0))
        patches = Conv(
            cfg.hidden_size, cfg.patch_size, cfg.patch_size, nothing, False, name="patch_embedding"
        )(images)
        patches = patches.reshape(images.shape[0], -1, cfg.hidden_size)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,))
        first = jnp.broadcast_to(first, (images.shape[0], 1, cfg.hidden_size)).astype(patches.dtype)
        tokens = jnp.concatenate([first, patches], 1)
        table = Table(tokens.shape[1], cfg.hidden_size, name="position_embedding")
        return tokens + table(jnp.arange(tokens.shape[1]))


class VisionTransformer(nn.Module):
    """Embeddings, norm, layers; the class token's output, normed."""

    config: VisionConfig
    remat: bool = False

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """[B, H, W, 3] -> last hidden state [B, 1 + patches, C], pooled [B, C]."""
        x = VisionEmbeddings(self.config, name="embeddings")(images)
        x = LayerNorm(self.config.layer_norm_eps, name="pre_layrnorm")(x)  # upstream's spelling
        x = Layers(self.config, False, self.remat, name="encoder")(x)[-1]
        return x, LayerNorm(self.config.layer_norm_eps, name="post_layernorm")(x[:, 0])


class VisionModule(nn.Module):
    """The image encoder and its projection into the space shared with text."""

    config: VisionConfig
    remat: bool = False

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """[B, H, W, 3] -> last hidden state [B, 1 + patches, C], embedding [B, projection_dim]."""
        cfg = self.config
        x, pooled = VisionTransformer(cfg, self.remat, name="vision_model")(images)
        return x, Dense(cfg.projection_dim, use_bias=False, name="visual_projection")(pooled)


@dataclass(frozen=True)
class VisionEncoder:
    """A CLIP image encoder with projection, as functions over a plain parameter tree."""

    config: VisionConfig
    remat: bool = False

    @staticmethod
    def read(data: Mapping[str, Any], where: str) -> "VisionEncoder":
        """From the object in a `config.json`; UserError for what is unknown or not supported."""
        if data.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise UserError(f"{where}: model_type {data['model_type']!r} is no CLIP image encoder")
        return VisionEncoder(config.parse(VisionConfig, data, FIXED, where))

    def init(self, key: Array) -> Params:
        """Fresh parameters, float32."""
        side = self.config.image_size
        images = jnp.zeros((1, side, side, self.config.num_channels))
        return VisionModule(self.config).init(key, images)["params"]

    @full_precision
    def apply(self, params: Params, images: Array) -> tuple[Array, Array]:
        """Images [B, H, W, 3], resized and normed for CLIP -> hidden state, embedding [B, P]."""
        dtype = params["visual_projection"]["kernel"].dtype
        module = VisionModule(self.config, self.remat)
        x, embedding = module.apply({"params": params}, images.astype(dtype))
        return at_least_float32(x), at_least_float32(embedding)
