"""mini_scenes: procedural, captioned scenes with ground truth, as pure functions and as a TFDS dataset.

scene = sample_scene(np.random.default_rng(0))
image, mask = render_scene(scene, 64)
text = caption(scene, np.random.default_rng(1))
prepare("data", size=64)                       # then: tfds.data_source("mini_scenes/64", data_dir="data")
"""

from runtime_jax.data.mini_scenes.builder import (
    MiniScenes,
    MiniScenesConfig,
    make_config,
    prepare,
)
from runtime_jax.data.mini_scenes.captions import caption, full_caption
from runtime_jax.data.mini_scenes.examples import SPLITS, example_scene
from runtime_jax.data.mini_scenes.render import Rendering, render_scene
from runtime_jax.data.mini_scenes.scene import (
    MAX_OBJECTS,
    Background,
    Light,
    Scene,
    SceneObject,
    accent_of,
    alone,
    in_a_row,
    sample_color,
    sample_scene,
)
from runtime_jax.data.mini_scenes.vocabulary import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    LIGHT_DIRECTIONS,
    LIGHT_WARMTHS,
    MENTION_RATES,
    POSES,
    SIZES,
    SYMMETRY,
    TEXTURES,
)

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "COLORS",
    "LIGHT_DIRECTIONS",
    "LIGHT_WARMTHS",
    "MAX_OBJECTS",
    "MENTION_RATES",
    "POSES",
    "SIZES",
    "SPLITS",
    "SYMMETRY",
    "TEXTURES",
    "Background",
    "Light",
    "MiniScenes",
    "MiniScenesConfig",
    "Rendering",
    "Scene",
    "SceneObject",
    "accent_of",
    "alone",
    "caption",
    "example_scene",
    "full_caption",
    "in_a_row",
    "make_config",
    "prepare",
    "render_scene",
    "sample_color",
    "sample_scene",
]
