"""MergeVQ in JAX/Flax: an image tokenizer that merges tokens, quantises without a codebook and recovers positions."""

from mergevq_jax.pretrained import load_tokenizer
from mergevq_jax.tokenizer.config import PRESETS, RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.model import Tokenizer, Tokens

__all__ = ["PRESETS", "RecoveryConfig", "Tokenizer", "TokenizerConfig", "Tokens", "load_tokenizer"]
