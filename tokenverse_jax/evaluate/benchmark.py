"""A benchmark in DreamBench++'s folder layout, and what TokenVerse needs beyond it.

    images/live_subject/animal/00.jpg     an image; the folder it is in is its category
    captions/live_subject/animal/00.txt   first line: its subject; then a prompt a line
    tokenverse.json                       ours, optional: see `Extra`

Without tokenverse.json the subject is the word to learn, in captions made from TEMPLATES.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from runtime_jax.config import build
from runtime_jax.data import decode_image, image_files, image_size
from runtime_jax.files import local
from runtime_jax.messages import cut

EXTRA = "tokenverse.json"
LIVE = ("animal", "human")  # categories whose collections are called live_subject_...
TEMPLATES = ("{a}", "a photo of {a}", "a picture of {a}", "an image that shows {a}")
WHITE = 255
Image = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word to learn from an image; "dog#2" is the second "dog" of its captions.

    mask: file, from the benchmark's folder, that is bright where the image shows the concept; None: everywhere.
    """

    word: str
    mask: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """What is learned from an image: captions, each with all of the words. `image`: such as "object/00"."""

    image: str
    captions: tuple[str, ...]
    words: tuple[Word, ...]


@dataclass(frozen=True, kw_only=True)
class ConceptEntry:
    """A concept in a task's prompt: a word of an image, on the word `target` of the prompt; None: on the same word."""

    image: str
    word: str
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A prompt with concepts of one or more images, such as the paper's "composition"."""

    task: str
    prompt: str
    concepts: tuple[ConceptEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Extra:
    """The content of tokenverse.json."""

    images: tuple[ImageEntry, ...] = ()
    tasks: tuple[TaskEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the benchmark.

    name: path below images/ without suffix, such as "live_subject/animal/00".
    collection: what DreamBench++ calls it, such as "live_subject_animal_00_kitten".
    """

    name: str
    path: Path
    category: str
    collection: str
    prompts: tuple[str, ...]
    captions: tuple[str, ...]
    words: tuple[Word, ...]

    def pixels(self) -> Image:
        """The image; ValueError where it is not readable."""
        return _decoded(self.path)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A folder's content. `digest`: SHA-256 of the names and bytes of all of its files that count."""

    path: Path
    pictures: Mapping[str, Picture] = field(repr=False)
    tasks: tuple[TaskEntry, ...]
    digest: str

    def reference(self, name: str, word: str) -> Image:
        """The image that shows a concept, white outside of the word's mask."""
        picture, pixels = self.pictures[name], self.pictures[name].pixels()
        mask = next(own.mask for own in picture.words if own.word == word)
        return pixels if mask is None else np.where(_mask(self.path / mask)[..., None], pixels, np.uint8(WHITE))

    def is_masked(self, name: str, word: str) -> bool:
        """Whether the word has a mask."""
        return any(own.word == word and own.mask is not None for own in self.pictures[name].words)


def slug(text: str) -> str:
    """A text as a part of a file's name, as DreamBench++ writes subjects."""
    return re.sub(r"[\s/\\]+", "_", text.strip().lower())


def read_benchmark(folder: str | os.PathLike) -> Benchmark:
    """Reads names, captions and masks; pictures are decoded when they are needed.

    Raises:
      ValueError: another layout; images without captions, or captions without an image; an unknown or ill-typed key of
        tokenverse.json, or one that names what is not there; a mask of another size than its image, or an empty one.
    """
    try:
        root = local(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no such folder") from error
    if not root.is_dir() or not all((root / name).is_dir() for name in ("images", "captions")):
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else "no such folder"
        shown = found if isinstance(found, str) else f"it holds {cut(found) or 'nothing'}"
        raise ValueError(f"{folder}: not in DreamBench++'s layout, folders images/ and captions/ are needed; {shown}")
    images = {str(path.with_suffix("")): root / "images" / path for path in image_files(root / "images")}
    texts = {str(path.relative_to(root / "captions").with_suffix("")): path for path in _texts(root / "captions")}
    for what, missing in (("captions", images.keys() - texts.keys()), ("an image", texts.keys() - images.keys())):
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {len(images | texts)} lack {what}: {cut(sorted(missing))}")
    if not images:
        raise ValueError(f"{folder}: images/ holds no image")
    extra = _read_extra(root / EXTRA)
    entries = {entry.image: entry for entry in extra.images}
    if unknown := sorted(entries.keys() - images.keys()):
        raise ValueError(f"{root / EXTRA}: images that are not in images/: {cut(unknown)}")
    if len(entries) < len(extra.images):
        raise ValueError(f"{root / EXTRA}: an image has two entries")
    pictures = {name: _picture(name, images[name], texts[name], entries.get(name)) for name in sorted(images)}
    twins = [name for name, count in Counter(own.collection for own in pictures.values()).items() if count > 1]
    if twins:
        raise ValueError(f"{folder}: several images are called {cut(twins)}")
    _check_tasks(root / EXTRA, extra.tasks, pictures)
    masks = {root / word.mask: own.path for own in pictures.values() for word in own.words if word.mask}
    for mask, image in masks.items():
        _check_mask(mask, image)
    files = [*images.values(), *texts.values(), *masks, *([root / EXTRA] if (root / EXTRA).exists() else [])]
    return Benchmark(path=root, pictures=pictures, tasks=extra.tasks, digest=_digest(root, files))


def _texts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.txt") if not path.name.startswith(".")]


def _picture(name: str, path: Path, captions: Path, entry: ImageEntry | None) -> Picture:
    lines = [line.strip() for line in captions.read_text(encoding="utf-8").rstrip().splitlines()]
    if len(lines) < 2 or not all(lines):
        raise ValueError(f"{captions}: a subject and one or more prompts are needed, a line each")
    subject, *prompts = lines
    parent, category, number = path.parent, path.parent.name, path.stem
    if parent.name == "images":
        raise ValueError(f"{path}: images are in a folder of their category, such as images/object/{path.name}")
    prefix = f"live_subject_{category}" if category in LIVE else category
    if entry is None:
        article = "an" if subject[0].lower() in "aeiou" else "a"
        templates = tuple(template.format(a=f"{article} {subject}") for template in TEMPLATES)
        entry = ImageEntry(image=name, captions=templates, words=(Word(word=subject),))
    return Picture(
        name=name,
        path=path,
        category=category,
        collection=f"{prefix}_{number}_{slug(subject)}",
        prompts=tuple(prompts),
        captions=entry.captions,
        words=entry.words,
    )


def _read_extra(path: Path) -> Extra:
    if not path.exists():
        return Extra()
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    return build(Extra, fields, path=str(path))


def _check_tasks(path: Path, tasks: Sequence[TaskEntry], pictures: Mapping[str, Picture]) -> None:
    categories = {picture.category for picture in pictures.values()}
    for task in tasks:
        if task.task in categories:
            raise ValueError(f"{path}: the task {task.task!r} is called like a category of images")
        for concept in task.concepts:
            own = [word.word for word in pictures[concept.image].words] if concept.image in pictures else None
            if own is None or concept.word not in own:
                there = f"its words are {', '.join(own)}" if own else "there is no such image"
                raise ValueError(f"{path}: {task.task}: no {concept.word!r} of {concept.image!r}; {there}")
        if not task.concepts:
            raise ValueError(f"{path}: {task.task}: {task.prompt!r} has no concepts")


def _decoded(path: Path) -> Image:
    try:
        return decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _mask(path: Path) -> Bool[np.ndarray, "H W"]:
    return _decoded(path).max(axis=-1) > WHITE // 2


def _check_mask(mask: Path, image: Path) -> None:
    if not mask.is_file():
        raise ValueError(f"{mask}: no such file")
    pixels = _mask(mask)
    if pixels.shape != image_size(image):
        raise ValueError(f"{mask}: {pixels.shape[1]} x {pixels.shape[0]} pixels, but its image has another size")
    if not pixels.any():
        raise ValueError(f"{mask}: the mask is dark everywhere")


def _digest(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()
