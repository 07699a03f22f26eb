"""`tokenverse inspect`: the memory and FLOPs of a FLUX model and of learning on it, from configs alone."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.sharding import Mesh

from runtime_jax.cost import count_flops, size_rows, table
from runtime_jax.networks.clip import CLIP_L, CLIPTextEncoder
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import key_shape
from runtime_jax.sharding import sharded_shapes
from runtime_jax.training.program import Program
from tokenverse_jax.commands.learn import LearnRunConfig
from tokenverse_jax.concepts.concept_data import ROWS, Beside
from tokenverse_jax.concepts.learn import LearnConfig, LearnState, init_state, learn_step, make_optimizers
from tokenverse_jax.concepts.learner import make_program
from tokenverse_jax.flux import model_folder
from tokenverse_jax.flux.autoencoder import Autoencoder, AutoencoderConfig
from tokenverse_jax.flux.convert import init_shapes
from tokenverse_jax.flux.model import PRESETS, Flux, FluxConfig, param_shapes
from tokenverse_jax.flux.model_folder import KINDS, Params
from tokenverse_jax.flux.offsets import Offsets
from tokenverse_jax.flux.pipeline import PARTS, TEXT_LENGTH, PromptEncoding, run
from tokenverse_jax.flux.text_encoders.t5 import T5_XXL, T5Encoder

Grid = tuple[int, int]
WORD_TOKENS = (1, 2, 5)  # of the words whose size in a concept file is shown
CAPTION_TOKENS = 2 * ROWS  # of a caption, that can have a direction
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
    """The config of each part of "dev", "schnell", a folder or a hub id; needs no weights."""
    if model in PRESETS:
        return {"transformer": PRESETS[model], "vae": AutoencoderConfig(), "clip": CLIP_L, "t5": T5_XXL}
    folder = model_folder.fetch(model, ())
    return {part: model_folder.read_config(folder, part, ()) for part in PARTS}


def inspect(model: str, sizes: Sequence[int], learn: LearnConfig) -> str:
    """Tables of weights, of what `learn` trains, of concept files, and of a training step at each size in pixels.

    Raises:
      ValueError: no such model, or sizes that are impossible for it.
    """
    configs = read_configs(model)
    grids = {size: configs["vae"].token_grid(size, size) for size in sizes}
    flux = configs["transformer"]
    state = jax.eval_shape(functools.partial(init_state, learn, flux), key_shape())
    trained = {**state.params, "optimizer": state.opt_state, "train state in all": state}
    bytes_of_token = flux.width * (4 + 2 * flux.num_blocks)  # a float32 direction, and a bfloat16 one for every block
    words = [(f"{n} token{'s' * (n > 1)}", f"{n * bytes_of_token / 1e3:,.0f}") for n in WORD_TOKENS]
    steps = [row for size, grid in grids.items() for row in _step_rows(size, grid, flux, state, learn)]
    return "\n".join(
        [
            *table(("weights", "parameters", "GB, bfloat16"), size_rows(_weight_shapes(configs), 1e9, 3)),
            "",
            *table(("learned, float32", "numbers", "GB"), size_rows(trained, 1e9, 3)),
            "",
            *table(("concept file, a word of", "kB"), words),
            "",
            *table((f"step, batch of {learn.batch_size}", *STEP_COLUMNS), steps),
        ]
    )


def _weight_shapes(configs: dict[str, Any]) -> dict[str, Any]:
    """Shapes of every part's parameters, by name."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    trees = {
        "clip": init_shapes(CLIPTextEncoder(configs["clip"]), ids),
        "t5": init_shapes(T5Encoder(configs["t5"]), ids),
        "transformer": param_shapes(configs["transformer"]),
        "vae": _vae_shapes(configs["vae"]),
    }
    return _in_bfloat16(trees)


def _in_bfloat16(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE), shapes)


