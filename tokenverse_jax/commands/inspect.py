"""`tokenverse inspect`: what a FLUX model and learning on it take, from configs alone."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend as jex
import jax.numpy as jnp

from runtime_jax.cost import count, count_flops, size_of, table
from runtime_jax.nn.compute import Compute
from tokenverse_jax.concepts.concept_data import ROWS
from tokenverse_jax.concepts.learn import LearnConfig, LearnState, init_state, learn_step, make_optimizers
from tokenverse_jax.flux import autoencoder, model_folder
from tokenverse_jax.flux.autoencoder import Autoencoder, AutoencoderConfig
from tokenverse_jax.flux.model import PRESETS, Flux, FluxConfig, param_shapes
from tokenverse_jax.flux.offsets import Offsets
from tokenverse_jax.flux.pipeline import PARTS, TEXT_LENGTH
from tokenverse_jax.flux.text_encoders.clip import CLIP_L, CLIPTextEncoder
from tokenverse_jax.flux.text_encoders.t5 import T5_XXL, T5Encoder

Grid = tuple[int, int]
WORD_TOKENS = (1, 2, 5)  # of the words whose size in a concept file is shown
CAPTION_TOKENS = 2 * ROWS  # that can have a direction: a caption beside another one's
PAIR_TOKENS = 4 * ROWS  # the same in a merged caption
DTYPE = jnp.bfloat16  # of weights and matmuls
STEP_COLUMNS = (
    "image tokens",
    "forward, TFLOP",
    "step, TFLOP",
    "kept for backward, GB",
    "one block recomputed, GB",
    "kept without remat, GB",
)


def read_configs(model: str) -> dict[str, Any]:
    """The config of each part of "dev" or "schnell", or of a folder or hub id, whose weights need not be there."""
    if model in PRESETS:
        return {"transformer": PRESETS[model], "vae": AutoencoderConfig(), "clip": CLIP_L, "t5": T5_XXL}
    folder = model_folder.fetch(model, ())
    return {part: model_folder.read_config(folder, part, ()) for part in PARTS}


def weight_shapes(configs: dict[str, Any]) -> dict[str, Any]:
    """Shapes of every part's parameters."""

    def shapes(module: nn.Module, *example: Any) -> Any:
        return jax.eval_shape(module.init, jax.random.key(0), *example)["params"]

    ids, side = jax.ShapeDtypeStruct((1, 1), jnp.int32), autoencoder.PATCH * configs["vae"].downsampling
    trees = {
        "transformer": param_shapes(configs["transformer"]),
        "t5": shapes(T5Encoder(configs["t5"]), ids),
        "clip": shapes(CLIPTextEncoder(configs["clip"]), ids),
        "vae": shapes(Autoencoder(configs["vae"]), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
    }
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE), trees)


def inspect(model: str, sizes: Sequence[int], learn: LearnConfig) -> str:
    """Tables of weights, of what `learn` trains, of concept files, and of a training step at each size in pixels.

    Raises:
      ValueError: no such model, or sizes that are not possible for it.
    """
    configs = read_configs(model)
    grids = {size: configs["vae"].token_grid(size, size) for size in sizes}
    weights, flux = weight_shapes(configs), configs["transformer"]
    state = jax.eval_shape(functools.partial(init_state, learn, flux), jax.random.key(0))
    rows = [(name, f"{count(tree):,}", f"{size_of(tree) / 1e9:.3f}") for name, tree in weights.items()]
    return "\n".join(
        [
            *table(("weights", "parameters", "GB, bfloat16"), rows),
            "",
            *table(("learned, float32", "numbers", "GB"), _state_rows(state)),
            "",
            *table(("concept file, a word of", "kB"), _file_rows(flux)),
            "",
            *table(
                (f"step, batch of {learn.batch_size}", *STEP_COLUMNS),
                [row for size, grid in grids.items() for row in _step_rows(size, grid, flux, state, learn)],
            ),
        ]
    )


def _state_rows(state: LearnState) -> list[tuple[str, ...]]:
    parts = {**state.params, "optimizer": state.opt_state, "train state in all": state}
    return [(name, f"{count(tree):,}", f"{size_of(tree) / 1e9:.3f}") for name, tree in parts.items()]


def _file_rows(flux: FluxConfig) -> list[tuple[str, ...]]:
    """A float32 direction and bfloat16 ones for every block, for each token."""
    bytes_of_token = flux.width * (4 + 2 * flux.num_blocks)
    return [(f"{n} token{'s' * (n > 1)}", f"{n * bytes_of_token / 1e3:,.0f}") for n in WORD_TOKENS]


class _Cost(NamedTuple):
    """What one image, or a pair of images side by side, takes in a step; all but the first in bytes."""

    forward_flops: float
    kept: int  # for the backward pass
    block: int
    kept_without_remat: int


