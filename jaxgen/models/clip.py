"""CLIP: the transformer of both its encoders, and the text encoders of Stable Diffusion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxgen import config
from jaxgen.models.attention import attend
from jaxgen.models.clip_config import ACTIVATIONS, FIXED, TextConfig, TransformerConfig
from jaxgen.models.layers import Dense
from jaxgen.models.norms import LayerNorm
from jaxgen.types import Array, Params, UserError, at_least_float32, full_precision


class Attention(nn.Module):
    """Self-attention with biases throughout."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [B, T, C]."""
        q, k, v = (Dense(x.shape[-1], name=f"{n}_proj")(x) for n in "qkv")
        return Dense(x.shape[-1], name="out_proj")(attend(q, k, v, self.heads, self.causal))


class MLP(nn.Module):
    """Two layers with the checkpoint's own activation."""

    features: int
    activation: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [B, T, C]."""
        h = ACTIVATIONS[self.activation](Dense(self.features, name="fc1")(x))
        return Dense(x.shape[-1], name="fc2")(h)


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    config: TransformerConfig
    causal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, C] -> [B, T, C]."""
        cfg = self.config
        h = LayerNorm(cfg.layer_norm_eps, name="layer_norm1")(x)
        x = x + Attention(cfg.num_attention_heads, self.causal, name="self_attn")(h)
        h = LayerNorm(cfg.layer_norm_eps, name="layer_norm2")(x)
        return x + MLP(cfg.intermediate_size, cfg.hidden_act, name="mlp")(h)


class Layers(nn.Module):
    """The stack, which keeps what every layer put out."""

    config: TransformerConfig
    causal: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """[B, T, C] -> the input and the output of each layer, [B, T, C] each."""
        states, kind = [x], nn.remat(Layer) if self.remat else Layer
        for i in range(self.config.num_hidden_layers):
            states.append(kind(self.config, self.causal, name=f"layers.{i}")(states[-1]))
        return states


class Table(nn.Module):
    """An embedding table."""

    rows: int
    features: int

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """[...] ids -> [..., features]."""
        shape = (self.rows, self.features)
        return self.param("embedding", nn.initializers.normal(0.02), shape)[ids]


class TextEmbeddings(nn.Module):
    """Tokens and their positions."""

    config: TextConfig

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """[B, T] ids -> [B, T, C]."""
        cfg = self.config
        tokens = Table(cfg.vocab_size, cfg.hidden_size, name="token_embedding")(ids)
        positions = Table(cfg.max_position_embeddings, cfg.hidden_size, name="position_embedding")
        return tokens + positions(jnp.arange(ids.shape[1]))


class TextTransformer(nn.Module):
    """Embeddings, causal layers, final norm."""

    config: TextConfig
    remat: bool = False

    @nn.compact
    def __call__(self, ids: Array, skip: int = 0) -> tuple[list[Array], Array, Array]:
        """[B, T] ids -> hidden states; the chosen one and the last one after the norm."""
        states = Layers(self.config, True, self.remat, name="encoder")(
            TextEmbeddings(self.config, name="embeddings")(ids)
        )
        norm = LayerNorm(self.config.layer_norm_eps, name="final_layer_norm")
        return states, norm(states[-1 - skip]), norm(states[-1])


class TextModule(nn.Module):
    """The text encoder with or without its projection."""

    config: TextConfig
    projected: bool
    remat: bool = False

    @nn.compact
    def __call__(self, ids: Array, skip: int = 0) -> tuple[list[Array], Array, Array]:
        """[B, T] ids -> hidden states, tokens [B, T, C], pooled [B, C or projection_dim]."""
        cfg = self.config
        states, tokens, last = TextTransformer(cfg, self.remat, name="text_model")(ids, skip)
        # Configs older than an upstream fix say eos 2; in CLIP's own vocabulary eos is the largest.
        end = ids.argmax(-1) if cfg.eos_token_id == 2 else (ids == cfg.eos_token_id).argmax(-1)
        pooled = jnp.take_along_axis(last, end[:, None, None], 1)[:, 0]
        if self.projected:
            pooled = Dense(cfg.projection_dim, use_bias=False, name="text_projection")(pooled)
        return states, tokens, pooled


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder as functions over a plain parameter tree."""

    config: TextConfig
    projected: bool = False
    remat: bool = False

    @staticmethod
    def read(data: Mapping[str, Any], where: str) -> "TextEncoder":
        """From the object in a `config.json`; UserError for what is unknown or not supported."""
        if data.get("model_type", "clip_text_model") != "clip_text_model":
            raise UserError(f"{where}: model_type {data['model_type']!r} is no CLIP text encoder")
        projected = "CLIPTextModelWithProjection" in str(data.get("architectures"))
        return TextEncoder(config.parse(TextConfig, data, FIXED, where), projected)

    def init(self, key: Array) -> Params:
        """Fresh parameters, float32."""
        ids = jnp.zeros((1, self.config.max_position_embeddings), jnp.int32)
        return TextModule(self.config, self.projected).init(key, ids)["params"]

    @full_precision
    def hidden_states(self, params: Params, ids: Array) -> list[Array]:
        """[B, T] token ids -> embeddings and each layer's output, before the final norm."""
        return TextModule(self.config, self.projected).apply({"params": params}, ids)[0]

    @full_precision
    def apply(self, params: Params, ids: Array, skip: int = 0) -> tuple[Array, Array]:
        """[B, T] token ids -> tokens [B, T, C] and the pooled embedding [B, C or projection_dim].

        `skip` counts layers left out at the end (clip skip); the final norm always follows.
        """
        module = TextModule(self.config, self.projected, self.remat)
        _, tokens, pooled = module.apply({"params": params}, ids, skip)
        return at_least_float32(tokens), at_least_float32(pooled)
