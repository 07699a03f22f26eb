"""`tokenverse train-base`: autoencoder, T5's reading, latents of the corpus, transformer with text encoders, folder."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax import config as config_lib
from runtime_jax.files import AnyPath
from runtime_jax.nn.compute import Compute
from runtime_jax.pictures import image_grid
from runtime_jax.sharding import to_host
from runtime_jax.training import loop
from runtime_jax.training.network import train_network
from runtime_jax.workdir import only_writer
from tokenverse_jax.base import corpus, text_to_image, vae
from tokenverse_jax.base.corpus import Corpus
from tokenverse_jax.base.layout import layout
from tokenverse_jax.base.report import captioned_grid, held_out_captions
from tokenverse_jax.base.text_to_image import Networks, TextToImageConfig
from tokenverse_jax.base.tokenizers import Tokenizers, make_tokenizers, scene_words
from tokenverse_jax.base.vae import VAEConfig
from tokenverse_jax.flux import autoencoder
from tokenverse_jax.flux.fingerprint import fingerprint
from tokenverse_jax.flux.model_folder import Part
from tokenverse_jax.flux.pipeline import PARTS, Pipeline
from tokenverse_jax.flux.sampling import SamplingConfig, UsualSampling
from tokenverse_jax.flux.schedule import ScheduleConfig

Params = Any
FOLDER = "pipeline"
SCALES = ("shift_factor", "scaling_factor")  # of the autoencoder's latents, computed from the scenes
HELD_OUT = 64  # pictures that reconstruction is measured on
PREVIEWS = 24  # captions that are drawn on the way


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """All stages, built from what configs/flux_tiny.py returns."""

    task: Literal["base"] = "base"
    seed: int = 0
    compute: Compute = Compute()
    image_size: int = 64
    vae: VAEConfig
    num_scenes: int = 20_000  # for the transformer; the autoencoder sees new ones at every step
    drawn: float = 0.0  # share of drawings among them
    text_to_image: TextToImageConfig
    schedule: ScheduleConfig = ScheduleConfig()  # of sampling
    sampling: SamplingConfig = SamplingConfig(num_steps=24, cfg_scale=2.5)  # of previews, and the model's own
    init_from: str | None = None  # a pipeline: its encoder and CLIP stay, the rest is trained on

    def __post_init__(self):
        self.vae.model.token_grid(self.image_size, self.image_size)
        channels = autoencoder.PATCH**2 * self.vae.model.latent_channels
        if self.text_to_image.flux.in_channels != channels:
            raise ValueError(
                f"text_to_image.flux.in_channels={self.text_to_image.flux.in_channels}: a token is 2x2 latents of "
                f"vae.model.latent_channels={self.vae.model.latent_channels}, so {channels} are needed"
            )


def train(config: BaseConfig, workdir: str | os.PathLike) -> loop.Result:
    """Trains all stages, or resumes, in `workdir`, and writes the pipeline's folder FOLDER there.

    Returns the result of the last stage, or of the stage that a signal stopped.

    Raises:
      ValueError: a checkpoint of another config.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many updates in a row were not finite.
    """
    with only_writer(workdir) as path:
        stage = config.text_to_image
        tokenizers = make_tokenizers(scene_words(), stage.captions.text_length)
        networks = text_to_image.make_networks(stage, tokenizers, config.compute)
        scenes = corpus.rows(config.seed, "train", range(config.num_scenes), drawn=config.drawn)
        if config.init_from is not None:
            start = _load_start(config, networks, tokenizers)
            result = _train_vae(config, path / "vae", start.vae)
            if result.stopped_by is not None:
                return result
            part = replace(start.vae, params={**start.vae.params, **to_host(result.state.ema)})
            latents = _encode(config, part.params, scenes, path)
            weights = {name: to_host(getattr(start, name).params) for name in ("transformer", "t5", "clip")}
        else:
            result = _train_vae(config, path / "vae")
            if result.stopped_by is not None:
                return result
            vae_params = to_host(result.state.ema)
            result = _train_reading(config, path / "reading", networks, scenes, tokenizers)
            if result.stopped_by is not None:
                return result
            latents = _encode(config, vae_params, scenes, path)
            part = _scaled(Part(config.vae.model, vae_params), latents)
            weights = {name: to_host(result.state.params[name]) for name in ("t5", "clip", "words_head")}
        frozen = {"vae": part.params, "clip": weights.pop("clip")}
        data = Corpus(
            latents=np.asarray(autoencoder.to_latents(jnp.asarray(latents, jnp.float32), part.config)),
            layouts=_layouts(config, scenes, path),
            scenes=scenes,
            tokenizers=tokenizers,
            captions=stage.captions,
            batch_size=stage.training.batch_size,
            seed=config.seed,
        )

        def pipeline(params: Params) -> Pipeline:
            """What users load, of trained parts."""
            return Pipeline(
                transformer=Part(networks.transformer, params["transformer"]),
                vae=part,
                clip=Part(networks.clip, frozen["clip"]),
                t5=Part(networks.t5, params["t5"]),
                **tokenizers._asdict(),
                schedule=config.schedule,
                text_length=tokenizers.tokenizer_2.model_max_length,
                usual=UsualSampling(size=config.image_size, **vars(config.sampling)),
                compute=config.compute,
            )

        result = _train_text_to_image(config, path / "text_to_image", networks, weights, frozen, data, pipeline)
        if result.stopped_by is None and jax.process_index() == 0:
            trained = pipeline(to_host(result.state.ema))
            small = {name: _in_bfloat16(getattr(trained, name)) for name in PARTS if name != "vae"}
            replace(trained, **small).save_pretrained(path / FOLDER)
        return result


def _in_bfloat16(part: Part) -> Part:
    return replace(part, params=jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), part.params))


def _load_start(config: BaseConfig, networks: Networks, tokenizers: Tokenizers) -> Pipeline:
    """The pipeline that `init_from` names.

    Raises:
      ValueError: its networks or tokenizers are not this config's.
    """
    start = Pipeline.from_pretrained(config.init_from, compute=config.compute)
    scaled = replace(config.vae.model, **{name: getattr(start.vae.config, name) for name in SCALES})
    wanted = {"vae": scaled, **{name: getattr(networks, name) for name in ("transformer", "clip", "t5")}}
    for name, network in wanted.items():
        if getattr(start, name).config != network:
            raise ValueError(
                f"init_from {config.init_from}: its {name} is {getattr(start, name).config}, not {network}"
            )
    for name, tokenizer in tokenizers._asdict().items():
        if getattr(start, name).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"init_from {config.init_from}: its {name} has other tokens than this version's captions")
    return start


def _train_vae(config: BaseConfig, workdir: AnyPath, start: Part | None = None) -> loop.Result:
    """Trains the autoencoder, or the decoder of `start` alone."""
    batch_size = config.vae.training.batch_size
    frozen = {} if start is None else {"encoder": start.params["encoder"]}
    images = corpus.draw(corpus.scenes(config.seed, "validation", range(HELD_OUT)), config.image_size)

    def init() -> Params:
        params = vae.init_params(config.vae, config.seed)
        return {name: value for name, value in params.items() if name not in frozen}

    def rebuilt(params: Params) -> np.ndarray:
        return to_host(vae.reconstruct({**frozen, **params}, images, model=config.vae.model, compute=config.compute))

    def preview(params: Params, _: int) -> dict[str, np.ndarray]:
        both = images, rebuilt(params)
        rows = [list(pictures[start : start + 8]) for start in (0, 8, 16) for pictures in both]
        return {"reconstructions": image_grid(rows, row_labels=["scenes", "rebuilt"] * 3, scale=2)}

    return train_network(
        config.vae.training,
        workdir,
        resolved_config=config_lib.to_dict(config) | {"frozen": _prints(frozen)},
        dtype=config.compute.dtype,
        must_match=("vae", "seed", "image_size", "drawn", "frozen"),
        init=init,
        loss=functools.partial(vae.loss, frozen=frozen, config=config.vae, compute=config.compute, seed=config.seed),
        batches=lambda step: corpus.picture_batches(
            config.seed, config.image_size, batch_size, step, drawn=config.drawn
        ),
        preview=preview,
        evaluate=lambda params, _: {"psnr": vae.psnr(images, rebuilt(params))},
        start=None if start is None else {"decoder": to_host(start.params["decoder"])},
    )


def _prints(frozen: dict[str, Params]) -> dict[str, str]:
    """Fingerprints: files that a pipeline was read from may hold another one when the run is resumed."""
    return {name: fingerprint(params) for name, params in frozen.items()}


def _train_reading(
    config: BaseConfig, workdir: AnyPath, networks: Networks, scenes: corpus.Scenes, tokenizers: Tokenizers
) -> loop.Result:
    stage = config.text_to_image

    def init() -> Params:
        params = text_to_image.init_params(networks, config.seed)
        return {name: params[name] for name in text_to_image.READING}

    return train_network(
        stage.reading,
        workdir,
        resolved_config=config_lib.to_dict(config),
        dtype=config.compute.dtype,
        must_match=("seed", "num_scenes", "drawn", "text_to_image"),
        init=init,
        loss=functools.partial(text_to_image.reading_loss, networks=networks),
        batches=functools.partial(
            corpus.texts, scenes, tokenizers, stage.captions, stage.reading.batch_size, config.seed
        ),
    )


def _encode(config: BaseConfig, params: Params, scenes: corpus.Scenes, workdir: AnyPath) -> np.ndarray:
    """The autoencoder's means of the scenes [N, h, w, C], not scaled."""
    encode = functools.partial(vae.encode, params, model=config.vae.model, compute=config.compute)
    path = workdir / f"latents_{len(scenes)}_{config.drawn:g}_{fingerprint(params)[:12]}.npy"
    return corpus.cached(path, scenes, lambda some: encode(corpus.draw(some, config.image_size)))


