"""Parses the captions of mini_scenes and checks scenes against them.

A caption asks only for what it names: "a circle" may be red.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from scipy.optimize import linear_sum_assignment

from mini_scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    LIGHT_DIRECTIONS,
    LIGHT_WARMTHS,
    POSES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
)
from mini_scenes.judge.judge import Judge
from runtime_jax.estimate import Estimate, estimate

# Attributes that a caption can ask for besides the shape, and the field of SceneObject for each.
ATTRIBUTES = {"color": "color", "texture": "texture", "size": "size_name", "pose": "pose"}


@dataclass(frozen=True, kw_only=True)
class WantedObject:
    """An object that a caption asks for; None: the caption does not mention the attribute."""

    shape: str
    color: str | None = None
    texture: str | None = None
    size: str | None = None
    pose: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a caption asks for; None: not mentioned.

    objects: all objects that the image should have, in the order of the caption; if `ordered`, from left to right.
    """

    objects: tuple[WantedObject, ...]
    ordered: bool = False
    background: str | None = None
    warmth: str | None = None
    direction: str | None = None


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


_ADJECTIVE = _any((*SIZES, *COLORS, *TEXTURES))
_OBJECT = re.compile(
    rf"\ban? (?P<before>(?:{_ADJECTIVE} )*)(?P<shape>{_any(CLASSES)})\b"
    rf"(?: that is (?P<after>{_ADJECTIVE}(?: and {_ADJECTIVE})?)\b)?(?: (?P<pose>{_any(POSES)})\b)?"
)
_SIDE = re.compile(r"\bto the (left|right) of\b")
_WARMTH = re.compile(rf"\bin ({_any(LIGHT_WARMTHS)}) light\b")
_DIRECTION = re.compile(rf"\blit from (?:the )?({_any(LIGHT_DIRECTIONS)})\b")
_CONNECTIVES = re.compile(r",|\ba (?:picture|drawing) of\b|\bnext to\b|\band\b")


def parse_caption(text: str) -> Wanted:
    """Parses a caption in the grammar of mini_scenes.

    Raises:
      ValueError: the caption names no object, or a part of it is outside the grammar. Ignoring that part would give
        images credit for something that was never checked.
    """
    rest = text.lower()

    def take(pattern: re.Pattern) -> list[re.Match]:
        nonlocal rest
        found = list(pattern.finditer(rest))
        rest = pattern.sub(" ; ", rest)
        return found

    places = [kind for kind, phrase in BACKGROUNDS.items() if take(re.compile(rf"\b{phrase}\b"))]
    warmths, directions, sides = take(_WARMTH), take(_DIRECTION), take(_SIDE)
    objects = tuple(_wanted_object(match) for match in take(_OBJECT))
    rest = " ".join(_CONNECTIVES.sub(" ", rest).replace(";", " ").split())
    if rest or not objects or max(map(len, (places, warmths, directions, sides))) > 1 or (sides and len(objects) != 2):
        problem = f"{rest!r} is not understood" if rest else "no objects, or two backgrounds, lights or arrangements"
        raise ValueError(f"caption {text!r}: {problem}")
    if sides and sides[0][1] == "right":
        objects = objects[::-1]
    return Wanted(
        objects=objects,
        ordered=bool(sides),
        background=places[0] if places else None,
        warmth=warmths[0][1] if warmths else None,
        direction=directions[0][1] if directions else None,
    )


def objects_in(text: str) -> Iterator[tuple[slice, WantedObject]]:
    """The objects that a text names in the words of mini_scenes, each with its span in the text."""
    for match in _OBJECT.finditer(text.lower()):
        yield slice(*match.span()), _wanted_object(match)


def _wanted_object(match: re.Match) -> WantedObject:
    words = f"{match['before']} {match['after'] or ''}".split()
    named = {
        kind: next((word for word in words if word in known), None)
        for kind, known in (("color", COLORS), ("texture", TEXTURES), ("size", SIZES))
    }
    return WantedObject(shape=match["shape"], pose=match["pose"], **named)


