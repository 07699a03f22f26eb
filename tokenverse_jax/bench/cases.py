"""The benchmark's questions: concept images whose captions don't describe appearance, and prompts with the concepts.

Every image has two objects and a place, which the tiny base model draws best. All three are learned, each on its
phrase ("a circle", "on the grass"), over which that model's text encoder spreads it: objects with their look, places
with their light. Images come in pairs whose objects differ in class and colour, so that their looks can be told apart.
Tasks, as in the paper's section 4.2, and three of our own:

    composition    one concept of each image of a pair: two objects, in every second pair an object and the light
    decomposition  both objects of one image, in another arrangement and place
    full           of other pairs: the first object of one image beside the second of the other, and the other way round
    single         one concept beside an object and in a light that must not change and that the prompt describes, for
                   locality, bleeding and what is kept
    same word      two concepts of the same class: "a circle to the left of a circle"
    direction      no learning: from a pair of prompts, a colour, texture or pose added to an object, or a light to the
                   place; as many of each

Everything is a pure function of the seed. Each case also has the scene that a perfect method would draw.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mini_scenes import (
    BACKGROUNDS,
    CLASSES,
    LIGHT_DIRECTIONS,
    LIGHT_WARMTHS,
    POSES,
    SHADED,
    SYMMETRY,
    TEXTURES,
    Background,
    Light,
    Scene,
    SceneObject,
    accent_of,
    in_a_row,
    render_scene,
    sample_color,
    sample_scene,
)
from mini_scenes.captions import FROM
from mini_scenes.scene import ROW_HEIGHT, ROW_HORIZON, ROW_SIZE
from runtime_jax.prng import Stream, host_rng
from tokenverse_jax.bench.appearance import Appearance
from tokenverse_jax.concepts.concept_data import read_image

KINDS = ("color", "texture", "pose", "light")  # of directions without learning
TINTS = tuple(name for name in LIGHT_WARMTHS if name != "neutral")


@dataclass(frozen=True, kw_only=True)
class ConceptImage:
    """An image to learn from.

    path: the picture's file; None: the scene, rendered.
    captions: several for the same image; none names a colour, texture, pose, size or light.
    words: the appearance that each word to learn stands for.
    """

    number: int
    scene: Scene
    captions: tuple[str, ...]
    words: dict[str, Appearance]
    path: Path | None = None

    def pixels(self, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
        """The picture."""
        return render_scene(self.scene, size).image if self.path is None else read_image(self.path, size)


@dataclass(frozen=True, kw_only=True)
class Use:
    """A concept in a prompt.

    look: the appearance that it brings.
    target: the word of the prompt that it is put on.
    object: number of the scene's object that takes the look; None for the light.
    image, word: where it was learned; None for a direction without learning.
    named: the attribute that a direction without learning names, and its value: ("color", "red"), for example.
    """

    look: Appearance
    target: str
    object: int | None
    image: int | None = None
    word: str | None = None
    named: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt with concepts.

    scene: what a perfect method would draw, objects from left to right as in the prompt.
    attribute, neutral: prompts of a direction without learning.
    task, unit, number: set by `make_cases`. Cases of one task and unit share images; units are independent.
    """

    prompt: str
    scene: Scene
    uses: tuple[Use, ...]
    attribute: str | None = None
    neutral: str | None = None
    task: str = ""
    unit: int = 0
    number: int = 0

    @property
    def images(self) -> tuple[int, ...]:
        """Numbers of the images that its concepts come from."""
        return tuple(dict.fromkeys(use.image for use in self.uses if use.image is not None))

    @property
    def name(self) -> str:
        """Of files."""
        return f"{self.task.replace(' ', '_')}_{self.number:03}"


def make_images(count: int, seed: int) -> list[ConceptImage]:
    """`count` concept images, a multiple of four."""
    _check_count(count)
    images: list[ConceptImage] = []
    for number in range(count):
        rng = host_rng(seed, Stream.EVAL, 0, number)
        partner = images[-1].scene.objects if number % 2 else ()
        while True:
            scene = _scene(rng)
            if len(scene.objects) == 2 and _differ(scene, partner):
                break
        images.append(_concept_image(number, scene))
    return images


def read_images(folder: Path, count: int) -> list[ConceptImage]:
    """The first `count` pictures of a folder, in the order of their names: NAME.png with its scene in NAME.json.

    Raises:
      ValueError: fewer pictures, one without a scene of two objects of different classes, or a `count` that is no
        multiple of four.
    """
    _check_count(count)
    paths = sorted(folder.glob("*.png"))[:count]
    if len(paths) < count:
        raise ValueError(f"pictures={folder}: {len(paths)} files *.png, but images={count} are needed")
    images = []
    for number, path in enumerate(paths):
        truth = path.with_suffix(".json")
        if not truth.is_file():
            raise ValueError(f"{truth}: no such file; the scene of {path.name} is needed")
        try:
            scene = Scene.from_json(truth.read_text())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{truth}: not a scene of mini_scenes ({error!r})") from error
        if len({item.shape for item in scene.objects}) != len(scene.objects) or len(scene.objects) != 2:
            raise ValueError(f"{truth}: two objects of different classes are needed")
        images.append(replace(_concept_image(number, scene), path=path))
    return images


