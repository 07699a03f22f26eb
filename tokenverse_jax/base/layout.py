"""The layout of a picture, an auxiliary target for a middle block of the transformer.

A diffusion transformer spends most of its training on finding representations, and is much faster when a middle block
is taught some (REPA, arXiv 2410.06940, with DINOv2's features). Here the renderer knows the truth. The head that
predicts it is trained with the transformer and then discarded.

Axes: B batch, H W image, h w grid of image tokens, N = h w, F features of a layout, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float, Float32

from mini_scenes import CLASSES, SYMMETRY, TEXTURES, Scene, SceneObject, render_scene

COVERS = len(CLASSES)  # the first features: how much of a token each class covers
OWNER = len(TEXTURES) + 12  # then: the object that covers most of a token, the light on it, and 1 if there is one
FEATURES = COVERS + OWNER
EPS = 1e-6


def layout(scene: Scene, size: int, grid: tuple[int, int]) -> Float32[np.ndarray, "h w F"]:
    """The layout of a scene's picture of `size` pixels. Features of the owner are 0 where there is no object."""
    _, mask = render_scene(scene, size)
    found = np.zeros((*grid, FEATURES), np.float32)
    most = np.zeros(grid)
    for number, item in enumerate(scene.objects, start=1):
        cover = reduce((mask == number).astype(np.float32), "(h y) (w x) -> h w", "mean", h=grid[0], w=grid[1])
        found[..., CLASSES.index(item.shape)] += cover
        is_owner = cover > most
        found[is_owner, COVERS:] = _owner(scene, item, grid)[is_owner]
        most = np.maximum(most, cover)
    return found


def _owner(scene: Scene, item: SceneObject, grid: tuple[int, int]) -> Float[np.ndarray, "h w F"]:
    """What is known of an object of the scene.

    Texture, rotation, colour, size, the light's side (0 without shading) and warmth, the offset of the token from the
    object's centre in units of its size, and 1.
    """
    rows, columns = np.meshgrid(*((np.arange(side) + 0.5) / side for side in grid), indexing="ij")
    turn = np.deg2rad(SYMMETRY[item.shape] * item.rotation)
    texture = [float(item.texture == name) for name in TEXTURES]
    azimuth, lit = np.deg2rad(scene.light.azimuth), float(scene.style.shading)
    light = [lit * np.cos(azimuth), lit * np.sin(azimuth), scene.light.warmth]
    same = [*texture, np.cos(turn), np.sin(turn), *(np.float32(item.rgb) / 127.5 - 1), 5 * item.size, *light]
    way = np.stack([columns - item.x, rows - item.y], axis=-1) / item.size
    return np.concatenate([np.broadcast_to(same, (*grid, len(same))), way, np.ones((*grid, 1))], axis=-1)


class LayoutHead(nn.Module):
    """Predicts layouts from image tokens in the middle of the transformer."""

    @nn.compact
    def __call__(self, img: Float[Array, "B N D"]) -> Float[Array, "B N F"]:
        img = img.astype(jnp.float32)
        img = img * jax.lax.rsqrt(jnp.mean(jnp.square(img), axis=-1, keepdims=True) + EPS)
        img = nn.gelu(nn.Dense(img.shape[-1], name="in_layer")(img), approximate=True)
        return nn.Dense(FEATURES, name="out_layer", kernel_init=nn.initializers.zeros)(img)


def layout_loss(predicted: Float[Array, "B N F"], truth: Float[Array, "B h w F"]) -> Float[Array, ""]:
    """Mean square error; the owner's features count only where there is one."""
    truth = rearrange(truth, "b h w f -> b (h w) f")
    error = jnp.square(predicted - truth)
    has_owner = truth[..., -1:]
    return jnp.mean(4 * jnp.sum(error[..., :COVERS], axis=-1) + jnp.sum(has_owner * error[..., COVERS:], axis=-1))
