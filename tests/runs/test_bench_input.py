"""mergevq bench-input: what it reports, and inputs that it refuses."""

import re

import numpy as np
import pytest

from mergevq_jax.cli import main
from mergevq_jax.commands import bench_input as bench
from mergevq_jax.generator.data import TokensConfig
from runtime_jax.data import DataConfig, SourceConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from generator_run_tools import write_pictures

    return str(write_pictures(tmp_path_factory.mktemp("pictures")))


def test_report(folder, capsys):
    args = ["bench-input", "--folder", folder, "--seconds", "0.1", "--steps-per-second", "2", "--hosts", "4"]
    assert main(args) == 0
    out = capsys.readouterr().out
    alone, share = re.search(r"alone +(\d+) images/s", out), re.search(r"(\d\.\d\d) of decoding alone", out)
    assert int(alone[1]) > 0 and 0 < float(share[1]) <= 1.5
    assert "training        128 images/s per host take" in out and "(256 images x 2 steps/s / 4 hosts)" in out


def test_cores_follow_from_the_rate(monkeypatch):
    rates = bench.Rates(np.full(3, 1000.0), np.array([700.0, 800.0, 900.0]), ["JPEG"])
    monkeypatch.setattr(bench, "measure", lambda config, seconds: rates)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 4)
    config = DataConfig(image_size=64, batch_size=800, sources=(SourceConfig(kind="photos"),), num_workers=3)
    for steps, verdict in ((2.9, "3 workers on the 4 cores of this machine feed it"), (3.1, "do not feed it")):
        report = bench.bench_input(config, steps_per_second=steps)
        assert f"{steps:.2f} cores" in report and verdict in report and "0.80 of decoding alone" in report


def test_synthetic_pictures_decode():
    with bench.synthetic_source(80, 60) as source:
        rates = bench.measure(DataConfig(image_size=32, batch_size=4, sources=(source,)), 0.1)
    assert rates.kinds[0] == "JPEG 80 x 60" and 0 < rates.share < 1.5


def test_what_cannot_be_measured():
    photos = DataConfig(image_size=32, batch_size=4, sources=(SourceConfig(kind="photos"),))
    for config, options, message in (
        (photos, {}, "decoded once"),
        (TokensConfig(folders=("a",), batch_size=2), {}, "data are codes"),
        (photos, {"seconds": 0.0}, "more than 0"),
        (photos, {"steps_per_second": -1.0}, "more than 0"),
        (photos, {"source": photos.sources[0], "synthetic": True}, "either --synthetic or a source"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.bench_input(config, **options)