def _step_rows(size: int, grid: Grid, flux: FluxConfig, state: LearnState, learn: LearnConfig) -> list[tuple[str, ...]]:
    """A step of the second stage, and one that also has the isolation loss, on a pair of images side by side."""
    images = [_inputs(columns, flux, learn.batch_size) for columns in (grid, (grid[0], 2 * grid[1]))]
    costs = [_cost(flux, inputs) for inputs in images]
    rows = []
    for name, used in ((f"{size} px", 1), (f"{size} px, isolated", 2)):
        numbers = [
            sum(cost.forward_flops for cost in costs[:used]) / 1e12,
            _step_flops(images[:used], grid, flux, state, learn) / 1e12,
            sum(cost.kept for cost in costs[:used]) / 1e9,
            max(cost.block for cost in costs[:used]) / 1e9,
            sum(cost.kept_without_remat for cost in costs[:used]) / 1e9,
        ]
        tokens = sum(inputs["img"].shape[1] for inputs in images[:used])
        rows.append((name, f"{tokens:,}", *(f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in numbers)))
    return rows


def _cost(flux: FluxConfig, inputs: dict[str, Any]) -> _Cost:
    module = _module(flux, remat=True)
    forward = jax.make_jaxpr(lambda weights, inputs: module.apply({"params": weights}, **inputs))
    flops = count_flops(forward(_transformer_shapes(flux), inputs).jaxpr)
    kept = {remat: kept_bytes(flux, inputs, remat=remat) for remat in (True, False)}
    return _Cost(flops, kept[True], block_bytes(flux, inputs), kept[False])


def _step_flops(
    images: Sequence[dict[str, Any]], grid: Grid, flux: FluxConfig, state: LearnState, learn: LearnConfig
) -> float:
    step = functools.partial(
        learn_step,
        config=learn,
        flux=_module(flux, remat=True),
        optimizer=make_optimizers(learn)[-1],
        stage=2,
        grid=grid,
    )
    return count_flops(jax.make_jaxpr(step)(state, _transformer_shapes(flux), _batch(images, learn)).jaxpr)


def _module(flux: FluxConfig, *, remat: bool) -> Flux:
    return Flux(flux, Compute(dtype="bfloat16", remat=remat))


def _transformer_shapes(flux: FluxConfig) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE), param_shapes(flux))


def _inputs(grid: Grid, flux: FluxConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the transformer's inputs, with directions for the first tokens of the text."""
    tokens, text = grid[0] * grid[1], TEXT_LENGTH[flux.guidance_embeds]
    shapes = {
        "img": (batch_size, tokens, flux.in_channels),
        "img_ids": (tokens, 3),
        "txt": (batch_size, text, flux.joint_attention_dim),
        "txt_ids": (text, 3),
        "timesteps": (batch_size,),
        "vec": (batch_size, flux.pooled_projection_dim),
        "guidance": (batch_size,),
    }
    if not flux.guidance_embeds:
        del shapes["guidance"]
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return structs | {"offsets": _offsets(flux, batch_size)}


def _offsets(flux: FluxConfig, batch_size: int) -> Offsets:
    """Shapes of a caption's directions, per block too."""
    last = CAPTION_TOKENS, flux.width
    return Offsets(
        shared=jax.ShapeDtypeStruct((batch_size, *last), jnp.float32),
        per_block=jax.ShapeDtypeStruct((batch_size, flux.num_blocks, *last), jnp.float32),
    )


def _batch(images: Sequence[dict[str, Any]], learn: LearnConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `learn_step`'s batch, from those of an image and maybe a pair."""
    mask = jax.ShapeDtypeStruct((learn.batch_size, CAPTION_TOKENS), jnp.bool_)
    own = {"latents": "img", "noise": "img", "times": "timesteps", "txt": "txt", "vec": "vec"}
    batch = {name: images[0][source] for name, source in own.items()} | {"mask": mask}
    if len(images) == 1:
        return batch
    pair = {"pair_noise": "img", "pair_txt": "txt", "pair_vec": "vec"}
    batch |= {name: images[1][source] for name, source in pair.items()} | {"pool_latents": batch["latents"]}
    return batch | {
        "on_right": jax.ShapeDtypeStruct((learn.batch_size,), jnp.bool_),
        "pair_rows": jax.ShapeDtypeStruct((learn.batch_size, PAIR_TOKENS), jnp.int32),
    }


def kept_bytes(flux: FluxConfig, inputs: dict[str, Any], *, remat: bool) -> int:
    """Bytes that the forward pass keeps for the gradient with respect to the directions, weights and inputs apart."""
    module, weights = _module(flux, remat=remat), _transformer_shapes(flux)
    learned = inputs["offsets"]
    inputs = {name: shape for name, shape in inputs.items() if name != "offsets"}

    def residuals(weights: Any, inputs: Any, learned: Any) -> Any:
        """The arrays in the backward pass's closure."""
        return jax.vjp(lambda learned: module.apply({"params": weights}, **inputs, offsets=learned), learned)[1]

    jaxpr = jax.make_jaxpr(residuals)(weights, inputs, learned).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {var for var in jaxpr.outvars if isinstance(var, jex.core.Var) and var not in given}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)


def block_bytes(flux: FluxConfig, inputs: dict[str, Any]) -> int:
    """The most that the backward pass of one block has to recompute at once under remat."""

    def kept(double: int, single: int) -> int:
        small = replace(flux, num_layers=double, num_single_layers=single)
        return kept_bytes(small, inputs | {"offsets": _offsets(small, inputs["img"].shape[0])}, remat=False)

    return max(kept(2, 1), kept(1, 2)) - kept(1, 1)
