"""Evaluates the judge: its readings of held-out scenes, clean and degraded, against the ground truth."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mini_scenes import SYMMETRY, Rendering, Scene, caption, example_scene, render_scene
from mini_scenes.judge.captions import accuracies, compare, parse_caption
from mini_scenes.judge.color import color_difference
from mini_scenes.judge.judge import Judge, Seen
from mini_scenes.judge.train import blur
from mini_scenes.scene import SceneObject
from runtime_jax.estimate import Estimate, estimate
from runtime_jax.files import write_text
from runtime_jax.pictures import image_grid, save_png
from runtime_jax.prng import Stream, host_rng

Images = UInt8[np.ndarray, "N H W 3"]
SIZE = 64
UNITS = {
    "colour distance": "ΔE",
    "rotation error": "degrees",
    "warmth error": "of 2",
    "light direction error": "degrees",
}


def soft(sigma: float) -> Callable[[Images], Images]:
    """A function that blurs with a Gaussian of `sigma` pixels."""
    return lambda images: np.asarray(blur(jnp.asarray(images, jnp.float32), sigma) + 0.5).astype(np.uint8)


def noisy(images: Images) -> Images:
    """Adds Gaussian noise with a standard deviation of 6 of 255 levels."""
    noise = host_rng(0, Stream.EVAL).normal(0, 6, images.shape)
    return np.clip(images + noise + 0.5, 0, 255).astype(np.uint8)


def halved(images: Images) -> Images:
    """Resizes to half the side and back."""
    side = images.shape[1]
    sizes = ((side // 2, Image.Resampling.BOX), (side, Image.Resampling.BICUBIC))
    out = []
    for image in map(Image.fromarray, images):
        for size, how in sizes:
            image = image.resize((size, size), how)
        out.append(np.asarray(image))
    return np.stack(out)


DAMAGES: dict[str, Callable[[Images], Images]] = {
    "as drawn": lambda images: images,
    "blur 0.7 px": soft(0.7),
    "blur 1.2 px": soft(1.2),
    "noise 6/255": noisy,
    "halved and enlarged": halved,
}


def measure(scenes: Sequence[Scene], drawn: Sequence[Rendering], seen: Sequence[Seen]) -> dict[str, Estimate]:
    """Measurements against the ground truth: shares of objects or scenes, and mean errors in the units of UNITS.

    Each true object is matched to the seen region with the largest overlap. If no region overlaps enough, the object
    is missed and all its attributes count as wrong. Errors are averaged over objects found with the right class.
    """
    values: dict[str, list[float]] = {}

    def note(name: str, value: float | bool | np.ndarray | np.generic) -> None:
        values.setdefault(name, []).append(float(value))

    for scene, (_, mask), view in zip(scenes, drawn, seen, strict=True):
        note("right number of objects", len(view.scene.objects) == len(scene.objects))
        for i, item in enumerate(scene.objects, start=1):
            _compare_object(item, mask == i, view, note)
        light, other = scene.light, view.scene.light
        note("background", view.scene.background.kind == scene.background.kind)
        note("light's warmth", other.warmth_name == light.warmth_name)
        note("light's direction", other.direction_name == light.direction_name)
        note("warmth error", abs(other.warmth - light.warmth))
        note("light direction error", abs(other.azimuth - light.azimuth))
    return {name: estimate(column) for name, column in values.items()}


def _compare_object(item: SceneObject, mask: np.ndarray, view: Seen, note: Callable[[str, float], None]) -> None:
    overlaps = [(mask & other).sum() / (mask | other).sum() for other in view.masks]
    best = int(np.argmax(overlaps)) if overlaps else None
    there = view.scene.objects[best] if best is not None and overlaps[best] > 0.3 else None
    right = there is not None and there.shape == item.shape
    note("object class", right)
    note("colour name", right and there.color == item.color)
    note("texture", right and there.texture == item.texture)
    if item.size_name != "medium":
        note("size name", right and there.size_name == item.size_name)
    if item.pose:
        note("pose", right and there.pose == item.pose)
    if right:
        note("overlap of regions", overlaps[best])
        note("colour distance", color_difference(there.rgb, item.rgb))
        if order := SYMMETRY[item.shape]:
            turn = 360 / order
            note("rotation error", abs((there.rotation - item.rotation + turn / 2) % turn - turn / 2))


def report(judge: Judge, num_images: int, out: Path) -> None:
    """Prints a table and writes summary.md and judge.png, which shows images above renderings of what the judge saw."""
    # The test images of mini_scenes (seed 0); training draws its scenes from other random streams.
    scenes = [example_scene(0, "test", i)[0] for i in range(num_images)]
    drawn = [render_scene(scene, SIZE) for scene in scenes]
    images = np.stack([image for image, _ in drawn])
    captions = [parse_caption(caption(scene, host_rng(0, Stream.EVAL, i))) for i, scene in enumerate(scenes)]
    columns, seen = {}, {}
    for name, damage in DAMAGES.items():
        seen[name] = judge.look(damage(images))
        columns[name] = measure(scenes, drawn, seen[name])
        verdicts = [compare(want, one.scene) for want, one in zip(captions, seen[name], strict=True)]
        columns[name]["caption followed"] = accuracies(verdicts)["all"]
    text = _table(columns)
    print(text)
    write_text(out / "summary.md", text)
    rows = []
    for name in ("as drawn", "blur 1.2 px"):
        damaged = DAMAGES[name](images[:10])
        rows += [list(damaged), [render_scene(one.scene, SIZE).image for one in seen[name][:10]]]
    labels = ["as drawn", "as seen", "blur 1.2 px", "as seen"]
    save_png(out / "judge.png", image_grid(rows, row_labels=labels, scale=2))
    print(f"summary.md and judge.png are in {out}")


def _table(columns: dict[str, dict[str, Estimate]]) -> str:
    lines = [f"| measurement | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in next(iter(columns.values())):
        cells = [column[name] for column in columns.values()]
        if name in UNITS:
            shown = [f"{cell:.2f}" for cell in cells]
        else:
            shown = [f"{100 * cell.mean:.1f} ± {100 * cell.half_width:.1f} %" for cell in cells]
        unit = f", {UNITS[name]}" if name in UNITS else ""
        lines.append(f"| {name}{unit} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