def _step_rows(size: int, grid: Grid, flux: FluxConfig, state: LearnState, learn: LearnConfig) -> list[tuple[str, ...]]:
    """A step of the second stage, and one that also has the isolation loss, on a pair of images side by side."""
    module, weights = _module(flux, remat=True), _in_bfloat16(param_shapes(flux))
    images = [_inputs(columns, flux, learn.batch_size) for columns in (grid, (grid[0], 2 * grid[1]))]
    forward = jax.make_jaxpr(lambda weights, inputs: module.apply({"params": weights}, **inputs))
    flops = [count_flops(forward(weights, inputs).jaxpr) / 1e12 for inputs in images]
    kept, without_remat = (
        [_kept_bytes(flux, inputs, remat=remat) / 1e9 for inputs in images] for remat in (True, False)
    )
    blocks = [_block_bytes(flux, inputs) / 1e9 for inputs in images]
    optimizer = make_optimizers(learn)[-1]
    step = functools.partial(learn_step, config=learn, flux=module, optimizer=optimizer, stage=2, grid=grid)
    rows = []
    for name, used in ((f"{size} px", 1), (f"{size} px, isolated", 2)):
        jaxpr = jax.make_jaxpr(step)(state, weights, _batch(images[:used], learn)).jaxpr
        numbers = [sum(flops[:used]), count_flops(jaxpr) / 1e12]
        numbers += [sum(kept[:used]), max(blocks[:used]), sum(without_remat[:used])]
        tokens = sum(inputs["img"].shape[1] for inputs in images[:used])
        rows.append((name, f"{tokens:,}", *(f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in numbers)))
    return rows


def _module(flux: FluxConfig, *, remat: bool) -> Flux:
    return Flux(flux, Compute(dtype="bfloat16", remat=remat))


def _inputs(grid: Grid, flux: FluxConfig, batch_size: int) -> dict[str, Any]:
    """Shapes of the transformer's inputs, with directions for the first tokens of the text."""
    tokens, text = grid[0] * grid[1], TEXT_LENGTH[flux.guidance_embeds]
    shapes = {
        "img": (batch_size, tokens, flux.in_channels),
        "img_ids": (tokens, 3),
        "txt": (batch_size, text, flux.joint_attention_dim),
        "txt_ids": (text, 3),
        "timesteps": (batch_size,),
        "vec": (batch_size, flux.pooled_projection_dim),
    }
    if flux.guidance_embeds:
        shapes["guidance"] = (batch_size,)
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return structs | {"offsets": _offsets(flux, batch_size)}


def _offsets(flux: FluxConfig, batch_size: int) -> Offsets:
    """Shapes of a caption's directions, per block too."""
    shared, per_block = (
        (batch_size, CAPTION_TOKENS, flux.width),
        (batch_size, flux.num_blocks, CAPTION_TOKENS, flux.width),
    )
    return Offsets(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (shared, per_block)))


