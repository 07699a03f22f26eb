"""TokenVerse: visual concepts as directions in the per-token modulation space of a FLUX-style diffusion transformer.

    pipeline = load_pipeline("tiny")                 # shipped; or a folder in diffusers' layout, or a hub id
    learned = learn_concepts(pipeline, image, ["a star and a drop in the snow"], ["a star", "a drop"])
    images = generate(pipeline, "a star on the beach", {"a star": learned.concept("a star")}, num=4)

Concepts are kept in files (`ConceptFile.save`, `load_concepts`); `compose` adds up several of them for one prompt.
"""

from runtime_jax import lazy

__getattr__, __dir__, __all__ = lazy.attributes(
    __name__,
    {
        "tokenverse_jax.flux.autoencoder": ("image_ids",),
        "tokenverse_jax.flux.model": ("Flux", "direction"),
        "tokenverse_jax.flux.offsets": ("Offsets", "place_on_tokens"),
        "tokenverse_jax.flux.pipeline": ("Loader", "Pipeline", "PromptEncoding", "load_pipeline"),
        "tokenverse_jax.flux.schedule": ("flow",),
        "tokenverse_jax.flux.words": ("find_word",),
        "tokenverse_jax.concepts.concept_data": ("read_image",),
        "tokenverse_jax.concepts.learn": ("LearnConfig", "StageConfig"),
        "tokenverse_jax.concepts.learner": ("Learner", "learn_concepts"),
        "tokenverse_jax.concepts.bank": ("Concept", "ConceptFile", "load_concepts"),
        "tokenverse_jax.concepts.compose": ("PlacedConcept", "compose", "place_stored"),
        "tokenverse_jax.concepts.draw": ("generate",),
    },
)
