"""FLUX's text encoder T5; CLIP is in `runtime_jax.networks`."""
