"""Captions in several word orders, which mention each attribute with some probability, or all attributes."""

from collections.abc import Callable, Mapping

import numpy as np

from mini_scenes.scene import Scene, SceneObject
from mini_scenes.style import SHADED
from mini_scenes.vocabulary import BACKGROUNDS, MENTION_RATES

Mention = Callable[[str], bool]
FROM = {"right": "the right", "above": "above", "left": "the left"}  # light directions in captions


def caption(
    scene: Scene,
    rng: np.random.Generator,
    *,
    left_to_right: bool = False,
    rates: Mapping[str, float] = MENTION_RATES,
) -> str:
    """A caption that names every shape, and mentions each other attribute with its probability in `rates`.

    Objects are listed in random order, or from left to right with `left_to_right`. A scene in another style than
    SHADED is called a drawing.
    """
    mention = _mention(rng, rates)
    order = rng.permutation(len(scene.objects))
    if left_to_right:
        order = np.argsort([item.x for item in scene.objects])
    phrases = [_object_phrase(scene.objects[i], mention, int(rng.integers(3))) for i in order]
    subject = _join([scene.objects[i] for i in order], phrases, int(rng.integers(3)))
    return _compose(subject, _surroundings(scene, mention), int(rng.integers(4)), scene.style == SHADED)


def full_caption(scene: Scene) -> str:
    """The caption that mentions every named attribute, from left to right, in one fixed word order."""
    objects = sorted(scene.objects, key=lambda item: item.x)
    phrases = [_object_phrase(item, lambda _: True, 0) for item in objects]
    return _compose(_join(objects, phrases, 0), _surroundings(scene, lambda _: True), 0, scene.style == SHADED)


def object_caption(item: SceneObject, rng: np.random.Generator, rates: Mapping[str, float]) -> str:
    """A caption of one object by itself, which mentions each attribute with its probability in `rates`."""
    return _object_phrase(item, _mention(rng, rates), int(rng.integers(3)))


def place_caption(scene: Scene, rng: np.random.Generator, rates: Mapping[str, float]) -> str:
    """A caption of the background alone, with its light as far as `rates` has it mentioned."""
    place, light = _surroundings(scene, _mention(rng, {**rates, "background": 1.0}))
    return " ".join(filter(None, (place, light)))


def _mention(rng: np.random.Generator, rates: Mapping[str, float]) -> Mention:
    return lambda attribute: bool(rng.uniform() < rates[attribute])


def _object_phrase(item: SceneObject, mention: Mention, form: int) -> str:
    size = item.size_name if item.size_name != "medium" and mention("size") else ""
    color = item.color if mention("color") else ""
    texture = item.texture if mention("texture") else ""
    pose = item.pose if item.pose and mention("pose") else ""
    if form == 2:
        detail = " and ".join(filter(None, (color, texture)))
        noun = " ".join(filter(None, (size, item.shape, detail and f"that is {detail}")))
    else:
        adjectives = (size, color, texture) if form == 0 else (size, texture, color)
        noun = " ".join(filter(None, (*adjectives, item.shape)))
    article = "an" if noun[0] in "aeiou" else "a"
    return " ".join(filter(None, (article, noun, pose)))


def _join(objects: list[SceneObject], phrases: list[str], form: int) -> str:
    if len(phrases) == 2 and form == 1:
        return f"{phrases[0]} next to {phrases[1]}"
    if len(phrases) == 2 and form == 2:
        side = "left" if objects[0].x < objects[1].x else "right"
        return f"{phrases[0]} to the {side} of {phrases[1]}"
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _surroundings(scene: Scene, mention: Mention) -> tuple[str, str]:
    """Phrases for the background and the light; each may be empty."""
    place = BACKGROUNDS[scene.background.kind] if mention("background") else ""
    warmth = scene.light.warmth_name
    warm = f"in {warmth} light" if warmth != "neutral" and mention("warmth") else ""
    shows_direction = scene.style.shading
    lit = f"lit from {FROM[scene.light.direction_name]}" if mention("direction") and shows_direction else ""
    return place, " ".join(filter(None, (warm, lit)))


def _compose(subject: str, surroundings: tuple[str, str], form: int, shaded: bool) -> str:
    place, light = surroundings
    if not shaded:
        subject = f"a drawing of {subject}"
    if form == 1:
        return ", ".join(filter(None, (place, subject, light)))
    if form == 2 and shaded:
        subject = f"a picture of {subject}"
    if form == 3:
        return ", ".join(filter(None, (light, " ".join(filter(None, (subject, place))))))
    return ", ".join(filter(None, (" ".join(filter(None, (subject, place))), light)))
