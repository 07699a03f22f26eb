"""A small benchmark of mini_scenes in DreamBench++'s layout, whose words the model `tiny` knows."""

import os

import numpy as np

from mini_scenes import BACKGROUNDS, CLASSES, render_scene
from runtime_jax.files import path_of, replacing, write_json, write_text
from runtime_jax.pictures import jpeg, save_png
from tokenverse_jax.bench.cases import ConceptImage, make_cases, make_images
from tokenverse_jax.evaluate.benchmark import EXTRA

TASKS = ("composition", "decomposition", "full")  # the paper's
IMAGES, PROMPTS, SIZE = 4, 2, 64


def write_example(folder: str | os.PathLike, *, seed: int = 0, size: int = SIZE) -> None:
    """Writes 4 images of two objects, 2 prompts of each, masks, and 5 prompts of the paper's tasks.

    Raises:
      ValueError: the folder exists and holds something.
    """
    root = path_of(folder)
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{folder}: holds something already; an example is written to a new folder")
    images, entries = make_images(IMAGES, seed), []
    for image in images:
        name = _name(image)
        picture, mask = render_scene(image.scene, size)
        with replacing(root / f"images/{name}.jpg") as new:
            new.write_bytes(jpeg(picture))
        write_text(root / f"captions/{name}.txt", "\n".join([image.scene.objects[0].shape, *_prompts(image)]) + "\n")
        words = []
        for i, word in enumerate(image.words):
            words.append({"word": word})
            if i < len(image.scene.objects):  # then comes the light
                words[-1]["mask"] = f"masks/{name}_{i}.png"
                bright = np.where(mask == i + 1, np.uint8(255), np.uint8(0))
                save_png(root / words[-1]["mask"], np.repeat(bright[..., None], 3, axis=-1))
        entries.append({"image": name, "captions": list(image.captions), "words": words})
    tasks = [
        {
            "task": case.task,
            "prompt": case.prompt,
            "concepts": [
                {"image": _name(images[use.image]), "word": use.word, "target": use.target} for use in case.uses
            ],
        }
        for case in make_cases(images, seed)
        if case.task in TASKS
    ]
    write_json(root / EXTRA, {"images": entries, "tasks": tasks})


def _name(image: ConceptImage) -> str:
    return f"object/{image.number:02}"


def _prompts(image: ConceptImage) -> list[str]:
    """The first object beside another one, in another place."""
    own = {item.shape for item in image.scene.objects}
    others = [shape for shape in CLASSES if shape not in own]
    places = [phrase for kind, phrase in BACKGROUNDS.items() if kind != image.scene.background.kind]
    word = next(iter(image.words))
    prompts = []
    for i in range(PROMPTS):
        other, place = (options[(3 * image.number + 5 * i) % len(options)] for options in (others, places))
        other = f"{'an' if other[0] in 'aeiou' else 'a'} {other}"
        pair = f"{word} and {other}" if i % 2 == 0 else f"{other} next to {word}"
        prompts.append(f"{pair} {place}")
    return prompts
