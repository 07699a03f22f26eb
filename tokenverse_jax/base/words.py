"""What captions say: the targets of both text encoders before they see pictures.

FLUX's encoders know words before they see a picture. Ours learn from captions alone, first. T5 learns which adjective
belongs to which noun, `words`: without this, it needs most of a training to learn it as soon as there are two objects.
It remains T5's auxiliary target afterwards. CLIP's pooled output learns which words a caption has, `bags`. The heads
that predict them are discarded in the end.

Axes: B batch, T text tokens, A attributes, F features (all values of all attributes), V phrases.
"""

import re
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, Int32

from mini_scenes import BACKGROUNDS, CLASSES, COLORS, LIGHT_WARMTHS, POSES, TEXTURES
from mini_scenes.captions import FROM
from mini_scenes.judge.captions import objects_in
from mini_scenes.scene import MAX_IN_A_ROW
from tokenverse_jax.flux.words import Tokenizer

MOST_OBJECTS = 2 * MAX_IN_A_ROW  # of a caption: two pictures side by side
# Values of the attributes: class, colour, texture, pose, and which object of the caption it is.
VALUES = (CLASSES, tuple(COLORS), TEXTURES, tuple(POSES), tuple(range(MOST_OBJECTS)))
UNSAID = -1
# The phrases of a caption whose presence CLIP tells.
PHRASES = (
    *(*CLASSES, *COLORS, *TEXTURES, *POSES, *BACKGROUNDS.values(), "a drawing of"),
    *(f"in {warmth} light" for warmth in LIGHT_WARMTHS if warmth != "neutral"),
    *(f"lit from {side}" for side in FROM.values()),
)
_FINDERS = tuple(re.compile(rf"\b{phrase}\b") for phrase in PHRASES)


def words(tokenizer: Tokenizer, captions: Sequence[str], length: int) -> Int32[np.ndarray, "B T A"]:
    """For every token, the numbers of the values that the caption gives its object; UNSAID elsewhere.

    Captions have at most `length` tokens and MOST_OBJECTS objects.
    """
    found = np.full((len(captions), length, len(VALUES)), UNSAID, np.int32)
    for row, caption in zip(found, captions, strict=True):
        spans = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        for order, (span, item) in enumerate(objects_in(caption)):
            tokens = [i for i, (start, end) in enumerate(spans) if max(start, span.start) < min(end, span.stop)]
            said = zip(VALUES, (item.shape, item.color, item.texture, item.pose, order), strict=True)
            row[tokens] = [UNSAID if value is None else values.index(value) for values, value in said]
    return found


class WordsHead(nn.Module):
    """Scores of all values, from T5's output."""

    @nn.compact
    def __call__(self, txt: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        features = sum(map(len, VALUES))
        return nn.Dense(features, name="out_layer", kernel_init=nn.initializers.zeros)(txt.astype(jnp.float32))


def words_loss(scores: Float[Array, "B T F"], truth: Int[Array, "B T A"]) -> Float[Array, ""]:
    """Mean cross-entropy of the named values, in nats; 0 if there are none."""
    parts = jnp.split(scores, np.cumsum([len(values) for values in VALUES])[:-1], axis=-1)
    said = truth != UNSAID
    found = [
        optax.softmax_cross_entropy_with_integer_labels(part, jnp.maximum(truth[..., number], 0))
        for number, part in enumerate(parts)
    ]
    return jnp.sum(jnp.stack(found, axis=-1) * said) / jnp.maximum(jnp.sum(said), 1)


def bags(captions: Sequence[str]) -> Float32[np.ndarray, "B V"]:
    """1 for each of PHRASES that a caption has, 0 for the others."""
    found = [[finder.search(caption) is not None for finder in _FINDERS] for caption in captions]
    return np.asarray(found, np.float32).reshape(len(captions), len(PHRASES))


class BagHead(nn.Module):
    """Scores of PHRASES, from CLIP's pooled output."""

    @nn.compact
    def __call__(self, vec: Float[Array, "B P"]) -> Float[Array, "B V"]:
        return nn.Dense(len(PHRASES), name="out_layer", kernel_init=nn.initializers.zeros)(vec.astype(jnp.float32))


def bag_loss(scores: Float[Array, "B V"], truth: Float[Array, "B V"]) -> Float[Array, ""]:
    """Mean over captions of the sum of binary cross-entropies, in nats."""
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(scores, truth), axis=-1))
