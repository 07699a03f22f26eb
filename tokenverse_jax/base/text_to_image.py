"""Stage 2: FLUX's transformer and T5, trained together by flow matching; CLIP, which has learned to read, is frozen.

Axes: B batch, T text tokens, h w grid of latents, C latent channels, N image tokens, D width, P parts of a picture.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from runtime_jax.networks.clip import CLIPTextConfig, CLIPTextEncoder
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key
from runtime_jax.training.network import Means, TrainingConfig
from tokenverse_jax.base.corpus import CaptionConfig
from tokenverse_jax.base.layout import LayoutHead, layout_loss
from tokenverse_jax.base.tokenizers import Tokenizers
from tokenverse_jax.base.words import PHRASES, BagHead, WordsHead, bag_loss, words_loss
from tokenverse_jax.flux import autoencoder, model
from tokenverse_jax.flux.model import Flux, FluxConfig, direction
from tokenverse_jax.flux.offsets import NO_OFFSETS, Offsets
from tokenverse_jax.flux.schedule import flow, logit_normal_times
from tokenverse_jax.flux.text_encoders.t5 import T5Config, T5Encoder

Params = Any


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig:
    """Sizes and training of the transformer and its text encoders, whose widths the transformer's config gives."""

    flux: FluxConfig
    text_layers: int = 2
    text_heads: int = 4
    captions: CaptionConfig = CaptionConfig()
    time_mean: float = 0.0  # of the normal variable whose sigmoid is the time, 1 being noise
    time_std: float = 1.0
    layout_weight: float = 0.3  # of the auxiliary loss of the middle single block, see `layout`
    words_weight: float = 0.3  # of T5's auxiliary loss, see `words`
    reading: TrainingConfig  # of both text encoders, from captions alone, first; see `words`
    training: TrainingConfig

    def __post_init__(self):
        if self.flux.guidance_embeds:
            raise ValueError(
                "text_to_image.flux.guidance_embeds: only a distilled model knows guidance; set it to False"
            )
        weights = self.layout_weight, self.words_weight
        if self.flux.num_single_layers < 1 or min(weights) < 0:
            raise ValueError(
                f"text_to_image.flux.num_single_layers={self.flux.num_single_layers}: at least 1 is needed; "
                f"text_to_image.layout_weight, words_weight={weights} must not be negative"
            )
        for name in ("joint_attention_dim", "pooled_projection_dim"):
            if getattr(self.flux, name) % self.text_heads:
                raise ValueError(f"text_to_image.flux.{name}: a multiple of text_heads={self.text_heads} is needed")


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The three networks' configs, dtype and attention backend."""

    transformer: FluxConfig
    clip: CLIPTextConfig
    t5: T5Config
    compute: Compute = Compute()


def make_networks(config: TextToImageConfig, tokenizers: Tokenizers, compute: Compute) -> Networks:
    """Text encoders for these tokenizers, of the widths that the transformer takes."""
    clip_width, t5_width = config.flux.pooled_projection_dim, config.flux.joint_attention_dim
    clip = CLIPTextConfig(
        vocab_size=len(tokenizers.tokenizer),
        hidden_size=clip_width,
        intermediate_size=2 * clip_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        max_position_embeddings=config.captions.text_length,
        eos_token_id=tokenizers.tokenizer.eos_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizers.tokenizer_2),
        d_model=t5_width,
        d_kv=t5_width // config.text_heads,
        d_ff=2 * t5_width,
        num_layers=config.text_layers,
        num_heads=config.text_heads,
        feed_forward_proj="gated-gelu",
    )
    return Networks(transformer=config.flux, clip=clip, t5=t5, compute=compute)


def init_params(networks: Networks, seed: int) -> Params:
    """Random parameters {"transformer", "clip", "t5", "layout_head", "words_head", "bag_head"}, float32."""
    keys = jax.random.split(stream_key(seed, Stream.PARAMS), 6)
    ids = jnp.zeros((1, 1), jnp.int32)
    return {
        "transformer": model.init_params(networks.transformer, keys[0]),
        "clip": CLIPTextEncoder(networks.clip).init(keys[1], ids)["params"],
        "t5": T5Encoder(networks.t5).init(keys[2], ids)["params"],
        "layout_head": LayoutHead().init(keys[3], jnp.zeros((1, 1, networks.transformer.width)))["params"],
        "words_head": WordsHead().init(keys[4], jnp.zeros((1, 1, networks.t5.d_model)))["params"],
        "bag_head": BagHead().init(keys[5], jnp.zeros((1, networks.clip.hidden_size)))["params"],
    }


