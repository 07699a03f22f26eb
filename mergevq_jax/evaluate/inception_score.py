"""Inception Score (Salimans et al., arXiv 1606.03498). On the host, in float64.

Axes: N images, C classes.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax

SEED = 2020  # with it, splits are those of torch-fidelity


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits."""

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "N C"], examples: Int[np.ndarray, "N"], *, splits: int = 10, seed: int = SEED
) -> InceptionScore:
    """exp of the mean KL divergence from the average class distribution, of each of several splits.

    A split that holds only some of the classes scores too low. So images are sorted by number, permuted with the seed
    and then split: the result depends neither on the order of rows nor on images being sorted by class. It grows with
    the size of a split: compare equal numbers of images and splits only.

    Args:
      logits: of any classifier; published figures use Inception's 1008 without bias.
      examples: the number of each image among all; every number once.

    Raises:
      ValueError: fewer images than splits, a number that occurs twice, wrong shapes, or logits that are not finite.
    """
    logits, examples = np.asarray(logits), np.asarray(examples)
    if logits.ndim != 2 or examples.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)} and examples {list(examples.shape)}: [N, C] and [N] are needed")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{splits} splits of {len(logits)} images: 1 to {len(logits)} are possible")
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    order = np.argsort(examples)
    if repeated := int((np.diff(examples[order]) == 0).sum()):
        raise ValueError(f"{repeated} examples occur twice")
    order = order[np.random.RandomState(seed).permutation(len(order))]
    bounds = [len(order) * split // splits for split in range(splits + 1)]
    scores = [_score(logits[order[start:end]]) for start, end in itertools.pairwise(bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(logits: Float[np.ndarray, "N C"]) -> float:
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    p = np.exp(log_p)
    # p log p is zero for a probability that is.
    average = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - average)).sum(axis=1).mean()))