def batch_shapes(grid: Grid, flux: FluxConfig, learn: LearnConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `learn_step`'s batch without the isolation loss."""
    return _batch([_inputs(grid, flux, learn.batch_size)], learn)


def _batch(images: Sequence[dict[str, Any]], learn: LearnConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `learn_step`'s batch, from those of an image and maybe a pair."""
    own = {"latents": "img", "noise": "img", "times": "timesteps", "txt": "txt", "vec": "vec"}
    batch = {name: images[0][source] for name, source in own.items()}
    batch["mask"] = jax.ShapeDtypeStruct((learn.batch_size, CAPTION_TOKENS), jnp.bool_)
    if len(images) == 1:
        return batch
    pair = {"pair_noise": "img", "pair_txt": "txt", "pair_vec": "vec"}
    batch |= {name: images[1][source] for name, source in pair.items()} | {"pool_latents": batch["latents"]}
    return batch | {
        "on_right": jax.ShapeDtypeStruct((learn.batch_size,), jnp.bool_),
        "pair_rows": jax.ShapeDtypeStruct((learn.batch_size, PAIR_TOKENS), jnp.int32),
    }


def abstract_step(config: LearnRunConfig, mesh: Mesh) -> tuple[Program, dict[str, Any], tuple[int, Beside, Grid]]:
    """The program of a run without weights, the shapes of a batch, and the variant of its costliest step."""
    configs, learn = read_configs(config.model), config.learn
    flux, grid = configs["transformer"], configs["vae"].token_grid(config.size, config.size)
    frozen = _placed("transformer", param_shapes(flux), config.dtype, mesh)
    images = [_inputs(grid, flux, learn.batch_size)]
    if learn.isolation:
        images.append(_inputs((grid[0], 2 * grid[1]), flux, learn.batch_size))
    program = make_program(Flux(flux, config.compute), learn, mesh, frozen, runs=config.runs, at_once=config.at_once)
    batch = _batch(images, learn)
    if config.runs is not None:
        batch = {name: leaf.update(shape=(leaf.shape[0], config.runs, *leaf.shape[1:])) for name, leaf in batch.items()}
    return program, batch, (2 if learn.stage_2.steps else 1, "pool" if len(images) == 2 else "nothing", grid)


def trace_generate(config: LearnRunConfig, mesh: Mesh, batch_size: int) -> tuple[tuple[Params, Params], Any]:
    """Shapes of transformer and autoencoder on a mesh, and the traced program that draws a run's prompts."""
    configs, sampling = read_configs(config.model), config.sampling
    flux, vae = configs["transformer"], configs["vae"]
    grid = vae.token_grid(config.size, config.size)
    params = (
        _placed("transformer", param_shapes(flux), config.dtype, mesh),
        _placed("vae", _vae_shapes(vae), config.dtype, mesh),
    )
    inputs = _inputs(grid, flux, batch_size)
    prompts, negative = PromptEncoding(inputs["txt"], inputs["vec"]), None
    if sampling.cfg_scale != 1.0:
        negative = PromptEncoding(*(leaf.update(shape=(1, *leaf.shape[1:])) for leaf in prompts))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    traced = run.trace(
        params,
        prompts,
        negative,
        key_shape(),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        jax.ShapeDtypeStruct((sampling.num_steps + 1,), jnp.float32),
        scalar if flux.guidance_embeds else None,
        scalar,
        inputs["offsets"],
        modules=(Flux(flux, config.compute), Autoencoder(vae, config.compute)),
        grid=grid,
    )
    return params, traced


def _placed(part: str, shapes: Params, dtype: str, mesh: Mesh) -> Params:
    shapes = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), shapes)
    return sharded_shapes(shapes, KINDS[part].rules, mesh)


def _vae_shapes(config: AutoencoderConfig) -> Params:
    side = config.downsampling
    return init_shapes(Autoencoder(config), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def _kept_bytes(flux: FluxConfig, inputs: dict[str, Any], *, remat: bool) -> int:
    """Bytes that the forward pass keeps for the gradient with respect to the directions, without weights and inputs."""
    module, weights = _module(flux, remat=remat), _in_bfloat16(param_shapes(flux))

    def residuals(weights: Any, learned: Any, inputs: Any) -> Any:
        """The arrays in the backward pass's closure."""
        return jax.vjp(lambda learned: module.apply({"params": weights}, **inputs, offsets=learned), learned)[1]

    rest = {name: shape for name, shape in inputs.items() if name != "offsets"}
    jaxpr = jax.make_jaxpr(residuals)(weights, inputs["offsets"], rest).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {var for var in jaxpr.outvars if isinstance(var, jex.core.Var) and var not in given}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)


def _block_bytes(flux: FluxConfig, inputs: dict[str, Any]) -> int:
    """The most that the backward pass of one block recomputes at once under remat."""

    def kept(double: int, single: int) -> int:
        small = replace(flux, num_layers=double, num_single_layers=single)
        return _kept_bytes(small, inputs | {"offsets": _offsets(small, inputs["img"].shape[0])}, remat=False)

    return max(kept(2, 1), kept(1, 2)) - kept(1, 1)