class Verdict(NamedTuple):
    """How well a scene follows a caption.

    items: everything that the caption asks for, as (kind, whether the scene has it). Kinds: "class" (one per object),
      each of ATTRIBUTES that the caption names, "count" (of objects), "arrangement", "background", "warmth" and
      "direction". If an object is missing, its attributes count as missing too.
    places: for each wanted object, the index of the matching object in the scene; None if there is none.
    """

    items: tuple[tuple[str, bool], ...]
    places: tuple[int | None, ...]

    @property
    def score(self) -> float:
        """Share of the items that the scene has, in [0, 1]."""
        return float(np.mean([there for _, there in self.items]))


def compare(wanted: Wanted, scene: Scene) -> Verdict:
    """Checks a scene, a true one or one that the judge saw, against a caption.

    Each object matches at most one wanted object. If several objects have the wanted shape, the assignment maximises
    the number of agreeing attributes; ties are resolved from left to right if the caption gives the arrangement.
    """
    agreement = np.array([[_agreement(want, item) for item in scene.objects] for want in wanted.objects])
    if wanted.ordered and agreement.size:
        ranks = np.argsort(np.argsort([item.x for item in scene.objects]))
        agreement -= 0.01 * np.abs(ranks - np.arange(len(wanted.objects))[:, None])
    places: list[int | None] = [None] * len(wanted.objects)
    if agreement.size:
        for i, j in zip(*linear_sum_assignment(agreement, maximize=True), strict=True):
            if wanted.objects[i].shape == scene.objects[j].shape:
                places[i] = int(j)
    found = [None if place is None else scene.objects[place] for place in places]
    items = [("count", len(scene.objects) == len(wanted.objects))]
    for want, item in zip(wanted.objects, found, strict=True):
        items.append(("class", item is not None))
        for kind, name in ATTRIBUTES.items():
            if (asked := getattr(want, kind)) is not None:
                items.append((kind, item is not None and getattr(item, name) == asked))
    if wanted.ordered:
        positions = [item.x for item in found if item is not None]
        items.append(("arrangement", len(positions) == len(found) and positions == sorted(positions)))
    for kind, asked, there in (
        ("background", wanted.background, scene.background.kind),
        ("warmth", wanted.warmth, scene.light.warmth_name),
        ("direction", wanted.direction, scene.light.direction_name),
    ):
        if asked is not None:
            items.append((kind, asked == there))
    return Verdict(tuple(items), tuple(places))


def _agreement(want: WantedObject, item: SceneObject) -> float:
    """Number of agreeing attributes, plus 10 (more than all attributes together) if the shapes agree."""
    attributes = sum(getattr(want, kind) == getattr(item, name) for kind, name in ATTRIBUTES.items())
    return 10.0 * (want.shape == item.shape) + attributes


def follows(
    captions: Sequence[str | Wanted], images: UInt8[np.ndarray, "N H W 3"], judge: Judge | None = None
) -> list[Verdict]:
    """How well each image follows its caption according to a judge, by default the shipped one.

    Raises:
      ValueError: the numbers of captions and images differ, a caption is outside the grammar of mini_scenes, or images
        are invalid for `Judge.look`.
    """
    wanted = [parse_caption(caption) if isinstance(caption, str) else caption for caption in captions]
    seen = (judge or Judge.load()).look(images)
    return [compare(want, one.scene) for want, one in zip(wanted, seen, strict=True)]


def accuracies(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    """For each kind of item, the share that is satisfied; under "all", the mean of the images' scores."""
    by_kind: dict[str, list[float]] = {}
    for verdict in verdicts:
        for kind, there in verdict.items:
            by_kind.setdefault(kind, []).append(float(there))
    shares = {kind: estimate(values) for kind, values in by_kind.items()}
    return shares | {"all": estimate([verdict.score for verdict in verdicts])}
