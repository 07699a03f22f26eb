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

from runtime_jax.finite import all_finite, check_finite
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
from tokenverse_jax.flux.text_encoders.clip import CLIPTextEncoder
from tokenverse_jax.flux.text_encoders.t5 import T5Encoder
from tokenverse_jax.flux.words import Tokenizer

PARTS = tuple(KINDS)
TEXT_LENGTH = {True: 512, False: 256}  # FLUX's, by guidance_embeds: dev and schnell
GUIDANCE = 3.5  # the strength that dev is used with, unless another is asked for


class PromptEncoding(NamedTuple):
    """What the transformer sees of prompts."""

    txt: Float[Array, "B T J"]  # T5's outputs
    vec: Float[Array, "B P"]  # CLIP's pooled output
    ids: Int[np.ndarray, "B T"] | Int[Array, "B T"]  # T5's token ids


@dataclass(frozen=True, eq=False, kw_only=True)
class Pipeline:
    """A FLUX model with its weights: what a user loads. A part may be None: `dataclasses.replace(pipeline, t5=None)`.

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
        """Loads a folder in diffusers' layout, a hub id, or one that is shipped with the package by its name.

        Args:
          source: the folder (the tokenizers and the schedule are always loaded from it), "owner/name" or "tiny".
          parts: which networks to load.
          dtype: of the parameters.
          mesh: where parameters go by their sharding rules; without one, to the default device.
          compute: dtype of matmuls, attention backend, remat.
          text_length: tokens of a T5 sequence; by default 512, or 256 without guidance_embeds, but at most what the
            folder's tokenizer_2 is made for (its model_max_length).
          transformer: a single file with this part's weights, in FLUX's own layout (flux1-dev.safetensors) or in
            diffusers', instead of those in the folder. Its config is the folder's; without one, FLUX.1's that fits.
          vae: the same for the autoencoder (ae.safetensors).

        Raises:
          ValueError: everything that is missing in the folder, before anything is loaded; a hub id that is gated or
            cannot be reached, with what to do; configs or weights that do not fit.
        """
        single = {name: Path(path) for name, path in (("transformer", transformer), ("vae", vae)) if path is not None}
        unknown = [part for part in parts if part not in PARTS]
        if isinstance(parts, str) or unknown:
            raise ValueError(f"parts={parts!r}: a list of {', '.join(PARTS)} is needed")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r}: float32 or bfloat16 is needed")
        folder = model_folder.fetch(source, [part for part in parts if part not in single])
        files = model_folder.locate(folder, parts, single)
        names = {"transformer": None, **dict.fromkeys(parts)}
        weights = {part: [path] for part, path in single.items()} | files
        configs = {part: model_folder.read_config(folder, part, weights.get(part, ())) for part in names}
        noise = schedule.parse_config(model_folder.read_json(folder / model_folder.SCHEDULE))
        tokenizers = {name: text.load_tokenizer(folder / name) for name in model_folder.TOKENIZERS}
        if text_length is None:
            usual = TEXT_LENGTH[configs["transformer"].guidance_embeds]
            text_length = min(usual, tokenizers["tokenizer_2"].model_max_length)
        loaded: dict[str, Part | None] = dict.fromkeys(PARTS)
        for part in parts:
            loaded[part] = model_folder.read_part(part, configs[part], files[part], dtype=dtype, mesh=mesh)
        return cls(
            **loaded,
            **tokenizers,
            schedule=noise,
            text_length=text_length,
            usual=model_folder.read_usual(folder, distilled=configs["transformer"].guidance_embeds),
            compute=compute,
            source=str(source),
        )

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes diffusers' layout, one weight file a part, in the parameters' dtype; every file atomically.

        Raises:
          ValueError: a part was dropped.
        """
        parts = {name: self._part(name) for name in PARTS}
        tokenizers = {name: getattr(self, name) for name in model_folder.TOKENIZERS}
        model_folder.write_folder(Path(path), parts, tokenizers, schedule.config_fields(self.schedule), self.usual)

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEncoding:
        """Prompts as T5's outputs and CLIP's pooled output. CLIP sees their first tokens only (77), as in FLUX.

        A warning names what of a prompt is cut or unknown to the tokenizers.

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
        txt, vec, finite = _encode_text((clip.params, t5.params), clip_ids, ids, encoders=encoders)
        stages = ("T5's outputs", "CLIP's output")
        check_finite(dict(zip(stages, finite, strict=True)), {"t5": t5.params, "clip": clip.params})
        return PromptEncoding(txt, vec, ids)

    def encode_images(
        self, images: UInt8[np.ndarray, "B H W 3"] | UInt8[Array, "B H W 3"], keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B N C"]:
        """Images as the transformer's tokens: the means of their latents, or with a key for each image, a sample.

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
        indices: Int[np.ndarray, " B"] | None = None,
        offsets: Offsets = NO_OFFSETS,
        negative_prompt: str | PromptEncoding | None = None,
        cfg_scale: float = 1.0,
    ) -> UInt8[Array, "B H W 3"]:
        """Images of prompts, by Euler steps in one program.

        The noise of an image depends on the seed and its index alone: images are the same however they are batched.

        Args:
          prompts: texts, or their encoding, for which the text encoders may have been dropped.
          height: pixels, like `width`; a multiple of a token's side (16 for FLUX).
          num_steps: FLUX.1-dev is used with 28 to 50, schnell with 4.
          guidance: strength, for models with guidance_embeds only, and then 3.5 by default.
          indices: the images' numbers; by default from 0.
          offsets: of the modulation vector, for each prompt.
          negative_prompt: what true classifier-free guidance leads away from, for all images, without offsets; "" by
            default.
          cfg_scale: its strength; 1 is none, and each step then costs half.

        Raises:
          ValueError: sizes, strengths, indices or offsets that are not possible; a part that was dropped.
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
        indices = np.arange(batch) if indices is None else np.asarray(indices)
        if indices.shape != (batch,):
            raise ValueError(f"indices: one for each of the {batch} prompts is needed, got shape {indices.shape}")
        images, finite = _generate(
            (flux.params, vae.params),
            (encoded.txt, encoded.vec),
            None if negative is None else (negative.txt, negative.vec),
            stream_key(seed, Stream.SAMPLE),
            indices,
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


def load_pipeline(source: str | os.PathLike, **options: Any) -> Pipeline:
    """A shipped pipeline by its name ("tiny"), a folder in diffusers' layout or a hub id; see `from_pretrained`."""
    return Pipeline.from_pretrained(source, **options)