# The parameters that are trained by reading, and by drawing.
READING = ("t5", "words_head", "clip", "bag_head")
DRAWING = ("transformer", "layout_head", "t5", "words_head")


def reading_loss(params: Params, batch: dict[str, Array], step: Array, *, networks: Networks) -> tuple[Array, Means]:
    """The losses of T5's words and of CLIP's phrases.

    Args:
      params: those named in READING.
      batch: "t5_ids" and "clip_ids" int [B, T], "words" int [B, T, A], "bags" [B, V].
    """
    txt = T5Encoder(networks.t5, networks.compute).apply({"params": params["t5"]}, batch["t5_ids"])
    vec = _pooled(params["clip"], batch["clip_ids"], networks)
    off_words = words_loss(WordsHead().apply({"params": params["words_head"]}, txt), batch["words"])
    off_bags = bag_loss(BagHead().apply({"params": params["bag_head"]}, vec), batch["bags"])
    return off_words + off_bags / len(PHRASES), {"words": off_words, "bags": off_bags}


def _pooled(clip: Params, ids: Array, networks: Networks) -> Float[Array, "B P"]:
    return CLIPTextEncoder(networks.clip, networks.compute).apply({"params": clip}, ids).pooled


def modulation(params: Params, clip: Params, batch: dict[str, Array], networks: Networks) -> Offsets:
    """The steps that T5's tokens take in the space M+, see `corpus.Told`; none for a batch without parts.

    Args:
      params: of the transformer.
      batch: part_ids int [B, 2, P, L], owners int [B, T].
    """
    if "owners" not in batch:
        return NO_OFFSETS
    vec = _pooled(clip, rearrange(batch["part_ids"], "b two p l -> (two b p) l"), networks)
    bare, look = jnp.split(vec, 2)
    batch_size, _, parts, _ = batch["part_ids"].shape
    steps = direction(networks.transformer, params, look, bare).reshape(batch_size, parts, -1)
    return Offsets(shared=jnp.einsum("btp,bpd->btd", jax.nn.one_hot(batch["owners"], parts), steps))


def loss(
    params: Params,
    batch: dict[str, Array],
    step: Array,
    *,
    clip: Params,
    config: TextToImageConfig,
    networks: Networks,
    seed: int,
) -> tuple[Array, Means]:
    """Mean square error of the velocity, and the weighted losses of the layout and of the words.

    Args:
      params: {"transformer", "t5", "layout_head", "words_head"}.
      batch: of `Corpus.batch`; time and noise depend on "example".
      clip: parameters of CLIP, which stay as they are.
    """
    compute = networks.compute
    txt = T5Encoder(networks.t5, compute).apply({"params": params["t5"]}, batch["t5_ids"])
    vec = _pooled(clip, batch["clip_ids"], networks)
    clean = autoencoder.pack(batch["latents"])
    grid = tuple(side // autoencoder.PATCH for side in batch["latents"].shape[1:3])
    keys = example_keys(stream_key(seed, Stream.NOISE, step), batch["example"])
    keys = jax.vmap(jax.random.split)(keys)
    times = logit_normal_times(keys[:, 0], config.time_mean, config.time_std)
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(keys[:, 1])
    noisy, target = flow(clean, noise, times)
    velocity, seen = Flux(networks.transformer, compute, unroll=True).apply(
        {"params": params["transformer"]},
        noisy,
        autoencoder.image_ids(grid),
        txt,
        jnp.zeros((txt.shape[1], 3)),
        times,
        vec,
        offsets=modulation(params["transformer"], clip, batch, networks),
        capture_intermediates=lambda module, _: module.name == "single_blocks",
        mutable=["intermediates"],
    )
    error = jnp.mean(jnp.square(velocity - target), axis=(1, 2))
    ((blocks, _),) = seen["intermediates"]["single_blocks"]["__call__"]
    middle = blocks[(len(blocks) - 1) // 2, :, txt.shape[1] :]
    off_layout = layout_loss(LayoutHead().apply({"params": params["layout_head"]}, middle), batch["layouts"])
    off_words = words_loss(WordsHead().apply({"params": params["words_head"]}, txt), batch["words"])
    high = times > 0.8
    metrics = {
        "velocity": jnp.mean(error),
        "velocity/high_noise": jnp.sum(error * high) / jnp.maximum(jnp.sum(high), 1),
        "layout": off_layout,
        "words": off_words,
    }
    return jnp.mean(error) + config.layout_weight * off_layout + config.words_weight * off_words, metrics
