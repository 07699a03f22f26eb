"""The figures of an image, and how each could be fooled.

CP, concept preservation: how similar each object is to its concept (see `appearance`), averaged over the parts of its
  look and then over the prompt's concepts. A missing object counts 0. A method that always copies the whole concept
  image would have a high CP but a low PF, since prompts ask for another place, arrangement and company. A method that
  draws objects at random has some CP by chance; the row of the prompt alone shows how much.
PF, prompt following: the share of the prompt that the image shows: each object, their number, their arrangement, the
  place. Prompts don't describe appearance, so a method that ignores its concepts has the base model's PF.
CP·PF: their product for each image, so that one image's CP cannot make up for another's PF.
locality: inside / (inside + outside), the changes inside and outside of the object's region. A change is the mean over
  pixels of the mean absolute difference of the colours from the base model's image from the same noise. 1: nothing else
  changed; 0.5: everything changed alike. Images with next to no change have no locality (their number is reported):
  a method that does little is not local but idle, so inside and outside are reported too. The region is the object's in
  either image, with a margin for its rim; a change of its shadow counts as outside.
bleeding: how much more similar the other objects are to the concept than in the base model's image from the same noise
  (colour and texture). 0: no more, however they look. Values below 0 are chance. An object that is missing in either
  image is left out here; PF counts it.
reached: whether the object, or the light, has the attribute that a direction without learning names. A method that
  ignores the direction reaches some by chance: as many as the prompt alone.
kept: the share of the other objects that have the class that they have in the base model's image from the same noise,
  and a likeness of KEPT or more to their colour, texture and pose there; beside a direction without learning, to the
  attribute that it names. Names alone would change with the least change of an object between two of them. A method
  that does nothing keeps all. An object that is missing in the base model's image is left out.
light kept: whether the light has a likeness of KEPT or more to the warmth and the direction that it has in the base
  model's image; for prompts without a concept on the light.

The figures are as good as the judge. The row "rendered" measures true scenes in the same way, through the base model's
autoencoder: it is the upper bound of every method.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from mini_scenes.judge import Seen, Verdict, compare, parse_caption
from tokenverse_jax.bench.appearance import Appearance, light_likeness, object_likeness
from tokenverse_jax.bench.cases import Case, Use

MARGIN = 2  # pixels around a region
LOOKS = ("color", "texture", "pose")
KEPT = 0.5  # likeness: a distance of 25 between colours, 45 degrees, a quarter of the range of warmth
IDLE = 1.0  # levels of 255: a smaller change than this, inside and outside together, is none

Image = UInt8[np.ndarray, "H W 3"]


class View(NamedTuple):
    """An image, and what the judge saw in it."""

    image: Image
    seen: Seen


class Measurement(NamedTuple):
    """Of one image; None where a figure does not apply."""

    cp: float
    pf: float
    cp_pf: float
    parts: dict[str, float]  # of CP: colour, texture, pose, warmth, direction; and of what is reached
    inside: float | None  # levels of 255, as `outside`
    outside: float | None
    locality: float | None
    bleeding: float | None
    reached: float | None
    kept: float | None
    light: float | None


def measure(case: Case, view: View, base: View) -> Measurement:
    """Measures an image of a case; `base` is the base model's from the same noise."""
    wanted = parse_caption(case.prompt)
    verdict, before = compare(wanted, view.seen.scene), compare(wanted, base.seen.scene)
    each = [likeness(use, view.seen, verdict) for use in case.uses]
    cp = float(np.mean([np.mean(list(parts.values())) for parts in each]))
    kinds = sorted({kind for parts in each for kind in parts})
    parts = {f"CP: {kind}": float(np.mean([own[kind] for own in each if kind in own])) for kind in kinds}
    named = (use for use in case.uses if use.named is not None)
    reached = {f"reached: {use.named[0]}": _reached(use, view.seen, verdict) for use in named}
    others = [number for number in range(len(case.scene.objects)) if number not in {use.object for use in case.uses}]
    kinds = {use.named[0] for use in case.uses if use.named is not None} & {*LOOKS} or LOOKS
    kept = [_kept(number, kinds, (view.seen, verdict), (base.seen, before)) for number in others]
    kept = [value for value in kept if value is not None]
    inside, outside = _change(case, (view, verdict), (base, before)) or (None, None)
    idle = inside is None or inside + outside < IDLE
    return Measurement(
        cp=cp,
        pf=verdict.score,
        cp_pf=cp * verdict.score,
        parts=parts | reached,
        inside=inside,
        outside=outside,
        locality=None if idle else inside / (inside + outside),
        bleeding=_bleeding(case, (view.seen, verdict), (base.seen, before)),
        reached=float(np.mean(list(reached.values()))) if reached else None,
        kept=float(np.mean(kept)) if kept else None,
        light=None if any(use.object is None for use in case.uses) else _light_kept(view.seen, base.seen),
    )


