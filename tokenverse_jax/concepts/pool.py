"""The base model's images that the isolation loss puts beside a concept's; drawn once and kept on disk."""

import hashlib
import json
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import UInt8

from runtime_jax import hosts
from runtime_jax.config import to_dict
from runtime_jax.data import decode_image
from runtime_jax.files import AnyPath, read_bytes, write_text
from runtime_jax.pictures import save_png
from runtime_jax.sharding import to_host
from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.flux.pipeline import Pipeline, PromptEncoding
from tokenverse_jax.flux.sampling import SamplingConfig


def make_pool(
    pipeline: Pipeline,
    prompts: PromptEncoding,
    config: IsolationConfig,
    *,
    size: int,
    sampling: SamplingConfig,
    cache: AnyPath,
    weights: Mapping[str, str],
    negative: PromptEncoding | None = None,
) -> UInt8[np.ndarray, "K H W 3"]:
    """The images of the pool, drawn by the base model or read from disk.

    They are PNG files in a folder of `cache`, named by a hash of the model's weights and everything else that they
    depend on, and written one by one, so that a program that is stopped loses none. Of several processes, process 0
    reads and writes them.

    Args:
      pipeline: with transformer and autoencoder.
      prompts: the encoded captions of the pool.
      size: side of an image, pixels.
      weights: fingerprints of all parts of the model, the text encoders too.
      negative: for sampling.cfg_scale other than 1, see `Pipeline.generate`.

    Raises:
      ValueError: a file of the cache cannot be read, or the size is impossible.
    """
    settings = {
        "weights": dict(sorted(weights.items())),
        "schedule": to_dict(pipeline.schedule),
        "dtype": pipeline.compute.dtype,
        "captions": config.captions,
        "size": size,
        "sampling": to_dict(sampling),
    }
    text = json.dumps(settings, indent=2)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    if jax.process_index() == 0:
        write_text(folder / "pool.json", text + "\n")
    paths = [folder / f"{i:03}.png" for i in range(len(config.captions))]
    for i in np.flatnonzero(hosts.from_first(np.array([not path.is_file() for path in paths]))):
        prompt = PromptEncoding(*(array[i : i + 1] for array in prompts))
        image = pipeline.generate(
            prompt, height=size, width=size, examples=np.array([i]), negative_prompt=negative, **vars(sampling)
        )
        image = to_host(image)[0]
        if jax.process_index() == 0:
            save_png(paths[i], image)
    images = np.zeros((len(paths), size, size, 3), np.uint8)
    if jax.process_index() == 0:
        images = np.stack([_read(path) for path in paths])
    return hosts.from_first(images)


def _read(path: AnyPath) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return decode_image(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it to have it drawn again") from error
