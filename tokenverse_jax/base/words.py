"""What captions say of each object: T5's target before it sees pictures, and its auxiliary target afterwards.

FLUX's T5 knows which adjective belongs to which noun before it sees a picture. Without this, ours needs most of a
training to learn it as soon as there are two objects. The head that predicts it is discarded in the end.

Axes: B batch, T text tokens, A attributes, F features (all values of all attributes).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32

from mini_scenes import CLASSES, COLORS, POSES, TEXTURES
from mini_scenes.judge.captions import objects_in
from mini_scenes.scene import MAX_IN_A_ROW
from tokenverse_jax.flux.words import Tokenizer

MOST_OBJECTS = 2 * MAX_IN_A_ROW  # of a caption: two pictures side by side
# Values of the attributes: class, colour, texture, pose, and which object of the caption it is.
VALUES = (CLASSES, tuple(COLORS), TEXTURES, tuple(POSES), tuple(range(MOST_OBJECTS)))
UNSAID = -1


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
