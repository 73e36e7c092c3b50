"""What CLIP's `config.json` states: the supported fields, and those with one supported value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from jaxgen import config
from jaxgen.types import UserError

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