class Loader:
    """Loads parts of a model that may be too large to be on a device as a whole.

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
        """Fetches everything, and loads nothing yet; arguments as of `Pipeline.from_pretrained`.

        Raises:
          ValueError: a model that is not there or not whole.
        """
        given = {"transformer": transformer, "vae": vae}
        self._single = {name: Path(path) for name, path in given.items() if path is not None}
        self._folder = model_folder.fetch(source, [part for part in PARTS if part not in self._single])
        self._files = model_folder.locate(self._folder, PARTS, self._single)
        self._options = options

    def __call__(self, *parts: str) -> Pipeline:
        """A pipeline with these parts only; without any, of tokenizers and configs."""
        return Pipeline.from_pretrained(self._folder, parts=parts, **self._single, **self._options)

    def check_size(self, height: int, width: int) -> None:
        """Makes sure that images can have a size, in pixels.

        Raises:
          ValueError: they cannot.
        """
        model_folder.read_config(self._folder, "vae", self._files["vae"]).token_grid(height, width)


@functools.partial(jax.jit, static_argnames="encoders")
def _encode_text(
    params: tuple, clip_ids: Array, t5_ids: Array, *, encoders: tuple
) -> tuple[Array, Array, tuple[Array, Array]]:
    clip, t5 = encoders
    txt, vec = t5.apply({"params": params[1]}, t5_ids), clip.apply({"params": params[0]}, clip_ids).pooled
    return txt, vec, (all_finite(txt), all_finite(vec))


@functools.partial(jax.jit, static_argnames="vae")
def _encode_images(params: Params, images: Array, keys: Array | None, *, vae: Autoencoder) -> tuple[Array, Array]:
    posterior = vae.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1.0, method="encode")
    latents = posterior.mean
    if keys is not None:
        latents = posterior.sample(jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys))
    return autoencoder.pack(autoencoder.to_latents(latents, vae.config)), all_finite(latents)


@functools.partial(jax.jit, static_argnames=("vae", "grid"))
def _decode(params: Params, tokens: Array, *, vae: Autoencoder, grid: tuple[int, int]) -> tuple[Array, Array]:
    latents = autoencoder.from_latents(autoencoder.unpack(tokens, grid), vae.config)
    images = vae.apply({"params": params}, latents, method="decode")
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8), all_finite(images)


@functools.partial(jax.jit, static_argnames=("modules", "grid"))
def _generate(
    params: tuple[Params, Params],
    prompts: tuple[Array, Array],
    negative: tuple[Array, Array] | None,
    key: Array,
    indices: Array,
    sigmas: Array,
    guidance: Array | None,
    cfg_scale: Array,
    offsets: Offsets,
    *,
    modules: tuple[Flux, Autoencoder],
    grid: tuple[int, int],
) -> tuple[Array, tuple[Array, Array, Array]]:
    flux, vae = modules
    batch, length = prompts[0].shape[:2]
    strengths = None if guidance is None else jnp.full(batch, guidance)
    image_ids, text_ids = autoencoder.image_ids(grid), jnp.zeros((length, 3))

    def velocity(prompts: tuple[Array, Array], offsets: Offsets = NO_OFFSETS) -> sampling.Velocity:
        txt, vec = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in prompts)

        def at(x: Array, times: Array) -> Array:
            inputs = x, image_ids, txt, text_ids, times, vec, strengths
            return flux.apply({"params": params[0]}, *inputs, offsets=offsets)

        return at

    guided = velocity(prompts, offsets)
    if negative is not None:
        guided = sampling.with_cfg(guided, velocity(negative), cfg_scale)
    noise = sampling.initial_noise(key, indices, (grid[0] * grid[1], flux.config.in_channels))
    prompt_finite = all_finite(prompts[0]) & all_finite(prompts[1])
    sampled = sampling.euler(guided, noise, sigmas)
    images, images_finite = _decode(params[1], sampled.tokens, vae=vae, grid=grid)
    return images, (prompt_finite, sampled.finite, images_finite)
