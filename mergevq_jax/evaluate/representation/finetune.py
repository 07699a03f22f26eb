"""Fine-tuning: the whole encoder and a linear layer, lower layers at lower learning rates.

Axes: B batch, F features, C classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mergevq_jax.evaluate.representation.encoders import Encoder
from mergevq_jax.evaluate.representation.probe import EPSILON, INITIAL, ProbeConfig
from runtime_jax.data import DataConfig, ResizedCropConfig, SourceConfig, make_batches
from runtime_jax.files import AnyPath
from runtime_jax.prng import Stream, stream_key
from runtime_jax.training.network import Means, train_network
from runtime_jax.training.stop import StoppedError
from runtime_jax.training.update import Params
from runtime_jax.weights.fingerprint import fingerprint

ENCODER, HEAD = "encoder", "head"  # names of the two parts' parameters


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ProbeConfig):
    """AdamW with a cosine schedule, on random parts of the images.

    layer_decay: factor on the learning rate from each layer to the one below, from the linear layer down.
    smoothing: share of a label that is spread over all classes.
    crop_area: bounds of a part's share of an image's area.
    flip: mirror half of the parts.
    """

    epochs: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    smoothing: float = 0.1
    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.layer_decay <= 1 or not 0 <= self.smoothing < 1:
            raise ValueError(f"finetune: layer_decay={self.layer_decay} is in (0, 1], smoothing in [0, 1)")
        ResizedCropConfig(area=self.crop_area)


def finetuned(
    encoder: Encoder,
    pooling: str,
    source: SourceConfig,
    count: int,
    *,
    classes: int,
    seed: int,
    config: FinetuneConfig,
    workdir: AnyPath,
) -> tuple[Encoder, Params]:
    """The encoder after fine-tuning on a source of `count` images, and its linear layer.

    All processes call it together. A run that is started again in `workdir` goes on.

    Raises:
      ValueError: fewer training images than a batch.
      StoppedError: by a signal, after a checkpoint.
    """
    protocol = asdict(config) | {"seed": seed, "classes": classes, "encoder": fingerprint(encoder.params)}
    width = encoder.shapes()[pooling].shape[-1]
    crop = ResizedCropConfig(area=config.crop_area)
    data = DataConfig(
        image_size=encoder.size,
        batch_size=config.batch_size,
        sources=(replace(source, crop_scale=None),),
        seed=seed,
        resized_crop=crop,
        flip=config.flip,
    )
    result = train_network(
        config.training(count),
        workdir,
        resolved_config={"finetune": protocol},
        must_match=("finetune",),
        init=lambda: {
            ENCODER: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), encoder.params),
            HEAD: {
                "kernel": INITIAL * jax.random.normal(stream_key(seed, Stream.PARAMS), (width, classes)),
                "bias": jnp.zeros(classes),
            },
        },
        loss=_loss(encoder, pooling, config.smoothing),
        batches=lambda start: _images_and_labels(make_batches(data, start)),
        dtype="float32",
        rates=lambda path: rate(path, encoder, config.layer_decay),
        start={ENCODER: jax.device_get(encoder.params)},
    )
    if result.stopped_by is not None:
        raise StoppedError(result.stopped_by, f" after step {result.step} of fine-tuning; the same command goes on")
    params = jax.device_get(result.state.params)
    return replace(encoder, params=params[ENCODER]), params[HEAD]


def rate(path: str, encoder: Encoder, layer_decay: float) -> float | Float[np.ndarray, "layers"]:
    """The factor on a parameter's learning rate, as MAE's: 1 after the last block, `layer_decay` times less a layer."""
    part, _, rest = path.partition("/")
    return 1.0 if part == HEAD else layer_decay ** (1.0 * encoder.layers - encoder.depth(rest))


def _images_and_labels(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
    for batch in batches:
        yield {name: batch[name] for name in ("image", "label")}


def _loss(
    encoder: Encoder, pooling: str, smoothing: float
) -> Callable[[Params, dict[str, Array], Array], tuple[Array, Means]]:
    def loss(params: Params, batch: dict[str, Array], step: Array) -> tuple[Array, Means]:
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        logits = classify(encoder.apply(params[ENCODER], images)[pooling], params[HEAD])
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), smoothing)
        accuracy = jnp.mean(logits.argmax(axis=-1) == batch["label"])
        return optax.softmax_cross_entropy(logits, target).mean(), {"accuracy": accuracy}

    return loss


def classify(features: Float[Array, "B F"], head: Params) -> Float[Array, "B C"]:
    """Logits by batch normalisation without parameters, with the statistics of these features, and a linear layer."""
    mean = jnp.mean(features, axis=0, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(features - mean), axis=0, keepdims=True) + EPSILON)
    return (features - mean) / deviation @ head["kernel"] + head["bias"][None]
