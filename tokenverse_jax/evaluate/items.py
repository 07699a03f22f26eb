"""What is drawn: every image's prompts, and the tasks' prompts, each with the concepts on its words."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime_jax.messages import cut
from tokenverse_jax.evaluate.benchmark import Benchmark, Picture, slug
from tokenverse_jax.flux.words import Tokenizer, find_word


@dataclass(frozen=True, kw_only=True)
class Use:
    """A concept in a prompt: a word of an image, put on the word `target`."""

    image: str
    word: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt to draw.

    task: the image's category, or the task's name.
    names: for each concept, where its files are, as collection/prompt; DreamBench++'s for one concept of one image.
    number: of the item; with the seed it determines the noise.
    prompt_number: of an image's prompts; None: of a task.
    """

    task: str
    prompt: str
    uses: tuple[Use, ...]
    names: tuple[str, ...]
    number: int
    prompt_number: int | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the images that its concepts come from."""
        return tuple(dict.fromkeys(use.image for use in self.uses))


def make_items(benchmark: Benchmark, tokenizer: Tokenizer) -> list[Item]:
    """All items: first the images' prompts, with those of the image's words that they contain, then the tasks'.

    Raises:
      ValueError: a prompt that contains none of its image's words, or a task's that lacks a target; two items whose
        files would have the same names.
    """
    items, without = [], []
    for picture in benchmark.pictures.values():
        for number, prompt in enumerate(picture.prompts):
            words = [word.word for word in picture.words if _contains(tokenizer, prompt, word.word)]
            if not words:
                without.append(f"{picture.name} {prompt!r} (words: {', '.join(word.word for word in picture.words)})")
            uses = tuple(Use(image=picture.name, word=word, target=word) for word in words)
            names = tuple(f"{name}/{number}" for name in _collections(picture, words))
            item = {"task": picture.category, "prompt": prompt, "uses": uses, "names": names}
            items.append(Item(**item, number=len(items), prompt_number=number))
    if without:
        raise ValueError(
            f"{benchmark.path}: {len(without)} of {len(items)} prompts contain none of the words to learn from their "
            f"image; give the words in tokenverse.json: {cut(without, '; ', most=3)}"
        )
    counts: Counter[str] = Counter()
    for entry in benchmark.tasks:
        uses = tuple(Use(image=use.image, word=use.word, target=use.target or use.word) for use in entry.concepts)
        for use in uses:
            find_word(tokenizer, entry.prompt, use.target)
        base = f"{slug(entry.task)}_{counts[entry.task]:03}"
        names = tuple(f"{base}_{i}_{slug(use.word)}/0" for i, use in enumerate(uses))
        items.append(Item(task=entry.task, prompt=entry.prompt, uses=uses, names=names, number=len(items)))
        counts[entry.task] += 1
    twins = [name for name, count in Counter(name for item in items for name in item.names).items() if count > 1]
    if twins:
        raise ValueError(f"{benchmark.path}: two prompts have the same files: {cut(twins)}")
    return items


def _contains(tokenizer: Tokenizer, prompt: str, word: str) -> bool:
    try:
        find_word(tokenizer, prompt, word)
    except ValueError:
        return False
    return True


def _collections(picture: Picture, words: Sequence[str]) -> Iterator[str]:
    for i, word in enumerate(words):
        yield picture.collection if len(words) == 1 else f"{picture.collection}_{i}_{slug(word)}"


def units(items: Sequence[Item]) -> list[int]:
    """For each item the number of its unit: items of a task that share images, directly or through others, are one."""
    unit_of: dict[tuple[str, str], int] = {}  # by task and image
    for number, item in enumerate(items):
        old = {unit_of[item.task, image] for image in item.images if (item.task, image) in unit_of}
        unit_of |= {(item.task, image): number for image in item.images}
        unit_of |= {key: number for key, unit in unit_of.items() if unit in old}
    return [unit_of[item.task, item.images[0]] for item in items]
