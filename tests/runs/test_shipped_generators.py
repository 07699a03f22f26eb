"""The shipped generators: of the shipped tokenizer's codes, small, and drawing the classes that they are asked for."""

from dataclasses import replace

import pytest

from mergevq_jax.commands.compare import read_samples
from mergevq_jax.commands.sample import Request, sample
from mergevq_jax.evaluate.frechet import Moments
from mergevq_jax.evaluate.generation import measure
from mergevq_jax.generator.model import load_generator
from mergevq_jax.generator.sampling.plan import SamplingConfig
from mergevq_jax.pretrained import GENERATORS
from mini_scenes import CLASSES
from mini_scenes.judge import Judge

GUIDED = Request(num=48, batch_size=48, sampling=SamplingConfig(cfg_scale=3.5))
LINEAR = SamplingConfig(cfg_scale=6.0, cfg_schedule="linear")
# What is asked for, and a bound of the share of the right class, well below what docs/results.md has.
ASKED = {
    "tiny-mergear": (GUIDED, 0.8),
    "tiny-plain": (GUIDED, 0.8),
    "tiny-randar": (replace(GUIDED, keep=256, sampling=LINEAR, steps=32), 0.7),
}


def test_all_are_known():
    assert set(GENERATORS) == set(ASKED)


def test_fingerprints_are_those_of_samples_drawn_before():
    found = {name: load_generator(name).fingerprint()[:8] for name in GENERATORS}
    assert found == {"tiny-mergear": "467b1bdc", "tiny-plain": "765f350a", "tiny-randar": "4d9f72f4"}


@pytest.mark.parametrize("name", sorted(ASKED))
def test_it_draws_the_classes_that_it_is_asked_for(name, tmp_path):
    model = load_generator(name)
    assert model.info.classes == CLASSES and model.info.tokenizer.name == "tiny"
    assert sum(path.stat().st_size for path in GENERATORS[name].iterdir()) < 6e6
    request, bound = ASKED[name]
    sample(name, request, out=tmp_path)
    drawn, judge = read_samples(tmp_path).samples, Judge.load()
    quality = measure(judge, [drawn], Moments.of(judge.features(drawn.images)))
    assert quality.accuracy.mean > bound