def likeness(use: Use, seen: Seen, verdict: Verdict) -> dict[str, float]:
    """Parts of the look of the object or light that a concept was put on; all 0 where the object is missing."""
    if use.object is None:
        return light_likeness(use.look, seen.scene.light)
    found = verdict.places[use.object]
    if found is None:
        names = {"color": use.look.rgb, "texture": use.look.texture, "pose": use.look.rotation}
        return {name: 0.0 for name, value in names.items() if value is not None}
    return object_likeness(use.look, seen.scene.objects[found], seen.textures[found])


def _reached(use: Use, seen: Seen, verdict: Verdict) -> float:
    kind, value = use.named
    if use.object is None:
        return float(getattr(seen.scene.light, f"{kind}_name") == value)
    found = verdict.places[use.object]
    return float(found is not None and getattr(seen.scene.objects[found], kind) == value)


def _kept(
    number: int, kinds: Collection[str], after: tuple[Seen, Verdict], before: tuple[Seen, Verdict]
) -> float | None:
    """Whether an object of the prompt has the looks of these kinds that it had; None where it was missing."""
    (seen, verdict), (seen_before, verdict_before) = after, before
    found, found_before = verdict.places[number], verdict_before.places[number]
    if found_before is None:
        return None
    if found is None:
        return 0.0
    item, item_before = seen.scene.objects[found], seen_before.scene.objects[found_before]
    textures = seen.textures[found] / seen.textures[found].max()  # whatever the judge sees of itself is kept
    likes = object_likeness(Appearance.of_object(item_before), item, textures)
    same = [like >= KEPT for kind, like in likes.items() if kind in kinds]
    return float(item.shape == item_before.shape and all(same))


def _light_kept(after: Seen, before: Seen) -> float:
    likes = light_likeness(Appearance.of_light(before.scene.light), after.scene.light)
    return float(min(likes.values()) >= KEPT)


def _change(case: Case, after: tuple[View, Verdict], before: tuple[View, Verdict]) -> tuple[float, float] | None:
    """Inside and outside, for prompts with one concept, on an object that is in one of the images."""
    if len(case.uses) != 1 or case.uses[0].object is None:
        return None
    found = [(view.seen, verdict.places[case.uses[0].object]) for view, verdict in (after, before)]
    masks = [seen.masks[number] for seen, number in found if number is not None]
    region = np.any([ndimage.binary_dilation(mask, iterations=MARGIN) for mask in masks], axis=0)
    if not np.any(region) or np.all(region):
        return None
    change = np.abs(after[0].image.astype(np.float64) - before[0].image).mean(axis=-1)
    return float(change[region].mean()), float(change[~region].mean())


def _bleeding(case: Case, after: tuple[Seen, Verdict], before: tuple[Seen, Verdict]) -> float | None:
    """Mean over concepts and the objects that they were not put on."""
    gains = []
    for use in case.uses:
        for number in range(len(case.scene.objects)):
            if use.object in (None, number):
                continue
            likes = [_surface_likeness(use, seen, verdict.places[number]) for seen, verdict in (after, before)]
            if None not in likes:
                gains.append(likes[0] - likes[1])
    return float(np.mean(gains)) if gains else None


def _surface_likeness(use: Use, seen: Seen, found: int | None) -> float | None:
    """Of colour and texture; a pose does not spread to other objects."""
    if found is None:
        return None
    parts = object_likeness(use.look, seen.scene.objects[found], seen.textures[found])
    surface = [value for kind, value in parts.items() if kind != "pose"]
    return float(np.mean(surface)) if surface else None
