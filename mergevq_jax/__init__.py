"""MergeVQ in JAX/Flax: a tokenizer that merges tokens and quantises without a codebook, and generators of its codes."""

from mergevq_jax.generator.model import GeneratorModel, load_generator
from mergevq_jax.generator.plan import SamplingConfig
from mergevq_jax.pretrained import load_tokenizer
from mergevq_jax.tokenizer.config import PRESETS, RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.model import Tokenizer, Tokens

__all__ = [
    "PRESETS",
    "GeneratorModel",
    "RecoveryConfig",
    "SamplingConfig",
    "Tokenizer",
    "TokenizerConfig",
    "Tokens",
    "load_generator",
    "load_tokenizer",
]
