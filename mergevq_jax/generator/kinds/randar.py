"""RandAR (arXiv 2412.01827) over merged tokens: codes in random order, each after a token that gives its position.

The sequence is the prefix, then for each of the K distinct tokens a position instruction and the code, both with the
rotary position of the token. The instruction is one learned vector, rotated to the position; the trunk's output there
predicts the code. A token that stands for a group has the raster position of the group's first member.

The model does not predict the positions of an image's codes: the sampler gives them (see `positions`). Source recovery
then assigns raster tokens to the codes (paper section 3.3).

Axes: B batch, L raster tokens, K distinct tokens, P prefix tokens, N = P + 2 K - 1 positions, D width.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.losses import Means, code_loss, conditions
from mergevq_jax.generator.mask import causal_mask
from mergevq_jax.generator.transformer import Generator, Params, rope_table
from mergevq_jax.tokenizer import tome
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key


class Codes(NamedTuple):
    """Distinct codes and their positions, in the order of generation."""

    indices: Int[Array, "B K"]
    positions: Int[Array, "B K"]  # raster positions


def merged_codes(indices: Int[Array, "B L"], source_map: Int[Array, "B L"], keep: int) -> Codes:
    """The K = `keep` groups of a tokenized image, in the order of the source map.

    Args:
      indices: the code at every raster token.
      source_map: the group of every raster token, all of 0 to K - 1.
    """
    positions = tome.group_starts(source_map, keep)
    return Codes(jnp.take_along_axis(indices, positions, axis=1), positions)


def shuffled(codes: Codes, keys: Key[Array, "B"]) -> Codes:
    """The codes in a random order, by each example's own key."""
    order = jax.vmap(lambda key: jax.random.permutation(key, codes.indices.shape[1]))(keys)
    return Codes(*(jnp.take_along_axis(part, order, axis=1) for part in codes))


def rope_rows(positions: Int[Array, "B n"], config: GeneratorConfig) -> Float[Array, "2 B n pairs"]:
    """Rows of the rope table for raster positions."""
    return jnp.asarray(rope_table(config)[:, config.prefix :])[:, positions]


def alternating(first: Float[Array, "B n D"], second: Float[Array, "B n D"]) -> Float[Array, "B 2*n D"]:
    """first 0, second 0, first 1, second 1, ..."""
    return rearrange(jnp.stack([first, second], axis=2), "b n two d -> b (n two) d")


def randar_logits(
    params: Params,
    codes: Codes,
    labels: Int[Array, "B"],
    merge: Int[Array, "B"] | None = None,
    *,
    config: GeneratorConfig,
    compute: Compute = Compute(),
) -> tuple[Float[Array, "B K values"], ...]:
    """Logits of every sub-token of every code, from the codes before it and its own position; as `Generator`.

    Raises:
      ValueError: this generator has no position instruction, or a merge instruction is missing or not known.
    """
    check_randar(config)
    apply = functools.partial(Generator(config, compute).apply, {"params": params})
    rope = rope_rows(codes.positions, config)
    asked, known = apply(rope, method=Generator.embed_positions), apply(codes.indices, method=Generator.embed_codes)
    prefix = apply(labels, merge, method=Generator.embed_prefix)
    x = jnp.concatenate([prefix, alternating(asked, known)[:, :-1]], axis=1)  # the last code predicts nothing
    rope = jnp.concatenate([prefix_rope(config, len(labels)), jnp.repeat(rope, 2, axis=2)[:, :, :-1]], axis=2)
    hidden = apply(x, rope, causal_mask(x.shape[1]), method=Generator.trunk)
    return apply(hidden[:, config.prefix :: 2], codes.indices, method=Generator.predict)


def prefix_rope(config: GeneratorConfig, batch: int) -> Float[Array, "2 B P pairs"]:
    """Rows of the rope table for the prefix of every example."""
    table = jnp.asarray(rope_table(config)[:, None, : config.prefix])
    return jnp.broadcast_to(table, (2, batch, *table.shape[2:]))


def check_randar(config: GeneratorConfig) -> None:
    """Raises ValueError for a generator without position instruction."""
    if not config.position_instruction:
        raise ValueError(
            "this generator has no position instruction (position_instruction): it draws in raster order only"
        )


def randar_loss(
    params: Params,
    batch: Mapping[str, Array],
    key: Key[Array, ""] | None,
    *,
    config: GeneratorConfig,
    compute: Compute,
    keep: int,
) -> tuple[Float[Array, ""], Means]:
    """Teacher forcing of the K = `keep` codes, in an order that is drawn for every example.

    Args:
      batch: "indices" [B, L], the code at every raster token, "source_map" [B, L], "label" and "example" [B].
      key: of the order and of the class dropout, with each example's index; None: always the same order, no dropout.
      keep: distinct tokens of every example, and their merge instruction where the generator has one.
    """
    labels, merge = conditions(batch, key, config, keep)
    keys = example_keys(stream_key(0, Stream.ORDER) if key is None else key, batch["example"])
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, int(Stream.ORDER))  # not those of the dropout
    codes = shuffled(merged_codes(batch["indices"], batch["source_map"], keep), keys)
    logits = randar_logits(params, codes, labels, merge, config=config, compute=compute)
    return code_loss(logits, codes.indices, config)
