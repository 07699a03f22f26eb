"""`mergevq evaluate reconstruction` and `generation`: results are equal however the work was divided, and complete."""

import csv
import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generator_run_tools import RECOVERING, random_generator, random_tokenizer
from PIL import Image

from mergevq_jax import cli
from mergevq_jax.commands import sample
from mergevq_jax.commands.evaluate import generation, generation_report, reconstruction, reconstruction_task
from mergevq_jax.commands.evaluate.round_trip import round_trip
from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.features import FeatureNetwork, Features
from mergevq_jax.evaluate.frechet import Moments
from mergevq_jax.evaluate.images import SourceImages
from mergevq_jax.evaluate.statistics import Statistics, make_reference, write_reference
from mergevq_jax.tokenizer.losses.perceptual import LPIPS, TABLE, load_lpips
from mergevq_jax.tokenizer.model import Tokenizer, to_float
from runtime_jax.data import SourceConfig
from runtime_jax.weights import export_weights, write_safetensors
from runtime_jax.weights.fingerprint import fingerprint

COUNT = 70  # images: three parts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of 16 x 20 pixels, tokenizers of 16 and 8 pixels, and a generator of the latter's codes."""
    root, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (4, 5, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(root / "pictures" / f"{number:03d}.png")
    random_tokenizer(config=dataclasses.replace(RECOVERING, resolution=16, keep=40)).save_pretrained(root / "tokenizer")
    small = random_tokenizer()
    small.save_pretrained(root / "small")
    random_generator(small, str(root / "small")).save_pretrained(root / "generator")
    return root


@pytest.fixture(scope="module", autouse=True)
def few_subsets():
    """KID's subsets take most of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation_report, "KID_SUBSETS", 3)
        yield


@pytest.mark.parametrize("positions", ["none", "starts"])
def test_a_round_trip_is_that_of_the_tokenizer(positions):
    recovery = dataclasses.replace(RECOVERING.recovery, positions=positions)
    tokenizer = random_tokenizer(config=dataclasses.replace(RECOVERING, recovery=recovery))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    found, tokens = round_trip(tokenizer, jnp.asarray(images), 10), tokenizer.encode(images, keep=10)
    assert (found.indices == tokens.indices).all() and found.true.finite.all() and found.recovered.finite.all()
    assert (found.true.images == tokenizer.decode(tokens)).all()
    assert (found.recovered.images == tokenizer.decode(tokenizer.recovered(tokens))).all()
    assert (found.true.images != found.recovered.images).any()


def reconstruct(root, out, *more):
    """The command's exit status."""
    line = f"evaluate reconstruction --tokenizer {root}/tokenizer --folder {root}/pictures --batch-size 16"
    return cli.main([*line.split(), "--keep", "40", "64", "--out", str(out), *more])


def generate(root, out, *more, reference="pictures"):
    line = (
        f"evaluate generation --model {root}/generator --cfg-scale 1 2 --num-images {COUNT} --keep 10 --batch-size 16"
    )
    return cli.main([*line.split(), "--reference", str(root / reference), "--out", str(out), *more])


COMMANDS = {"reconstruction": reconstruct, "generation": generate}
CALLS = {"reconstruction": (reconstruction_task, "round_trip"), "generation": (sample, "draw_batch")}  # of each batch


@pytest.fixture(scope="module")
def whole(root):
    """What an undisturbed run of each command wrote."""
    for name, command in COMMANDS.items():
        assert command(root, root / name) == 0
    return {name: files(root / name) for name in COMMANDS}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_written(root, whole, name):
    both = {"summary.md", "results.json"}
    assert (
        whole[name].keys()
        == both
        | {
            "reconstruction": {"per_image.csv", "reconstructions.png"},
            "generation": {"samples.png", "sweep.png"},
        }[name]
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stopped_command_goes_on_bit_equal(root, whole, tmp_path, monkeypatch, capsys, name):
    """The signal comes in the second part; a file that a killed write left behind changes nothing."""
    module, function = CALLS[name]
    calls, do = [], getattr(module, function)

    def signalled(*args, **options):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return do(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, signalled)
        assert COMMANDS[name](root, tmp_path / "out") == 143
    assert "stopped by SIGTERM; the same command measures the parts that are missing" in capsys.readouterr().out
    done = sorted((tmp_path / "out" / "parts").glob("*/0*.npz"))
    assert done and not (tmp_path / "out" / "results.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in done}
    (done[0].parent / ".1.partial.000001.npz").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr("mergevq_jax.evaluate.parts.Measured.column", kept_first(kept))
        assert COMMANDS[name](root, tmp_path / "out") == 0
    assert files(tmp_path / "out") == whole[name]


def kept_first(kept):
    """Looks, when results are put together, that no part was measured again."""
    from mergevq_jax.evaluate.parts import Measured

    column = Measured.column

    def checked(self, name):
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        return column(self, name)

    return checked


@pytest.mark.parametrize("name", COMMANDS)
def test_devices_and_batches_change_nothing(root, whole, tmp_path, monkeypatch, name):
    """But for float32 rounding: programs are compiled for a size of batch."""
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    assert COMMANDS[name](root, tmp_path, "--batch-size", "8") == 0
    found = files(tmp_path)
    assert found.keys() == whole[name].keys()
    assert_close(*(json.loads(results["results.json"]) for results in (found, whole[name])))
    if name == "reconstruction":
        ours, theirs = (values(results["per_image.csv"]) for results in (found, whole[name]))
        assert np.isclose(ours, theirs, rtol=1e-4).mean() > 0.95


def values(lines):
    """PSNR of each line."""
    return [float(line["psnr"]) for line in csv.DictReader(lines.decode().splitlines())]


def assert_close(ours, theirs):
    """Results are equal, and numbers nearly so."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key not in ("sha256", "hash") or value == theirs[key]:
                assert_close(value, theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-3) if isinstance(theirs, float) else theirs)


def test_results_of_reconstructions(root, whole):
    """Every figure has its protocol; per_image.csv has the values whose means the table shows."""
    results = json.loads(whole["reconstruction"]["results.json"])
    about = results["evaluation"]
    assert about["made_by"].keys() == {"jax", "jaxlib", "tokenverse-mergevq-jax", "device"}
    assert about["features"][0].keys() == {"network", "fingerprint", "resize"} and about["lpips"] is None
    assert about["tokenizers"] == {f"{root}/tokenizer": Tokenizer.from_pretrained(root / "tokenizer").fingerprint()}
    entries = {(entry["keep"], entry["source_map"]): entry for entry in results["results"]}
    assert entries.keys() == {(keep, maps) for keep in (40, 64) for maps in ("true", "recovered")}
    lines = list(csv.DictReader(whole["reconstruction"]["per_image.csv"].decode().splitlines()))
    assert len(lines) == 4 * COUNT
    for (keep, maps), entry in entries.items():
        assert entry["images"]["count"] == COUNT and entry["images"]["size"] == [16, 16]
        assert entry["images"]["crop"].startswith("largest centred square")
        assert len(entry["images"]["sha256"]) == len(entry["fingerprint"]) == 64
        distance = entry["frechet_distances"]["judge"]
        assert distance["name"] == "rFD (judge)" and distance["value"] > 0
        for reason in ("judge instead of Inception", "70 images instead of 50,000", "152 features"):
            assert reason in distance["warning"] and reason in whole["reconstruction"]["summary.md"].decode()
        own = [line for line in lines if line["keep"] == str(keep) and line["source_map"] == maps]
        for name in ("psnr", "ssim"):
            assert np.mean([float(line[name]) for line in own]) == pytest.approx(entry[name]["mean"], rel=1e-12)
        assert entry["codes"]["tokens"] == COUNT * keep
    # True maps are better than guesses of random weights; with K = L nothing but the code matters.
    assert entries[40, "true"]["psnr"] != entries[40, "recovered"]["psnr"]


def test_results_of_samples(root, whole):
    results = json.loads(whole["generation"]["results.json"])
    assert results["reference"]["images"]["count"] == COUNT and len(results["reference"]["hash"]) == 64
    assert [entry["samples"]["sampling"]["cfg_scale"] for entry in results["results"]] == [1, 2]
    for entry in results["results"]:
        assert {"fingerprint", "tokenizer", "keep", "sampling", "seed", "compute", "sha256"} <= entry["samples"].keys()
        assert entry["reference"]["hash"] == results["reference"]["hash"]
        assert entry["features"].keys() == {"network", "fingerprint", "resize"}
        for name in ("frechet_distance", "inception_score", "kernel_distance", "precision_recall"):
            assert entry[name] is not None, name
        assert entry["sfid"] is None  # the judge has no spatial features
        assert "70 reference images" in entry["warning"]


def test_a_finished_evaluation_is_shown_and_another_one_refused(root, whole, capsys, monkeypatch):
    monkeypatch.setattr(reconstruction, "measure", None)
    monkeypatch.setattr(generation, "measure", None)
    for name, command in COMMANDS.items():
        assert command(root, root / name) == 0
        assert whole[name]["summary.md"].decode() in capsys.readouterr().out
    assert reconstruct(root, root / "reconstruction", "--num-images", "50") == 1
    error = capsys.readouterr().err
    assert "holds another evaluation" in error and "count: 70 -> 50" in error
    assert generate(root, root / "generation", "--seed", "5") == 1
    assert "seed: 0 -> 5" in capsys.readouterr().err
    assert {name: files(root / name) for name in COMMANDS} == whole


def test_reconstructions_that_are_not_finite_are_counted(root, tmp_path, monkeypatch, capsys):
    do = reconstruction_task.round_trip

    def broken(tokenizer, images, keep):
        trip = do(tokenizer, images, keep)
        finite = trip.true.finite.at[jnp.array([3, 7])].set(keep != 64)
        return trip._replace(true=trip.true._replace(finite=finite))

    monkeypatch.setattr(reconstruction_task, "round_trip", broken)
    assert reconstruct(root, tmp_path / "out", "--batch-size", "32") == 1
    error = capsys.readouterr().err
    assert "2 of the 32 reconstructions of" in error and "at K = 64 with the true source map (image 3" in error
    assert not (tmp_path / "out").exists()  # nothing to resume from


def test_weights_that_are_not_finite(root, tmp_path, capsys):
    tokenizer = Tokenizer.from_pretrained(root / "tokenizer")
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), tokenizer.params["decoder"])
    dataclasses.replace(tokenizer, params=tokenizer.params | {"decoder": broken}).save_pretrained(tmp_path / "broken")
    assert reconstruct(root, tmp_path / "out", "--tokenizer", str(tmp_path / "broken")) == 1
    error = capsys.readouterr().err
    assert "32 of the 32 reconstructions" in error and "parameters that are not finite: tokenizer/decoder" in error


def test_statistics_of_a_reference_stand_for_its_images(root, whole, tmp_path):
    file = tmp_path / "reference.npz"
    assert generate(root, tmp_path / "first", "--save-reference", str(file)) == 0
    assert files(tmp_path / "first") == whole["generation"]
    assert generate(root, tmp_path / "second", reference=file) == 0
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second"))
    assert first["results"] == second["results"] and first["reference"] == second["reference"]
    assert (tmp_path / "second" / "summary.md").read_bytes() == whole["generation"]["summary.md"]


def test_draws_are_those_of_mergevq_sample(root, whole, tmp_path):
    line = (
        f"sample --model {root}/generator --num {COUNT} --keep 10 --cfg-scale 2 --batch-size 16 --out {tmp_path}/drawn"
    )
    assert cli.main(line.split()) == 0
    line = f"evaluate generation --samples {tmp_path}/drawn --reference {root}/pictures --batch-size 16"
    assert cli.main([*line.split(), "--out", str(tmp_path / "out")]) == 0
    (ours,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    theirs = json.loads(whole["generation"]["results.json"])["results"][1]
    for name in ("sha256", "fingerprint", "keep", "sampling", "steps", "seed", "compute"):
        assert ours["samples"][name] == theirs["samples"][name], name
    assert ours["frechet_distance"] == theirs["frechet_distance"]


def test_lpips_with_weights(root, tmp_path, monkeypatch):
    """Of a narrow VGG: the values are those of the network on reconstructions in 8 bits."""
    narrow = LPIPS(widths=(4,) * 5)
    monkeypatch.setattr(reconstruction_task, "LPIPS", lambda: narrow)
    monkeypatch.setattr(reconstruction, "load_lpips", functools.partial(load_lpips, widths=narrow.widths))
    params = narrow.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3)))["params"]
    write_safetensors(tmp_path / "lpips.safetensors", export_weights(TABLE, jax.device_get(params)), {})
    arguments = ["--num-images", "20", "--keep", "40", "--lpips", str(tmp_path / "lpips.safetensors")]
    assert reconstruct(root, tmp_path / "out", *arguments) == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["evaluation"]["lpips"]["fingerprint"] == fingerprint(jax.device_get(params))
    images = SourceImages(SourceConfig(kind="folder", path=str(root / "pictures")), 16, 20).read(range(20))
    rebuilt = Tokenizer.from_pretrained(root / "tokenizer").reconstruct(images, keep=40)
    expected = narrow.apply({"params": params}, to_float(rebuilt), to_float(images))
    lines = csv.DictReader((tmp_path / "out" / "per_image.csv").open())
    found = [float(line["lpips"]) for line in lines if line["source_map"] == "true"]
    assert np.min(expected) > 0 and np.allclose(found, expected, rtol=1e-3)
    assert "no weights" not in (tmp_path / "out" / "summary.md").read_text()


def toy_inception():
    """Features with which all metrics can be computed, in Inception's place."""

    def compute(params, images):
        x = images.astype(jnp.float32).reshape(len(images), -1) / 255
        return Features(x[:, :5], x[:, 5:9], 8 * x[:, 9:14])

    return FeatureNetwork("inception", "f" * 64, "none", {}, compute)


@pytest.fixture
def inception(monkeypatch):
    network = toy_inception()
    monkeypatch.setattr(results, "load_feature_network", lambda source: network)
    return network


def write_samples(path, count=60, size=8, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images, np.zeros(count, np.int64))
    return images


def test_files_of_samples_and_adms_reference(tmp_path, inception, capsys):
    """An npz, a folder of mergevq sample and a folder of pictures with the same images have the same figures."""
    images = write_samples(tmp_path / "a.npz")
    write_samples(tmp_path / "sampled" / "samples.npz")
    (tmp_path / "sampled" / "protocol.json").write_text(json.dumps({"fingerprint": "abc", "seed": 3, "labels": []}))
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number:02d}.png")
    real = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), np.uint8)
    found = toy_inception()(real)
    moments = {}
    for name, features in (("mu", found.pool), ("mu_s", found.spatial)):
        features = np.asarray(features, np.float64)
        moments |= {name: features.mean(axis=0), name.replace("mu", "sigma"): np.cov(features, rowvar=False)}
    np.savez(tmp_path / "adm.npz", real, **moments)
    np.savez(tmp_path / "images.npz", real)
    np.savez(tmp_path / "moments.npz", **moments)
    samples = ["--samples", *(str(tmp_path / name) for name in ("a.npz", "sampled", "pictures"))]
    entries = {}
    for name in ("adm", "images", "moments"):
        out = tmp_path / "out" / name
        reference = ["--reference", str(tmp_path / f"{name}.npz"), "--out", str(out)]
        assert cli.main(["evaluate", "generation", *samples, *reference]) == 0, capsys.readouterr().err
        entries[name] = json.loads((out / "results.json").read_text())["results"]
        assert "| samples | count | FID | sFID | IS |" in (out / "summary.md").read_text()
        for entry in entries[name]:
            own = {key: value for key, value in entry.items() if key not in ("name", "samples")}
            assert own == {key: value for key, value in entries[name][0].items() if key in own}
    assert entries["adm"][1]["samples"]["seed"] == 3 and entries["adm"][0]["reference"]["count"] is None
    for name in ("frechet_distance", "sfid"):
        values = [entries[reference][0][name] for reference in ("adm", "images", "moments")]
        values = [value["value"] if isinstance(value, dict) else value for value in values]
        assert values == pytest.approx([values[0]] * 3, rel=1e-9) and values[0] > 0
    for name in ("kernel_distance", "precision_recall"):
        assert entries["adm"][0][name] == entries["images"][0][name] and entries["moments"][0][name] is None


