"""mini_scenes: procedural, captioned scenes with ground truth, as pure functions and as a TFDS dataset.

scene = sample_scene(np.random.default_rng(0))
image, mask = render_scene(scene, 64)
text = caption(scene, np.random.default_rng(1))
prepare("data", size=64)                       # then: tfds.data_source("mini_scenes/64", data_dir="data")
"""

from runtime_jax import lazy

__getattr__, __dir__, __all__ = lazy.attributes(
    __name__,
    {
        "mini_scenes.builder": ("PROBE", "MiniScenes", "MiniScenesConfig", "make_config", "prepare", "prepare_probe"),
        "mini_scenes.captions": ("caption", "full_caption"),
        "mini_scenes.examples": ("SPLITS", "example_scene"),
        "mini_scenes.pictures": ("example_image", "example_path"),
        "mini_scenes.render": ("Rendering", "render_scene"),
        "mini_scenes.scene": (
            "Background",
            "Light",
            "MAX_OBJECTS",
            "Scene",
            "SceneObject",
            "accent_of",
            "alone",
            "as_drawing",
            "in_a_row",
            "sample_color",
            "sample_scene",
        ),
        "mini_scenes.style": ("SHADED", "Style", "sample_style"),
        "mini_scenes.vocabulary": (
            "BACKGROUNDS",
            "CLASSES",
            "COLORS",
            "LIGHT_DIRECTIONS",
            "LIGHT_WARMTHS",
            "MENTION_RATES",
            "POSES",
            "SIZES",
            "SYMMETRY",
            "TEXTURES",
        ),
    },
)
