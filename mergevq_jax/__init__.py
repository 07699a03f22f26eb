"""MergeVQ in JAX/Flax: a tokenizer that merges tokens and quantises without a codebook, and generators of its codes.

    tokenizer = load_tokenizer("tiny")               # shipped; or a folder, or a hub id
    tokens = tokenizer.encode(images, keep=144)      # uint8 [B, H, W, 3] -> indices [B, K], source_map [B, L]
    generator = load_generator("tiny-mergear")
    samples = generator.sample([3, 3], 144, sampling=SamplingConfig(cfg_scale=3.5), seed=0)
    images = codes_to_images(tokenizer, samples.indices)

Underneath are pure functions of parameters: `encode`, `decode`, `recover`, `quantize`, `merge`. You can add to the
tables QUANTIZERS, MERGE_RULES and POLICIES (docs/extend.md).
"""

from runtime_jax import lazy

__getattr__, __dir__, __all__ = lazy.attributes(
    __name__,
    {
        "mergevq_jax.tokenizer.config": ("PRESETS", "RecoveryConfig", "TokenizerConfig"),
        "mergevq_jax.tokenizer.model": (
            "Tokenizer",
            "Tokens",
            "decode",
            "encode",
            "init_params",
            "load_tokenizer",
            "quantize",
            "recover",
        ),
        "mergevq_jax.tokenizer.quantizers.quantizer": ("QUANTIZERS", "Quantizer"),
        "mergevq_jax.tokenizer.tome": ("MERGE_RULES", "Matching", "merge", "unmerge"),
        "mergevq_jax.generator.images": ("codes_to_images", "recovered_to_images"),
        "mergevq_jax.generator.model": ("GeneratorModel", "load_generator"),
        "mergevq_jax.generator.sampling.plan": ("SamplingConfig",),
        "mergevq_jax.generator.sampling.position_cache": ("POLICIES",),
    },
)