def test_two_networks_of_a_kind_are_refused(tmp_path, inception, capsys):
    write_samples(tmp_path / "a.npz")
    line = f"evaluate generation --samples {tmp_path}/a.npz --reference {tmp_path}/a.npz --out {tmp_path}/out"
    assert cli.main([*line.split(), "--features", "inception:a", "inception:b"]) == 1
    assert "--features inception:a inception:b: each kind of network once" in capsys.readouterr().err


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if a measurement begins."""
    for module in (reconstruction, generation):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("work has begun"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "999"], "cannot keep 999"),
        (["--keep", "40", "40"], "--keep 40 40: at least one, and each once"),
        (["--num-images", "71"], "71 of 70 images are wanted"),
        (["--num-images", "1"], "1 of 70 images are wanted; at least 2 are needed, for a covariance"),
        (["--num-images", "0"], "--num-images 0: at least 1"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--features", "vgg"], "feature network 'vgg'"),
        (["--features", "inception:/no/where"], "/no/where"),
        (["--lpips", "/no/where.safetensors"], "/no/where.safetensors"),
        (["--tokenizer", "/no/tokenizer"], "/no/tokenizer"),
        (["--tokenizer", "ROOT/small", "--keep", "10"], "SSIM needs images of at least 11 pixels"),
        (["--tfds", "x"], "exactly one of --folder and --tfds"),
        (["--metrics", "/no/metrics.jsonl"], "/no/metrics.jsonl: no such file"),
    ],
)
def test_bad_reconstructions_are_one_line(root, tmp_path, capsys, no_work, arguments, message):
    arguments = [argument.replace("ROOT", str(root)) for argument in arguments]
    assert reconstruct(root, tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "a.npz", "--model", "x"], "exactly one of --samples and --model"),
        ([], "exactly one of --samples and --model"),
        (["--samples", "none.npz"], "none.npz: no such file or folder"),
        (["--samples", "text.npz"], "text.npz: not an npz file with images arr_0"),
        (["--samples", "a.npz", "wide.npz"], "samples of one size are needed"),
        (["--samples", "a.npz", "b.npz"], "equal numbers of samples are needed (--num-images)"),
        (["--samples", "a.npz", "a.npz"], "each once"),
        (["--samples", "few.npz"], "few.npz: 5 images, at least 10 are needed"),
        (["--samples", "a.npz", "--num-images", "61"], "61 of 60 images are wanted"),
        (["--samples", "a.npz", "--num-images", "5"], "--num-images 5: at least 10"),
        (["--samples", "a.npz", "--reference", "wide.npz"], "has 16 x 16 pixels, samples 8 x 8"),
        (["--samples", "a.npz", "--reference", "few.npz"], "has 5 images, at least 10 are needed"),
        (["--samples", "a.npz", "--reference", "/no/where"], "/no/where: no such file or folder"),
        (["--samples", "a.npz", "--reference", "/no/where.npz"], "/no/where.npz"),
        (["--samples", "a.npz", "--reference", "mini_scenes/8"], "dataset 'mini_scenes/8' is not in"),
        (["--samples", "a.npz", "--reference", "moments.npz"], "moments.npz has no statistics of judge: inception"),
        (["--samples", "a.npz", "--reference", "saved.npz", "--reference-images", "20"], "has statistics of all"),
        (["--samples", "a.npz", "--reference", "saved.npz"], "statistics of judge with other weights (fingerprint abc"),
        (["--samples", "a.npz", "--save-reference", "/tmp/x"], "its name must end in .npz"),
        (["--samples", "a.npz", "--cfg-scale", "2", "--seed", "1"], "--cfg-scale, --seed: only with --model"),
        (["--samples", "a.npz", "--features", "judge", "judge"], "--features judge judge: each once"),
        (["--samples", "odd.npz"], "judge needs sides that are multiples of 8 pixels, images have 12 x 12"),
        (["--samples", "a.npz", "--features", "dinov2:/no/where"], "/no/where"),
        (["--model", "ROOT/generator", "--cfg-scale", "-1"], "cfg_scale"),
        (["--model", "ROOT/generator", "--class", "cat"], "class 'cat'"),
        (["--model", "ROOT/generator", "--num-images", "5"], "--num-images 5: at least 10"),
    ],
)
def test_bad_generations_are_one_line(root, tmp_path, capsys, no_work, arguments, message):
    for name, options in {
        "a": {},
        "b": {"count": 50},
        "few": {"count": 5},
        "wide": {"size": 16},
        "odd": {"size": 12},
    }.items():
        write_samples(tmp_path / f"{name}.npz", **options)
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(4), sigma=np.eye(4))
    described = {"network": "judge", "fingerprint": "abc", "resize": ""}
    about = {"images": {"size": [8, 8]}, "features": [described]}
    statistics = {"judge": Statistics(9, Moments.of(np.eye(4)), None, None)}
    write_reference(tmp_path / "saved.npz", make_reference("saved", about, statistics))
    if "--reference" not in arguments:
        arguments = [*arguments, "--reference", "odd.npz" if "odd.npz" in arguments else "a.npz"]
    arguments = [str(tmp_path / word) if word.endswith(".npz") and "/" not in word else word for word in arguments]
    arguments = [word.replace("ROOT", str(root)) for word in arguments]
    assert cli.main(["evaluate", "generation", *arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error, error
    assert not (tmp_path / "out").exists()
