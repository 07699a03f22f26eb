"""A loaded FLUX model directory: prompts and images to what the transformer takes, and prompts to images.

Axes: B batch, H W image, N image tokens, T text tokens, C channels of an image token, D width, J and P the text
encoders' widths.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from runtime_jax.files import local, path_of
from runtime_jax.finite import all_finite, check_finite
from runtime_jax.networks.clip import CLIPTextEncoder
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, stream_key
from tokenverse_jax.flux import autoencoder, model_folder, sampling, schedule, text
from tokenverse_jax.flux.autoencoder import Autoencoder
from tokenverse_jax.flux.fingerprint import fingerprint
from tokenverse_jax.flux.model import Flux
from tokenverse_jax.flux.model_folder import KINDS, Params, Part
from tokenverse_jax.flux.offsets import NO_OFFSETS, Offsets
from tokenverse_jax.flux.sampling import UsualSampling
from tokenverse_jax.flux.schedule import ScheduleConfig
from tokenverse_jax.flux.text_encoders.t5 import T5Encoder
from tokenverse_jax.flux.words import Tokenizer

PARTS = tuple(KINDS)
TEXT_LENGTH = {True: 512, False: 256}  # FLUX's, by guidance_embeds: dev and schnell
GUIDANCE = 3.5  # the strength that dev is used with, unless another is asked for


class PromptEncoding(NamedTuple):
    """What the transformer sees of prompts."""

    txt: Float[Array, "B T J"]  # T5's outputs
    vec: Float[Array, "B P"]  # CLIP's pooled output


@dataclass(frozen=True, eq=False, kw_only=True)
class Pipeline:
    """A FLUX model with its weights: what a user loads. `dataclasses.replace(pipeline, t5=None)` drops a part.

    >>> pipeline = Pipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype="bfloat16")
    >>> images = pipeline.generate(["a dog"], height=512, width=512, num_steps=28)    # uint8 [B, H, W, 3]
    """

    transformer: Part | None
    vae: Part | None
    clip: Part | None
    t5: Part | None
    tokenizer: Tokenizer = field(repr=False)  # CLIP's
    tokenizer_2: Tokenizer = field(repr=False)  # T5's
    schedule: ScheduleConfig
    text_length: int
    usual: UsualSampling = UsualSampling()  # what the command line samples with
    compute: Compute = Compute()
    source: str = ""  # the folder or hub id that it comes from

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        parts: Sequence[str] = PARTS,
        dtype: Literal["float32", "bfloat16"] = "float32",
        mesh: Mesh | None = None,
        compute: Compute = Compute(),
        text_length: int | None = None,
        transformer: str | os.PathLike | None = None,
        vae: str | os.PathLike | None = None,
    ) -> "Pipeline":
        """Loads a folder in diffusers' layout, a hub id, or a pipeline that is shipped with the package.

        Args:
          source: the folder (tokenizers and schedule always come from it), "owner/name" or "tiny".
          parts: which networks to load.
          dtype: of the parameters.
          mesh: where parameters go by their sharding rules; None: to the default device.
          compute: dtype of matmuls, attention backend, remat.
          text_length: tokens of a T5 sequence; by default 512, or 256 without guidance_embeds, but at most the
            model_max_length of the folder's tokenizer_2.
          transformer: a single file with this part's weights, in FLUX's own layout (flux1-dev.safetensors) or in
            diffusers', instead of those in the folder. Its config is the folder's, or else FLUX.1's that fits.
          vae: the same for the autoencoder (ae.safetensors).

        Raises:
          ValueError: everything that is missing in the folder, before anything is loaded; a hub id that is gated or
            cannot be reached, with what to do; configs or weights that do not fit.
        """
        single = _single_files(transformer, vae)
        if isinstance(parts, str) or not set(parts) <= set(PARTS):
            raise ValueError(f"parts={parts!r}: a list of {', '.join(PARTS)} is needed")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r}: float32 or bfloat16 is needed")
        folder = model_folder.fetch(source, [part for part in parts if part not in single])
        files = model_folder.locate(folder, parts, single)
        weights = {part: [path] for part, path in single.items()} | files
        configs = {
            part: model_folder.read_config(folder, part, weights.get(part, ()))
            for part in dict.fromkeys(("transformer", *parts))
        }
        distilled = configs["transformer"].guidance_embeds
        noise_levels = schedule.parse_config(model_folder.read_json(folder / model_folder.SCHEDULE))
        tokenizers = {name: text.load_tokenizer(folder / name) for name in model_folder.TOKENIZERS}
        if text_length is None:
            text_length = min(TEXT_LENGTH[distilled], tokenizers["tokenizer_2"].model_max_length)
        loaded = {
            part: model_folder.read_part(part, configs[part], files[part], dtype=dtype, mesh=mesh) for part in parts
        }
        return cls(
            **dict.fromkeys(PARTS) | loaded,
            **tokenizers,
            schedule=noise_levels,
            text_length=text_length,
            usual=model_folder.read_usual(folder, distilled=distilled),
            compute=compute,
            source=str(source),
        )

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes diffusers' layout, one weight file for each part, in the parameters' dtype; every file atomically.

        Raises:
          ValueError: a part was dropped.
        """
        parts = {name: self._part(name) for name in PARTS}
        tokenizers = {name: getattr(self, name) for name in model_folder.TOKENIZERS}
        model_folder.write_folder(path_of(path), parts, tokenizers, schedule.config_fields(self.schedule), self.usual)

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEncoding:
        """Prompts as T5's outputs and CLIP's pooled output. CLIP sees only their first tokens (77), as in FLUX.

        A warning names the parts of a prompt that are cut off or unknown to the tokenizers.

        Raises:
          ValueError: a prompt of more than `text_length` T5 tokens.
          NotFiniteError: outputs that are not finite.
        """
        clip, t5 = self._part("clip"), self._part("t5")
        ids = text.encode(self.tokenizer_2, prompts, self.text_length)
        clip_length = clip.config.max_position_embeddings
        clip_ids = text.encode(self.tokenizer, prompts, clip_length, truncate=True)
        text.warn_unread(self.tokenizer, self.tokenizer_2, prompts, clip_length)
        encoders = CLIPTextEncoder(clip.config, self.compute), T5Encoder(t5.config, self.compute)
        encoded, finite = _encode_text((clip.params, t5.params), clip_ids, ids, encoders=encoders)
        stages = ("T5's outputs", "CLIP's output")
        check_finite(dict(zip(stages, finite, strict=True)), {"t5": t5.params, "clip": clip.params})
        return encoded

    def encode_images(
        self, images: UInt8[np.ndarray, "B H W 3"] | UInt8[Array, "B H W 3"], keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B N C"]:
        """Images as the transformer's tokens: the means of their latents, or with `keys`, one for each image, samples.

        Raises:
          ValueError: not uint8 [B, H, W, 3], or a side that is no multiple of a token's (16 pixels for FLUX).
          NotFiniteError: latents that are not finite.
        """
        vae = self._part("vae")
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != 3:
            raise ValueError(f"images: uint8 [B, H, W, 3] is needed, got {images.dtype} {images.shape}")
        vae.config.token_grid(*images.shape[1:3])
        tokens, finite = _encode_images(vae.params, images, keys, vae=Autoencoder(vae.config, self.compute))
        check_finite({"the images' latents": finite}, {"vae": vae.params})
        return tokens

    def decode_latents(self, tokens: Float[Array, "B N C"], grid: tuple[int, int]) -> UInt8[Array, "B H W 3"]:
        """Images from tokens of a grid (rows, columns).

        Raises:
          ValueError: the tokens do not fill the grid.
          NotFiniteError: images that are not finite.
        """
        vae = self._part("vae")
        shape = (grid[0] * grid[1], autoencoder.PATCH**2 * vae.config.latent_channels)
        if tokens.shape[1:] != shape:
            raise ValueError(f"tokens {tokens.shape}: {shape} in each image are needed for the grid {grid}")
        images, finite = _decode(vae.params, tokens, vae=Autoencoder(vae.config, self.compute), grid=grid)
        check_finite({"the decoded images": finite}, {"vae": vae.params})
        return images

    def generate(
        self,
        prompts: Sequence[str] | PromptEncoding,
        *,
        height: int,
        width: int,
        num_steps: int,
        guidance: float | None = None,
        seed: int = 0,
        examples: Int[np.ndarray, " B"] | None = None,
        offsets: Offsets = NO_OFFSETS,
        negative_prompt: str | PromptEncoding | None = None,
        cfg_scale: float = 1.0,
    ) -> UInt8[Array, "B H W 3"]:
        """Images of prompts, by Euler steps in one program.

        The noise of an image depends on the seed and its number alone: images are the same however they are batched.

        Args:
          prompts: texts, or their encoding, which needs no text encoders.
          height: pixels, like `width`; a multiple of a token's side (16 for FLUX).
          num_steps: FLUX.1-dev is used with 28 to 50, schnell with 4.
          guidance: strength, only for models with guidance_embeds; 3.5 by default.
          examples: the images' numbers; by default from 0.
          offsets: of the modulation vector, for each prompt.
          negative_prompt: what true classifier-free guidance leads away from, for all images, without offsets; "" by
            default.
          cfg_scale: its strength; 1 is none and halves the cost of a step.

        Raises:
          ValueError: impossible sizes, strengths, examples or offsets; a part that was dropped.
          NotFiniteError: values that are not finite; names the step where they begin, and the parameters that are not.
        """
        flux, vae = self._part("transformer"), self._part("vae")
        grid = vae.config.token_grid(height, width)
        if flux.config.guidance_embeds and guidance is None:
            guidance = GUIDANCE
        if negative_prompt is not None and cfg_scale == 1.0:
            raise ValueError("negative_prompt has no effect with cfg_scale=1: give a larger scale, or no such prompt")
        sigmas = schedule.sigmas(self.schedule, num_steps, grid[0] * grid[1])
        encoded = prompts if isinstance(prompts, PromptEncoding) else self.encode_prompts(prompts)
        negative = None
        if cfg_scale != 1.0:
            given = isinstance(negative_prompt, PromptEncoding)
            negative = negative_prompt if given else self.encode_prompts([negative_prompt or ""])
        batch = len(encoded.vec)
        examples = np.arange(batch) if examples is None else np.asarray(examples)
        if examples.shape != (batch,):
            raise ValueError(f"examples: one for each of the {batch} prompts is needed, got shape {examples.shape}")
        images, finite = run(
            (flux.params, vae.params),
            encoded,
            negative,
            stream_key(seed, Stream.SAMPLE),
            examples,
            sigmas,
            None if guidance is None else np.float32(guidance),
            np.float32(cfg_scale),
            offsets,
            modules=(Flux(flux.config, self.compute), Autoencoder(vae.config, self.compute)),
            grid=grid,
        )
        stages = ("the prompts' encodings", "sampling step", "the decoded images")
        check_finite(dict(zip(stages, finite, strict=True)), {"transformer": flux.params, "vae": vae.params})
        return images

    def base_hash(self) -> str:
        """The transformer's `fingerprint`."""
        return fingerprint(self._part("transformer").params)

    def _part(self, name: str) -> Part:
        part = getattr(self, name)
        if part is None:
            raise ValueError(f"this needs the pipeline's {name}, which was not loaded or has been dropped")
        return part


load_pipeline = Pipeline.from_pretrained


def _single_files(transformer: str | os.PathLike | None, vae: str | os.PathLike | None) -> dict[str, Path]:
    return {name: local(path) for name, path in (("transformer", transformer), ("vae", vae)) if path is not None}


class Loader:
    """Loads parts of a model that may be too large for a device as a whole.

    >>> load = Loader("black-forest-labs/FLUX.1-dev", dtype="bfloat16")
    >>> prompts = load("clip", "t5").encode_prompts(["a dog"])
    >>> images = load("transformer", "vae").generate(prompts, height=512, width=512, num_steps=28)
    """

    def __init__(
        self,
        source: str | os.PathLike,
        *,
        transformer: str | os.PathLike | None = None,
        vae: str | os.PathLike | None = None,
        **options: Any,
    ):
        """Fetches everything and loads nothing yet; arguments and errors as of `Pipeline.from_pretrained`."""
        self._single = _single_files(transformer, vae)
        self._folder = model_folder.fetch(source, [part for part in PARTS if part not in self._single])
        self._files = model_folder.locate(self._folder, PARTS, self._single)
        self._options = options

    def __call__(self, *parts: str) -> Pipeline:
        """A pipeline with these parts only; without any, just tokenizers and configs."""
        return Pipeline.from_pretrained(self._folder, parts=parts, **self._single, **self._options)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError where images cannot have this size, in pixels."""
        model_folder.read_config(self._folder, "vae", self._files["vae"]).token_grid(height, width)


@functools.partial(jax.jit, static_argnames="encoders")
def _encode_text(
    params: tuple, clip_ids: Array, t5_ids: Array, *, encoders: tuple
) -> tuple[PromptEncoding, tuple[Array, Array]]:
    clip, t5 = encoders
    txt, vec = t5.apply({"params": params[1]}, t5_ids), clip.apply({"params": params[0]}, clip_ids).pooled
    return PromptEncoding(txt, vec), (all_finite(txt), all_finite(vec))


@functools.partial(jax.jit, static_argnames="vae")
def _encode_images(params: Params, images: Array, keys: Array | None, *, vae: Autoencoder) -> tuple[Array, Array]:
    posterior = vae.apply({"params": params}, autoencoder.to_float(images), method="encode")
    latents = posterior.mean
    if keys is not None:
        latents = posterior.sample(jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys))
    return autoencoder.pack(autoencoder.to_latents(latents, vae.config)), all_finite(latents)


@functools.partial(jax.jit, static_argnames=("vae", "grid"))
def _decode(params: Params, tokens: Array, *, vae: Autoencoder, grid: tuple[int, int]) -> tuple[Array, Array]:
    latents = autoencoder.from_latents(autoencoder.unpack(tokens, grid), vae.config)
    images = vae.apply({"params": params}, latents, method="decode")
    return autoencoder.to_uint8(images), all_finite(images)


@functools.partial(jax.jit, static_argnames=("modules", "grid"))
def run(
    params: tuple[Params, Params],
    prompts: PromptEncoding,
    negative: PromptEncoding | None,
    key: Array,
    examples: Array,
    sigmas: Array,
    guidance: Array | None,
    cfg_scale: Array,
    offsets: Offsets,
    *,
    modules: tuple[Flux, Autoencoder],
    grid: tuple[int, int],
) -> tuple[Array, tuple[Array, Array, Array]]:
    """The compiled program of `Pipeline.generate`: images, and whether prompts, steps and images were finite."""
    flux, vae = modules
    batch, length = prompts.txt.shape[:2]
    strengths = None if guidance is None else jnp.full(batch, guidance)
    image_ids, text_ids = autoencoder.image_ids(grid), jnp.zeros((length, 3))

    def velocity(prompts: PromptEncoding, offsets: Offsets = NO_OFFSETS) -> sampling.Velocity:
        txt, vec = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in prompts)

        def at(x: Array, times: Array) -> Array:
            inputs = x, image_ids, txt, text_ids, times, vec, strengths
            return flux.apply({"params": params[0]}, *inputs, offsets=offsets)

        return at

    guided = velocity(prompts, offsets)
    if negative is not None:
        guided = sampling.with_cfg(guided, velocity(negative), cfg_scale)
    noise = sampling.initial_noise(key, examples, (grid[0] * grid[1], flux.config.in_channels))
    prompts_finite = all_finite(prompts.txt) & all_finite(prompts.vec)
    tokens, steps_finite = sampling.euler(guided, noise, sigmas)
    images, images_finite = _decode(params[1], tokens, vae=vae, grid=grid)
    return images, (prompts_finite, steps_finite, images_finite)
