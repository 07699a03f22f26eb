"""What is measured of an image, and how each figure could be fooled.

CP, concept preservation: how like its concept each object looks (see `appearance`), averaged over the parts of its
  look and then over the prompt's concepts. An object that is not there counts 0. A method that always copies the whole
  concept image would have a high CP: its PF is low then, since prompts ask for another place, arrangement and company.
  One that draws objects at random has some CP by chance; the row of the prompt alone shows how much.
PF, prompt following: share of what the prompt asks for that is there: each object, their number, their arrangement, the
  place. Prompts name no looks, so a method that ignores its concepts has the base model's PF.
CP·PF: their product for each image, so that neither can be had at the cost of the other in another image.
locality: change inside the object's region against change outside, inside / (inside + outside), each the mean over
  pixels of the mean absolute difference of the colours from the base model's image from the same noise. 1: nothing else
  changed; 0.5: everything changed alike. It says nothing where hardly anything changed at all, so such images have none
  (their number is reported), and inside and outside are reported too: a method that does little is not local, it is
  idle. The region is the object's in either image, with a margin for its rim; a change of its shadow counts as outside.
bleeding: how much more like the concept the other objects look than in the base model's image from the same noise
  (colour and texture). 0: not at all, whatever they happened to look like. Below 0 is chance. An object that is missing
  in either image is left out here; PF counts it.

All of it is as good as the judge. The row "rendered" measures true scenes in the same way, through the base model's
autoencoder: it is the best that any method could have.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

from mini_scenes.judge import Seen, Verdict, compare, parse_caption
from tokenverse_jax.bench.appearance import light_likeness, object_likeness
from tokenverse_jax.bench.cases import Case, Use

MARGIN = 2  # pixels around a region
IDLE = 1.0  # levels of 255: a smaller change than this, inside and outside together, is none

Image = UInt8[np.ndarray, "H W 3"]


class View(NamedTuple):
    """An image, and what the judge saw in it."""

    image: Image
    seen: Seen


class Change(NamedTuple):
    """From the base model's image, mean over the pixels inside and outside of the object's region, levels of 255."""

    inside: float
    outside: float

    @property
    def locality(self) -> float | None:
        """None where hardly anything changed."""
        total = self.inside + self.outside
        return self.inside / total if total >= IDLE else None


class Measurement(NamedTuple):
    """Of one image; None where a figure does not apply."""

    cp: float
    pf: float
    cp_pf: float
    parts: dict[str, float]  # of CP: colour, texture, pose, warmth, direction
    inside: float | None
    outside: float | None
    locality: float | None
    bleeding: float | None


def measure(case: Case, view: View, base: View) -> Measurement:
    """Measures an image of a case; `base` is the base model's from the same noise."""
    wanted = parse_caption(case.prompt)
    verdict, before = compare(wanted, view.seen.scene), compare(wanted, base.seen.scene)
    likeness = [_likeness(use, view.seen, verdict) for use in case.uses]
    cp = float(np.mean([np.mean(list(parts.values())) for parts in likeness]))
    kinds = sorted({kind for parts in likeness for kind in parts})
    parts = {kind: float(np.mean([own[kind] for own in likeness if kind in own])) for kind in kinds}
    change = _change(case, (view, verdict), (base, before))
    return Measurement(
        cp=cp,
        pf=verdict.score,
        cp_pf=cp * verdict.score,
        parts=parts,
        inside=change and change.inside,
        outside=change and change.outside,
        locality=change and change.locality,
        bleeding=_bleeding(case, (view.seen, verdict), (base.seen, before)),
    )


def _likeness(use: Use, seen: Seen, verdict: Verdict) -> dict[str, float]:
    """Parts of the look of what a concept was put on; all 0 where it is not there."""
    if use.place is None:
        return light_likeness(use.look, seen.scene.light)
    place = verdict.places[use.place]
    if place is None:
        names = {"color": use.look.rgb, "texture": use.look.texture, "pose": use.look.rotation}
        return {name: 0.0 for name, value in names.items() if value is not None}
    return object_likeness(use.look, seen.scene.objects[place], seen.textures[place])


def _change(case: Case, after: tuple[View, Verdict], before: tuple[View, Verdict]) -> Change | None:
    """For prompts with one concept, on an object that is in one of the images."""
    if len(case.uses) != 1 or case.uses[0].place is None:
        return None
    regions = [_region(view.seen, verdict, case.uses[0].place) for view, verdict in (after, before)]
    region = np.any([one for one in regions if one is not None], axis=0)
    if not np.any(region) or np.all(region):
        return None
    change = np.abs(after[0].image.astype(np.float64) - before[0].image).mean(axis=-1)
    return Change(float(change[region].mean()), float(change[~region].mean()))


def _region(seen: Seen, verdict: Verdict, place: int) -> Bool[np.ndarray, "H W"] | None:
    found = verdict.places[place]
    return None if found is None else ndimage.binary_dilation(seen.masks[found], iterations=MARGIN)


def _bleeding(case: Case, after: tuple[Seen, Verdict], before: tuple[Seen, Verdict]) -> float | None:
    """Mean over concepts and the objects that they were not put on."""
    gains = []
    for use in case.uses:
        for place in range(len(case.scene.objects)):
            if use.place in (None, place):
                continue
            likes = [_surface_likeness(use, seen, verdict.places[place]) for seen, verdict in (after, before)]
            if None not in likes:
                gains.append(likes[0] - likes[1])
    return float(np.mean(gains)) if gains else None


def _surface_likeness(use: Use, seen: Seen, place: int | None) -> float | None:
    """Of colour and texture; a pose is no look that could spread."""
    if place is None:
        return None
    parts = object_likeness(use.look, seen.scene.objects[place], seen.textures[place])
    return float(np.mean([value for kind, value in parts.items() if kind != "pose"]))