def _check_count(count: int) -> None:
    if count < 4 or count % 4:
        raise ValueError(
            f"images={count}: a positive multiple of 4 is needed: pairs for composition, and as many for full"
        )


def _concept_image(number: int, scene: Scene) -> ConceptImage:
    words = {_a(item.shape): Appearance.of_object(item) for item in scene.objects}
    if scene.style.shading:
        words[BACKGROUNDS[scene.background.kind]] = Appearance.of_light(scene.light)
    return ConceptImage(number=number, scene=scene, captions=_captions(scene), words=words)


def _scene(rng: np.random.Generator) -> Scene:
    """A scene from the world that the tiny base model has learned to draw."""
    return in_a_row(sample_scene(rng), rng)


def _differ(scene: Scene, others: Sequence[SceneObject]) -> bool:
    pairs = itertools.product(scene.objects, others)
    return all(mine.shape != other.shape and mine.color != other.color for mine, other in pairs)


def _captions(scene: Scene) -> tuple[str, ...]:
    """The forms of mini_scenes for two objects, from left to right, which the base model has learned to read."""
    place = BACKGROUNDS[scene.background.kind]
    left, right = (_a(item.shape) for item in sorted(scene.objects, key=lambda item: item.x))
    pairs = [f"{left} {joint} {right}" for joint in ("and", "next to", "to the left of")]
    if scene.style != SHADED:
        # The longest joint would leave too few of the tiny base model's 40 tokens for the isolation loss's other half.
        pairs = [f"a drawing of {pair}" for pair in pairs[:2]]
        return (*(f"{pair} {place}" for pair in pairs), *(f"{place}, {pair}" for pair in pairs))
    both = pairs[0]
    captions = [f"{both} {place}", f"a picture of {both} {place}", f"{place}, {both}"]
    return (*captions, *(f"{pair} {place}" for pair in pairs[1:]))


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def make_cases(images: Sequence[ConceptImage], seed: int) -> list[Case]:
    """The cases of all tasks, numbered in each."""
    first, second = images[: len(images) // 2], images[len(images) // 2 :]
    of_class = [[image for image in images if image.scene.objects[0].shape == shape] for shape in CLASSES]
    twins = [pair for group in of_class for pair in zip(group[::2], group[1::2], strict=False)]
    makers = {
        "composition": ([_composition(rng, *pair)] for rng, pair in _each(seed, 1, _pairs(first))),
        "decomposition": (
            [_objects_case(rng, [_bring(image, 0), _bring(image, 1)])] for rng, image in _each(seed, 2, second)
        ),
        "full": (
            [_objects_case(rng, [_bring(one, i), _bring(other, 1 - i)]) for i in (0, 1)]
            for rng, (one, other) in _each(seed, 3, _pairs(second))
        ),
        "single": ([_single(rng, image)] for rng, image in _each(seed, 4, first)),
        "same word": ([make_pair(rng, *pair)] for rng, pair in _each(seed, 5, twins)),
        "direction": ([_direction(rng, KINDS[i % len(KINDS)])] for rng, i in _each(seed, 6, range(len(images) // 2))),
    }
    cases = []
    for task, units in makers.items():
        numbered = ((unit, case) for unit, group in enumerate(units) for case in group)
        cases += [replace(case, task=task, unit=unit, number=i) for i, (unit, case) in enumerate(numbered)]
    return cases


def _each(seed: int, stream: int, things: Sequence) -> Iterator[tuple[np.random.Generator, object]]:
    return ((host_rng(seed, Stream.EVAL, stream, i), thing) for i, thing in enumerate(things))


def _pairs(images: Sequence[ConceptImage]) -> list[tuple[ConceptImage, ConceptImage]]:
    return list(zip(images[::2], images[1::2], strict=True))


def _single(rng: np.random.Generator, image: ConceptImage) -> Case:
    """The first object beside another one, whose colour and texture the prompt names, in a light that it names too."""
    brought = [_bring(image, 0), (_bystander(rng, *image.scene.objects), None)]
    case = _objects_case(rng, brought, names_bystander=True)
    warmth, side = str(rng.choice(TINTS)), str(rng.choice(tuple(FROM)))
    prompt = f"{case.prompt} in {warmth} light lit from {FROM[side]}"
    return replace(case, prompt=prompt, scene=replace(case.scene, light=_light(warmth=warmth, side=side)))


def _composition(rng: np.random.Generator, first: ConceptImage, second: ConceptImage) -> Case:
    """Two objects, in every second pair an object and the light, where the second image has one to learn."""
    kind, light = second.scene.background.kind, second.scene.light
    if second.number % 4 == 1 or BACKGROUNDS[kind] not in second.words:
        return make_pair(rng, first, second)
    item, use = _bring(first, 0)
    case = _objects_case(rng, [(item, use), (_bystander(rng, item), None)], kind)
    word = BACKGROUNDS[kind]
    lit = Use(look=second.words[word], target=word, object=None, image=second.number, word=word)
    return replace(case, scene=replace(case.scene, light=light), uses=(*case.uses, lit))


def make_pair(rng: np.random.Generator, first: ConceptImage, second: ConceptImage) -> Case:
    """The first objects of two images side by side."""
    return _objects_case(rng, [_bring(first, 0), _bring(second, 0)])


def _direction(rng: np.random.Generator, kind: str) -> Case:
    """A direction of a kind, from a pair of prompts."""
    while True:
        item = _scene(rng).objects[0]
        if kind != "pose" or SYMMETRY[item.shape] == 1:
            break
    bare = _a(item.shape)
    if kind == "light":
        return _light_direction(rng, item)
    if kind == "color":
        item = replace(item, rgb=_middle(item.color))
        value, look, attribute = item.color, Appearance(rgb=item.rgb), _a(f"{item.color} {item.shape}")
    elif kind == "texture":
        value = str(rng.choice(TEXTURES[1:]))
        item = replace(item, texture=value)
        look, attribute = Appearance(texture=value), _a(f"{value} {item.shape}")
    else:
        value = str(rng.choice([pose for pose in POSES if pose != "upright"]))
        item = replace(item, rotation=(POSES[value][0] + 180.0) % 360 - 180)
        look, attribute = Appearance(rotation=item.rotation), f"{bare} {value}"
    use = Use(look=look, target=bare, object=0, named=(kind, value))
    case = _objects_case(rng, [(item, use), (_bystander(rng, item), None)])
    return replace(case, attribute=attribute, neutral=bare)


def _light_direction(rng: np.random.Generator, item: SceneObject) -> Case:
    """A light, warm or cool or from a side, on the words of the place."""
    case = _objects_case(rng, [(item, None), (_bystander(rng, item), None)])
    place = BACKGROUNDS[case.scene.background.kind]
    if rng.uniform() < 0.5:
        warmth = str(rng.choice(TINTS))
        light = _light(warmth=warmth)
        named, look, words = ("warmth", warmth), Appearance(warmth=light.warmth), f"in {warmth} light"
    else:
        side = str(rng.choice(tuple(FROM)))
        light = _light(side=side)
        named, look, words = ("direction", side), Appearance(azimuth=light.azimuth), f"lit from {FROM[side]}"
    use = Use(look=look, target=place, object=None, named=named)
    scene = replace(case.scene, light=light)
    return replace(case, scene=scene, uses=(use,), attribute=f"{place} {words}", neutral=place)


def _light(*, warmth: str = "neutral", side: str = "above") -> Light:
    """The middle of a named light."""
    azimuth, tint = sum(LIGHT_DIRECTIONS[side]) / 2, sum(LIGHT_WARMTHS[warmth]) / 2
    return Light(azimuth=azimuth, elevation=45.0, warmth=tint)


def _middle(color: str) -> tuple[int, int, int]:
    """The mean of a named colour's range."""
    samples = [sample_color(np.random.default_rng(i), color) for i in range(64)]
    red, green, blue = (round(channel) for channel in np.mean(samples, axis=0).tolist())
    return red, green, blue


Brought = tuple[SceneObject, Use | None]


def _bring(image: ConceptImage, index: int) -> tuple[SceneObject, Use]:
    item = image.scene.objects[index]
    word = _a(item.shape)
    return item, Use(look=image.words[word], target=word, object=None, image=image.number, word=word)


def _bystander(rng: np.random.Generator, *items: SceneObject) -> SceneObject:
    """An object that differs from all of these in class and colour."""
    while True:
        other = _scene(rng).objects[0]
        if all(other.shape != item.shape and other.color != item.color for item in items):
            return other


def _objects_case(
    rng: np.random.Generator, brought: Sequence[Brought], kind: str | None = None, *, names_bystander: bool = False
) -> Case:
    """Two objects side by side, in random order, before the background `kind`, or a random one.

    The prompt says nothing of their looks; with `names_bystander`, those of objects without a concept.
    """
    left, right = (brought[i] for i in rng.permutation(2))
    kind = kind or str(rng.choice(tuple(BACKGROUNDS)))
    tone, seed = float(rng.uniform()), int(rng.integers(2**31))
    scene = Scene(
        objects=(_put(left[0], 0.25), _put(right[0], 0.75)),
        light=_light(),
        background=Background(kind=kind, horizon=ROW_HORIZON, tone=tone, seed=seed),
    )
    named = [
        _a(f"{item.color} {item.texture} {item.shape}" if names_bystander and use is None else item.shape)
        for item, use in (left, right)
    ]
    prompt = f"{' to the left of '.join(named)} {BACKGROUNDS[kind]}"
    twins = left[0].shape == right[0].shape
    uses = tuple(
        replace(use, object=number, target=f"{use.target}#{number + 1}" if twins else use.target)
        for number, (_, use) in enumerate((left, right))
        if use is not None
    )
    return Case(prompt=prompt, scene=scene, uses=uses)


def _put(item: SceneObject, x: float) -> SceneObject:
    return replace(item, x=x, y=ROW_HEIGHT, size=ROW_SIZE, accent=accent_of(item.rgb))
