"""Whether the model can draw a picture at all: what it cannot draw, no concept of it can bring back.

Axes: B pictures, N image tokens, C channels of an image token.
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from runtime_jax.finite import all_finite, check_finite
from runtime_jax.prng import Stream, host_rng
from runtime_jax.sharding import to_host
from tokenverse_jax.flux.autoencoder import image_ids
from tokenverse_jax.flux.model import Flux, Params
from tokenverse_jax.flux.pipeline import Pipeline, PromptEncoding
from tokenverse_jax.flux.schedule import flow

_LOG = logging.getLogger(__name__)
TIMES = (0.3, 0.5, 0.7)  # where pictures differ most: at 0 all is told, at 1 nothing
# Loss on a picture, over that on the model's own: with the shipped model, scenes that it was not trained on have less,
# noise and stripes more (tests/runs/test_learn_run.py); so have photographs (2.7 to 11) and pages of text (5).
UNFAMILIAR = 2.5
REFERENCES = 8  # of the model's own pictures


def loss_ratios(
    pipeline: Pipeline,
    pictures: tuple[Float[np.ndarray, "B N C"], PromptEncoding],
    own: tuple[Float[np.ndarray, "own N C"], PromptEncoding],
    grid: tuple[int, int],
    guidance: float,
) -> Float[np.ndarray, " B"]:
    """The model's loss on each picture under its caption, over the mean loss on pictures that it drew itself.

    Args:
      pipeline: its transformer is used.
      pictures: latents, and a caption's encoding for each.
      own: the same, drawn by the model.
      guidance: strength, for models with guidance_embeds.
    """
    flux = pipeline.transformer
    noise = host_rng(0, Stream.NOISE).standard_normal((1, len(TIMES), *pictures[0].shape[1:]), np.float32)[0]

    def losses(latents: np.ndarray, prompts: PromptEncoding) -> np.ndarray:
        found = []
        for number, clean in enumerate(latents):
            prompt = PromptEncoding(*(part[number : number + 1] for part in prompts))
            strength = np.float32(guidance) if flux.config.guidance_embeds else None
            module = Flux(flux.config, pipeline.compute)
            loss, finite = _loss(flux.params, clean, noise, prompt, strength, module=module, grid=grid)
            check_finite({"the loss on a picture": finite}, {"transformer": flux.params})
            found.append(to_host(loss))
        return np.asarray(found)

    first = own[0][:REFERENCES], PromptEncoding(*(part[:REFERENCES] for part in own[1]))
    return losses(*pictures) / losses(*first).mean()


@functools.partial(jax.jit, static_argnames=("module", "grid"))
def _loss(
    params: Params,
    clean: Array,
    noise: Array,
    prompt: PromptEncoding,
    guidance: Array | None,
    *,
    module: Flux,
    grid: tuple[int, int],
) -> tuple[Array, Array]:
    """Mean square error of the velocity at TIMES."""
    count = len(TIMES)
    times = jnp.asarray(TIMES, jnp.float32)
    x, target = flow(jnp.broadcast_to(clean, noise.shape), noise, times)
    txt, vec = (jnp.repeat(part, count, axis=0) for part in prompt)
    strengths = None if guidance is None else jnp.full(count, guidance)
    velocity = module.apply(
        {"params": params}, x, image_ids(grid), txt, jnp.zeros((txt.shape[1], 3)), times, vec, strengths
    )
    loss = jnp.mean(jnp.square(velocity - target))
    return loss, all_finite(loss)


def warn_unfamiliar(ratios: Sequence[float], names: Sequence[str]) -> None:
    """Logs the pictures that lie outside of what the model draws."""
    for ratio, name in zip(ratios, names, strict=True):
        if ratio > UNFAMILIAR:
            _LOG.warning(
                "%s: the model's loss on this picture is %.1f times that on its own pictures (usual is up to %.1f): "
                "it cannot draw such pictures well, and a concept will resemble it only in part",
                name,
                ratio,
                UNFAMILIAR,
            )
