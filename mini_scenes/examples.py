"""Makes the examples of a split as plain records, in this process or in several worker processes."""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mini_scenes.captions import caption, full_caption
from mini_scenes.render import render_scene
from mini_scenes.scene import Scene, SceneObject, alone, portrait, sample_scene

SPLITS = ("train", "validation", "test")


def example_scene(seed: int, split: str, index: int, single: bool = False, centred: bool = True) -> tuple[Scene, str]:
    """Scene and caption number `index` of a split, a pure function of the arguments.

    `single`: only the main object, as `scene.alone` places it, or a `scene.portrait` of it if not `centred`.
    """
    scene_rng, caption_rng = (np.random.default_rng([seed, SPLITS.index(split), index, part]) for part in (0, 1))
    scene = sample_scene(scene_rng)
    if single:
        scene = (alone if centred else portrait)(scene, scene_rng)
    return scene, caption(scene, caption_rng)


def make_example(
    seed: int, split: str, index: int, size: int, single: bool = False, centred: bool = True
) -> dict[str, Any]:
    """One record in the form of the TFDS features; image and mask are PNG bytes."""
    scene, text = example_scene(seed, split, index, single, centred)
    image, mask = render_scene(scene, size)
    return {
        "image": _png(image),
        "mask": _png(mask),
        "label": scene.label,
        "caption": text,
        "full_caption": full_caption(scene),
        "scene": scene.to_json(),
        "background": scene.background.kind,
        "light": vars(scene.light),
        "objects": [_attributes(item) for item in scene.objects],
    }


def make_examples(
    seed: int, split: str, count: int, size: int, num_workers: int, single: bool = False, centred: bool = True
) -> Iterator[dict[str, Any]]:
    """Examples 0 to count - 1 in order; worker k of n makes examples k, k + n, k + 2n, ...

    Raises:
        RuntimeError: a worker died.
    """
    if num_workers < 2:
        yield from (make_example(seed, split, index, size, single, centred) for index in range(count))
        return
    # Subprocesses instead of multiprocessing: forking is unsafe once JAX has started threads, and spawning would run
    # the caller's script a second time.
    workers = [_start(seed, split, first, count, num_workers, size, single, centred) for first in range(num_workers)]
    try:
        for index in range(count):
            yield _receive(workers[index % num_workers])
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _start(*job: Any) -> subprocess.Popen:
    program = f"from {__name__} import write_examples; write_examples(*{job!r})"
    # The worker must find the package where this process found it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)


def _receive(worker: subprocess.Popen) -> dict[str, Any]:
    try:
        return pickle.load(worker.stdout)
    except EOFError as error:
        raise RuntimeError(f"a mini_scenes worker ended early with exit code {worker.wait()}") from error


def write_examples(
    seed: int, split: str, first: int, count: int, step: int, size: int, single: bool, centred: bool
) -> None:
    """Main function of a worker: pickles examples first, first + step, ... to standard output."""
    for index in range(first, count, step):
        pickle.dump(make_example(seed, split, index, size, single, centred), sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _attributes(item: SceneObject) -> dict[str, Any]:
    fields = {key: value for key, value in vars(item).items() if key != "accent"}
    return {**fields, "rgb": np.array(item.rgb, np.uint8)}


def _png(image: np.ndarray) -> bytes:
    """Encodes PNG here because TFDS would use TensorFlow. Compression is light, since encoding is the slowest step."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()
