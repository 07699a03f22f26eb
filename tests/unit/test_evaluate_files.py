"""What evaluations read: images of datasets, folders and npz files, and statistics of a reference."""

import threading

import numpy as np
import pytest
from PIL import Image

from mergevq_jax.evaluate.frechet import Moments, frechet_distance
from mergevq_jax.evaluate.images import ArrayImages, FolderImages, SourceImages
from mergevq_jax.evaluate.parts import Measured, Task, fitting, measure, part_size
from mergevq_jax.evaluate.statistics import Statistics, make_reference, read_reference, write_reference
from runtime_jax.data import SourceConfig
from runtime_jax.training.stop import Stop

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 6, 8, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_in_an_npz_are_read_in_place(tmp_path, save):
    save(tmp_path / "a.npz", labels=np.arange(7), arr_0=PIXELS)
    images = ArrayImages(tmp_path / "a.npz")
    assert len(images) == 7 and images.shape == (6, 8)
    assert (images.read(range(2, 5)) == PIXELS[2:5]).all()
    few = ArrayImages(tmp_path / "a.npz", 3)
    assert len(few) == 3 and (few.read([0, 1, 2]) == PIXELS[[0, 2, 4]]).all()  # evenly spaced
    assert isinstance(images._array, np.memmap)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS}, "not an npz file with images arr_0"),
        ({"arr_0": PIXELS.astype(np.float32)}, r"arr_0 is float32 \[7, 6, 8, 3\]"),
        ({"arr_0": PIXELS[..., :1]}, "uint8"),
        ({"arr_0": PIXELS[:1]}, "1 of 1 images are wanted; at least 2"),
    ],
)
def test_other_npz_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        ArrayImages(tmp_path / "a.npz")


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match="not an npz file"):
        ArrayImages(tmp_path / "a.npz")


@pytest.fixture
def folder(tmp_path):
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_pictures_are_read_as_they_are_or_cropped(folder):
    images = FolderImages(folder, 3)
    assert images.shape == (6, 8) and (images.read(range(3)) == PIXELS[[0, 2, 4]]).all()
    cropped = SourceImages(SourceConfig(kind="folder", path=str(folder)), 6)
    assert (cropped.read([1, 6]) == PIXELS[[1, 6], :, 1:7]).all() and "centred square" in cropped.crop


def test_pictures_of_several_sizes_are_refused(folder):
    Image.fromarray(PIXELS[0, :5]).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3.png has 8 x 5 pixels, 0.png has 8 x 6: samples have one size"):
        FolderImages(folder)


def test_an_unreadable_picture_is_not_replaced(folder):
    (folder / "3.png").write_bytes(b"no picture")
    images = SourceImages(SourceConfig(kind="folder", path=str(folder)), 6)
    assert images.read([2, 4]).shape == (2, 6, 6, 3)
    with pytest.raises(ValueError, match=r"3.png: not a readable image"):
        images.read([2, 3])


def reference():
    features = RNG.normal(size=(20, 3)).astype(np.float32)
    about = {"images": {"size": [8, 8], "count": 20}, "features": [{"network": "inception"}, {"network": "judge"}]}
    spatial = Moments.of(RNG.normal(size=(20, 2)))
    statistics = {
        "inception": Statistics(20, Moments.of(features), spatial, features),
        "judge": Statistics(20, Moments.of(features[:, :2]), None, None),
    }
    return make_reference("pictures", about, statistics)


def test_statistics_come_back_as_they_were(tmp_path):
    wrote = reference()
    write_reference(tmp_path / "a.npz", wrote)
    read = read_reference(tmp_path / "a.npz")
    assert read.hash == wrote.hash and read.name == "pictures" and read.about == wrote.about and read.shape == (8, 8)
    for name, statistics in wrote.statistics.items():
        for ours, theirs in zip(statistics, read.statistics[name], strict=True):
            flat = (ours, theirs) if isinstance(ours, tuple) else ((ours,), (theirs,))
            assert all(np.array_equal(a, b) for a, b in zip(*flat, strict=True))


def test_damaged_statistics_are_refused(tmp_path):
    write_reference(tmp_path / "a.npz", reference())
    arrays = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", **arrays)
    assert read_reference(tmp_path / "b.npz").hash == str(arrays["hash"])
    np.savez(tmp_path / "b.npz", **arrays | {"judge/mean": arrays["judge/mean"] + 1e-9})
    with pytest.raises(ValueError, match=r"b.npz: damaged"):
        read_reference(tmp_path / "b.npz")
    del arrays["judge/mean"]
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(ValueError, match=r"b.npz: damaged"):
        read_reference(tmp_path / "b.npz")


def test_adms_layout(tmp_path):
    features = RNG.normal(size=(30, 4))
    np.savez(tmp_path / "a.npz", arr_0=PIXELS, mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    found = read_reference(tmp_path / "a.npz")
    statistics = found.statistics["inception"]
    assert statistics.count is None and statistics.spatial is None and found.shape is None
    assert np.allclose(statistics.pool.covariance, np.cov(features, rowvar=False), rtol=1e-12)
    assert frechet_distance(statistics.pool, Moments.of(features)) < 1e-9
    np.savez(tmp_path / "b.npz", arr_0=PIXELS)
    assert read_reference(tmp_path / "b.npz") is None
    np.savez(tmp_path / "c.npz", mu=np.zeros(4), sigma=np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"c.npz: not a file of reference statistics"):
        read_reference(tmp_path / "c.npz")


@pytest.mark.parametrize(("count", "size"), [(2, 32), (70, 32), (4000, 64), (5000, 128), (50_000, 1024), (10**6, 1024)])
def test_parts_depend_on_the_number_of_images_alone(count, size):
    assert part_size(count) == size and fitting(10**6, count) == min(size, count)


def squares(count=70, batch_size=16, fail=None):
    """A task whose rows are squares of their numbers."""
    threads = set()

    def read(rows):
        threads.add(threading.get_ident())
        return np.asarray(rows, np.float32)

    def start(rows, read):
        if fail in rows:
            raise RuntimeError("no")
        return read**2

    def finish(read, arrays):
        return {"square": arrays, "number": read}

    return Task("squares", "squares", count, batch_size, read, start, finish, lambda rows, arrays: None)


def test_parts_are_measured_once_and_come_back_in_order(tmp_path):
    with Stop() as stop:
        with pytest.raises(RuntimeError, match="no"):
            measure(squares(fail=40), tmp_path, stop)
        assert {path.name for path in (tmp_path / "squares").glob("*")} <= {"000000.npz"}
        measure(squares(count=70), tmp_path, stop)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "squares").iterdir()}
        measure(squares(fail=3), tmp_path, stop)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "squares").iterdir()} == before and len(before) == 3
    found = Measured(squares(), tmp_path)
    assert (found.column("square") == np.arange(70.0) ** 2).all()
    assert (found.some("number", 10) == np.arange(10) * 7).all() and len(found.some("number", 100)) == 70