def _scaled(part: Part, latents: np.ndarray) -> Part:
    """The autoencoder, which scales these latents to mean 0 and variance 1."""
    shift, spread = float(latents.mean(dtype=np.float64)), float(latents.std(dtype=np.float64))
    return replace(part, config=replace(part.config, shift_factor=shift, scaling_factor=1 / spread))


def _layouts(config: BaseConfig, scenes: corpus.Scenes, workdir: AnyPath) -> np.ndarray:
    """Layouts of the scenes [N, rows, columns, F]."""
    size = config.image_size
    grid = config.vae.model.token_grid(size, size)
    path = workdir / f"layouts_{len(scenes)}_{config.drawn:g}_{config.seed}_{size}.npy"
    return corpus.cached(path, scenes, lambda some: np.stack([layout(scene, size, grid) for scene in some]))


def _train_text_to_image(
    config: BaseConfig,
    workdir: AnyPath,
    networks: Networks,
    weights: Params,
    frozen: Params,
    data: Corpus,
    pipeline: Callable[[Params], Pipeline],
) -> loop.Result:
    captions = held_out_captions("validation", PREVIEWS)

    def preview(params: Params, _: int) -> dict[str, np.ndarray]:
        sides = {"height": config.image_size, "width": config.image_size}
        images = pipeline(params).generate(captions, **sides, **vars(config.sampling))
        return {"samples": captioned_grid(to_host(images), captions)}

    stage, clip = config.text_to_image, frozen["clip"]

    def init() -> Params:
        params = text_to_image.init_params(networks, config.seed)
        return {name: params[name] for name in text_to_image.DRAWING}

    return train_network(
        stage.training,
        workdir,
        resolved_config=config_lib.to_dict(config) | {"frozen": _prints(frozen)},
        dtype=config.compute.dtype,
        must_match=("seed", "image_size", "num_scenes", "drawn", "vae", "text_to_image", "frozen"),
        init=init,
        loss=functools.partial(text_to_image.loss, clip=clip, config=stage, networks=networks, seed=config.seed),
        batches=data.batches,
        preview=preview,
        variant=data.captions.is_pair_step,
        start=weights,
    )
