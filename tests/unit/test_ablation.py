"""The report of benchmarks/ablation.py, from made-up figures."""

from types import SimpleNamespace

import pytest

from benchmarks import ablation
from runtime_jax.data import decode_image
from runtime_jax.files import write_json
from runtime_jax.pictures import plot_intervals


@pytest.fixture
def measured(tmp_path):
    """Read from evaluations of two seeds."""
    config = ablation.read_config("gr", 1, teacher="t", steps=60, data_dir="d")
    keeps = config.evaluation.keeps
    rebuilt = [
        {
            "tokenizer": name,
            "keep": keep,
            "source_map": source_map,
            "psnr": {"mean": keep / 4 + seed - (source_map == "recovered")},
        }
        for seed, name in reversed(list(enumerate(("a", "b"))))  # figures belong to tokenizers by name
        for keep in keeps
        for source_map in ("true", "recovered")
    ]
    probed = [
        {"name": name, "keep": keep, "pooling": pooling, "linear": {"mean": 10.0 + seed}}
        for pooling in ablation.POOLINGS
        for keep in keeps
        for seed, name in enumerate(("a", "b"))
    ]
    compared = {
        ("pixels", None, "pixels"): 14.0,
        ("t/teacher", None, "mean"): 15.0,
        ("random weights", 64, "mean"): 9.0,
    }
    probed += [
        {"name": name, "keep": keep, "pooling": pooling, "linear": {"mean": mean}}
        for (name, keep, pooling), mean in compared.items()
    ]
    for name, results in (("pixels", rebuilt), ("features", probed)):
        write_json(tmp_path / name / "results.json", {"results": results})
    return ablation.Measured.read(tmp_path / "pixels", tmp_path / "features", ("a", "b"), config)


def test_a_report_has_all_figures(measured):
    assert measured.cells[36] == {
        "psnr": (9.0, 10.0),
        "recovered": (8.0, 9.0),
        "class": (10.0, 11.0),
        "mean": (10.0, 11.0),
    }
    text = ablation.report({"gr": measured, "gr-unaligned": measured})
    assert "| G+R | 36 | 56 | 9.50 ± 6.35 | 8.50 ± 6.35 | 10.5 ± 6.4 | 10.5 ± 6.4 |" in text
    # Seeds are compared with themselves.
    assert "| fewer kept tokens | G+R, K = 36 | G+R, K = 64 | -7.00 ± 0.00 |" in text and "| variant, all" not in text
    assert "| alignment | G+R, K = 36 | G+R without alignment, K = 36 | 0.00 ± 0.00 |" in text
    assert text.count("| - | pixels | - | pixels | 14.0 |") == 1 and "| - | teacher | - | mean | 15.0 |" in text
    assert text.count("| random weights | 64 | mean | 9.0 |") == 1
    assert set(ablation.panels({"gr": measured})) == {
        "PSNR, dB",
        "PSNR with recovered maps, dB",
        "linear probe, class, %",
        "linear probe, mean, %",
    }


def test_differences_are_drawn_with_their_intervals(measured, tmp_path):
    found = ablation.interval_panels(ablation.differences({"gr": measured, "gr-unaligned": measured}))
    assert found["PSNR, dB"]["fewer kept tokens: G+R 36 - G+R 64"][0] == -7.0
    assert found["PSNR, dB"]["alignment: G+R 36 - G+R without alignment 36"][0] == 0.0
    plot_intervals(found, tmp_path / "differences.png")
    assert decode_image((tmp_path / "differences.png").read_bytes()).std() > 10


@pytest.mark.parametrize("trend", ablation.TRENDS)
def test_what_a_report_compares_is_measured(trend):
    for variant, keep in (trend.one, trend.other):
        config = ablation.read_config(variant, 0, teacher="t", steps=None, data_dir="d")
        assert keep in config.evaluation.keeps


def test_a_shorter_training_has_the_same_phases():
    short = ablation.read_config("r-unaligned", 2, teacher="t", steps=60, data_dir="d")
    assert (short.seed, short.data.seed, short.loop.duration.steps) == (2, 2, 60)
    assert (short.losses.discriminator_start, short.optimizer.warmup.steps, short.loop.eval_every) == (45, 2, 60)


def test_probes_have_the_settings_for_few_images(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ablation, "train", lambda config, workdir: SimpleNamespace(stopped_by=None))
    monkeypatch.setattr(ablation.reconstruction, "evaluate", lambda request, out: None)
    monkeypatch.setattr(ablation.representation, "evaluate", lambda request, out: asked.append(request.config.linear))
    monkeypatch.setattr(ablation.Measured, "read", lambda *args: ablation.Measured(64, {}, {}))
    ablation.measure("gr", 2, teacher="t", out=tmp_path, steps=60, data_dir="d")
    assert [(probe.batch_size, probe.learning_rate) for probe in asked] == [(128, 1e-2)]


def test_another_ablation_in_the_folder_is_refused(tmp_path):
    assert ablation.check_same(tmp_path, "abc", 60, None) == (60, 3)
    assert ablation.check_same(tmp_path, "abc", None, None) == (60, 3)
    for other in (("abd", 60, 3), ("abc", 70, 3), ("abc", 60, 2)):
        with pytest.raises(ValueError, match=r"'steps': 60.*another --out"):
            ablation.check_same(tmp_path, *other)


def test_figures_of_a_variant_are_kept_and_not_measured_again(measured, tmp_path, monkeypatch):
    measured.save(tmp_path / "gr.json")
    monkeypatch.setattr(ablation, "train", None)
    found = ablation.measure("gr", 2, teacher="t", out=tmp_path, steps=60, data_dir="d")
    assert found == measured
