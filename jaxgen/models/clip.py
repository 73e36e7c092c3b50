"""CLIP: the text encoders of Stable Diffusion, and the image encoder that goes with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxgen import config
from jaxgen.models.attention import attend
from jaxgen.models.layers import Conv, Dense
from jaxgen.models.norms import LayerNorm
from jaxgen.types import Array, Params, UserError, at_least_float32, full_precision

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's ViT-L
    "gelu": lambda x: nn.gelu(x, approximate=False),  # OpenCLIP's H and bigG
}


@dataclass(frozen=True)
class TransformerConfig:
    """What both encoders' `config.json` share, with transformers' defaults."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    attention_dropout: float = 0.0  # of training with transformers; here nothing is dropped

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act = {self.hidden_act!r} is not one of {[*ACTIVATIONS]}")
        numbers = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config.check_positive(self, *numbers, "projection_dim")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"{self.num_attention_heads} heads do not divide {self.hidden_size}")


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """A transformers `text_encoder/config.json`."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    bos_token_id: int | None = 49406
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        config.check_positive(self, "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """A transformers `image_encoder/config.json`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        config.check_positive(self, "patch_size", "num_channels")
        if self.image_size < self.patch_size:
            raise UserError(f"image_size = {self.image_size} is less than one patch")


# transformers writes every option of its base class; none of these changes an encoder's output.
_WITHOUT_EFFECT = (
    "architectures dropout initializer_factor initializer_range model_type "
    "torch_dtype dtype transformers_version return_dict output_hidden_states output_attentions "
    "torchscript use_bfloat16 pruned_heads tie_word_embeddings cross_attention_hidden_size "
    "add_cross_attention tie_encoder_decoder max_length min_length do_sample early_stopping "
    "num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences chunk_size_feed_forward output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task "
    "id2label label2id tokenizer_class prefix sep_token_id decoder_start_token_id "
    "task_specific_params problem_type tf_legacy_loss name_or_path gradient_checkpointing "
)
FIXED: Mapping[str, Any] = dict.fromkeys(_WITHOUT_EFFECT.split(), ...) | {
    "is_decoder": False,
    "is_encoder_decoder": False,
}


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
