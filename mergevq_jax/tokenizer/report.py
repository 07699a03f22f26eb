"""Reconstructions at several K, as numbers and as a picture with the merged groups outlined."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from mergevq_jax.evaluate.pixels import psnr
from mergevq_jax.evaluate.reconstruction import CodeUsage
from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax.estimate import Estimate, estimate
from runtime_jax.pictures import image_grid, outline_groups

Images = UInt8[np.ndarray, "N H W 3"]


@dataclass(frozen=True)
class Reconstruction:
    """Quality and code usage at one K over a set of images."""

    keep: int
    psnr: Estimate  # dB, mean over images
    recovered_psnr: Estimate | None  # with the recovered source map; None: no source recovery
    usage: CodeUsage


def measure(tokenizer: Tokenizer, images: Images, keeps: Sequence[int], *, batch_size: int) -> list[Reconstruction]:
    """PSNR and code usage at every K."""
    config, results = tokenizer.config, []
    recovers = config.recovery is not None and images.shape[1:3] == (config.resolution, config.resolution)
    quiet = True if jax.process_index() > 0 else None
    for keep in keeps:
        usage, values = CodeUsage(config.vocab_size), np.zeros((2, len(images)))
        for start in tqdm(range(0, len(images), batch_size), desc=f"K={keep}", leave=False, disable=quiet):
            batch = images[start : start + batch_size]
            tokens = tokenizer.encode(_padded(batch, batch_size), keep=keep)
            usage.update(np.asarray(tokens.indices)[: len(batch)])
            rows = slice(start, start + batch_size)
            values[0, rows] = psnr(np.asarray(tokenizer.decode(tokens))[: len(batch)], batch)
            if recovers:
                guessed = tokenizer.decode(tokenizer.recovered(tokens))
                values[1, rows] = psnr(np.asarray(guessed)[: len(batch)], batch)
        direct, recovered = (estimate(row) for row in values)
        results.append(Reconstruction(keep, direct, recovered if recovers else None, usage))
    return results


def _padded(images: Images, batch_size: int) -> UInt8[np.ndarray, "padded H W 3"]:
    """Fills the last batch with copies of the last image, so that one compiled program serves any number of images."""
    missing = -len(images) % batch_size
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])


def picture(
    tokenizer: Tokenizer, images: Images, keeps: Sequence[int], *, batch_size: int, scale: int = 2
) -> UInt8[np.ndarray, "h w 3"]:
    """One row per image: the original, then for every K the reconstruction and the original with groups outlined."""
    columns: list[Sequence[np.ndarray]] = [_enlarged(images, scale)]
    labels = ["original"]
    for keep in keeps:
        tokens = tokenizer.encode(_padded(images, batch_size), keep=keep)
        rebuilt = np.asarray(tokenizer.decode(tokens))[: len(images)]
        columns.append(_enlarged(rebuilt, scale))
        maps = np.asarray(tokens.source_map)[: len(images)]
        outlined = zip(images, maps, strict=True)
        columns.append([outline_groups(image, groups, grid=tokens.grid, scale=scale) for image, groups in outlined])
        labels += [f"K = {keep}\n{np.mean(psnr(rebuilt, images)):.1f} dB", f"{keep} groups of {maps.shape[1]}"]
    return image_grid(list(zip(*columns, strict=True)), column_labels=labels)


def _enlarged(images: Images, scale: int) -> UInt8[np.ndarray, "N height width 3"]:
    return images.repeat(scale, axis=1).repeat(scale, axis=2)
