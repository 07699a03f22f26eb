"""Sources and batches: pure functions of the seed and the step, for any number of hosts; and bad inputs."""

import dataclasses
import io
import itertools
import json
import multiprocessing
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from mini_scenes import CLASSES, prepare
from runtime_jax.data import (
    DataConfig,
    MissingDatasetError,
    SourceConfig,
    center_crop,
    decode_image,
    make_batches,
    num_examples,
    open_source,
)
from runtime_jax.data.pipeline import Batches
from runtime_jax.data.sources import CROPS_PER_PHOTO, PHOTO_REGIONS, photo_region
from runtime_jax.data.views import ViewConfig, take_view

PHOTOS = SourceConfig(kind="photos", crop_scale=(0.3, 1.0))
SIZE = 32


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> SourceConfig:
    data_dir = str(tmp_path_factory.mktemp("data"))
    name = prepare(data_dir, SIZE, train=12, validation=5, test=5)
    return SourceConfig(kind="tfds", name=name, data_dir=data_dir)


def write_image(path: Path, color: int, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, color, color)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(("b/one.png", "a/two.jpg", "a/deep/three.webp", "b/four.JPEG", "c/five.png")):
        write_image(tmp_path / name, 40 * number + 20)
    return tmp_path


def config(*sources: SourceConfig, **changes) -> DataConfig:
    return DataConfig(**{"image_size": SIZE, "batch_size": 8, "sources": sources, "seed": 3, "flip": True, **changes})


def take(cfg: DataConfig, start: int, count: int, **hosts) -> list[dict[str, np.ndarray]]:
    batches = make_batches(cfg, start, **hosts)
    drawn = list(itertools.islice(batches, count))
    batches.close()
    return drawn


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_batch_contents(scenes):
    (batch,) = take(config(scenes), 2, 1)
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "image": ((8, SIZE, SIZE, 3), "uint8"),
        "label": ((8,), "int32"),
        "example": ((8,), "int64"),
    }
    assert batch["example"].tolist() == list(range(16, 24))


def test_same_seed_same_batches_other_seed_other_batches(scenes):
    mixed = config(scenes, PHOTOS)
    first, again = take(mixed, 0, 3), take(mixed, 0, 3)
    assert all(map(equal, first, again))
    other = take(dataclasses.replace(mixed, seed=4), 0, 3)
    assert not any(np.array_equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("step", [1, 5, 6])
def test_starting_at_a_step_equals_running_to_it(scenes, step):
    mixed = config(scenes, PHOTOS)
    through = take(mixed, 0, 8)
    assert all(map(equal, through[step:], take(mixed, step, 8 - step)))


def test_a_far_step_costs_nothing(scenes):
    step = 10**9
    (batch,) = take(config(scenes, PHOTOS), step, 1)
    assert batch["example"][0] == 8 * step


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_the_same_global_batch(scenes, hosts):
    mixed = config(scenes, PHOTOS)
    whole = take(mixed, 3, 2)
    parts = [take(mixed, 3, 2, process_index=i, process_count=hosts) for i in range(hosts)]
    for step in range(2):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        assert equal(whole[step], joined)


def test_worker_processes_give_the_same_batches_and_end(scenes):
    mixed = config(scenes, PHOTOS)
    assert all(map(equal, take(mixed, 2, 2), take(dataclasses.replace(mixed, num_workers=1), 2, 2)))
    assert not multiprocessing.active_children(), "closing the batches ends the workers"


def test_every_epoch_shows_every_example_once_in_another_order(folder):
    five = config(SourceConfig(kind="folder", path=str(folder)), batch_size=5, flip=False)
    epochs = [batch["image"][:, 0, 0, 0].tolist() for batch in take(five, 0, 4)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_augmentation_differs_between_epochs():
    photos = config(PHOTOS, batch_size=4, shuffle=False)
    (first,), (second,) = take(photos, 0, 1), take(photos, 2 * CROPS_PER_PHOTO // 4, 1)
    assert not np.array_equal(first["image"], second["image"])


def test_unshuffled_reading_is_in_order(scenes):
    plain = config(scenes, shuffle=False, random_crop=False, flip=False, batch_size=4)
    labels = np.concatenate([batch["label"] for batch in take(plain, 0, 3)])
    source = open_source(scenes)
    assert labels.tolist() == [source[i]["label"] for i in range(12)]
    assert np.array_equal(take(plain, 0, 1)[0]["image"][0], source[0]["image"])


def test_weights_set_the_shares(scenes):
    mixed = config(dataclasses.replace(scenes, weight=3.0), dataclasses.replace(PHOTOS, weight=1.0), batch_size=40)
    labels = np.concatenate([batch["label"] for batch in take(mixed, 0, 2)])
    assert (labels == -1).sum() == 20


def test_num_examples(scenes, folder):
    assert num_examples(config(scenes, PHOTOS, SourceConfig(kind="folder", path=str(folder)))) == (
        12 + 2 * CROPS_PER_PHOTO + 5
    )


def test_single_examples_carry_captions(scenes):
    example = open_source(scenes)[0]
    assert isinstance(example["caption"], str) and example["image"].shape == (SIZE, SIZE, 3)


def test_folder_labels_are_sorted_sub_folders(folder):
    source = open_source(SourceConfig(kind="folder", path=str(folder)))
    assert source.classes == ["a", "b", "c"]
    assert [source[i]["label"] for i in range(5)] == [0, 0, 1, 1, 2]


def test_class_names(scenes, folder):
    assert open_source(scenes).classes == list(CLASSES) and open_source(PHOTOS).classes is None
    source = SourceConfig(kind="folder", path=str(folder))
    assert open_source(source).classes == ["a", "b", "c"]
    write_image(folder / "outside.png", 9)
    assert open_source(source).classes is None


def test_flat_folder_has_no_labels(tmp_path):
    write_image(tmp_path / "one.png", 9)
    assert open_source(SourceConfig(kind="folder", path=str(tmp_path)))[0]["label"] == -1


def test_corrupt_files_are_replaced_counted_and_reported(folder):
    (folder / "a" / "empty.png").touch()
    whole = (folder / "c" / "five.png").read_bytes()
    (folder / "c" / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "text.jpg").write_text("not a picture")
    bad = {str(folder / name) for name in ("a/empty.png", "c/half.png", "b/text.jpg")}
    seven = config(SourceConfig(kind="folder", path=str(folder)))
    batches = make_batches(seven, 0)
    with pytest.warns(UserWarning, match=r"unreadable image file\(s\) replaced so far: .*(empty|half|text)"):
        drawn = list(itertools.islice(batches, 4))
    assert all(batch["image"].shape == (8, SIZE, SIZE, 3) for batch in drawn)
    assert set(batches.skipped) == bad
    # Four epochs of eight files: each bad one was met four times.
    assert set(batches.skipped.values()) == {4}
    batches.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(map(equal, drawn, take(seven, 0, 4)))


def test_a_file_that_breaks_after_opening_is_skipped_too(folder):
    source = open_source(SourceConfig(kind="folder", path=str(folder)))
    (folder / "a" / "two.jpg").unlink()
    position = next(i for i in range(5) if source[i]["skipped"])
    assert source[position]["skipped"] == (str(folder / "a" / "two.jpg"),)
    assert np.array_equal(source[position]["image"], source[position + 1]["image"])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_exif_block_is_an_unreadable_image():
    exif = Image.Exif()
    exif[0x0112], exif[0x0100], exif[0x011A] = 6, 8, 72.0
    data = encoded(Image.new("RGB", (8, 6)), "JPEG", exif=exif)
    for place in range(data.index(b"Exif") + 6, data.index(b"\xff\xdb")):
        for byte in (0x00, 0x0C, 0xFF):
            damaged = data[:place] + bytes([byte]) + data[place + 1 :]
            try:
                assert decode_image(damaged).shape in ((6, 8, 3), (8, 6, 3))
            except ValueError as error:
                assert str(error).startswith("not a readable image (")


@pytest.mark.parametrize("error", [struct.error("short"), SyntaxError("broken"), TypeError("a tuple"), KeyError(6)])
def test_whatever_pillow_raises_is_one_error_and_skipped(folder, monkeypatch, error):
    def transpose(image, *, in_place):
        assert in_place
        if image.format == "WEBP":
            raise error

    monkeypatch.setattr(ImageOps, "exif_transpose", transpose)
    damaged = folder / "a" / "deep" / "three.webp"
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(damaged.read_bytes())
    source = open_source(SourceConfig(kind="folder", path=str(folder)))
    assert {name for i in range(5) for name in source[i]["skipped"]} == {str(damaged)}


def test_a_want_of_memory_is_not_a_bad_picture(folder, monkeypatch):
    source = open_source(SourceConfig(kind="folder", path=str(folder)))

    def no_memory(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(MemoryError):
        source[0]


def test_a_folder_without_a_readable_image(tmp_path):
    (tmp_path / "one.png").touch()
    (tmp_path / "two.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of its 2 images can be read"):
        make_batches(config(SourceConfig(kind="folder", path=str(tmp_path))), 0)


def test_photo_regions_are_disjoint_and_training_stays_inside():
    for name, regions in PHOTO_REGIONS.items():
        train, held_out = regions["train"], regions["held_out"]
        assert train[2] <= held_out[0] and (train[1], train[3], held_out[2]) == (0, 427, 640)
        assert photo_region(name, "train").shape == (427, train[2], 3)
        assert photo_region(name, "held_out").shape == (427, 640 - held_out[0], 3)
    source = open_source(PHOTOS)
    assert np.array_equal(source[0]["image"], photo_region("china.jpg", "train"))
    assert np.array_equal(source[1]["image"], photo_region("flower.jpg", "train"))
    held_out = open_source(dataclasses.replace(PHOTOS, split="held_out"))
    assert np.array_equal(held_out[0]["image"], photo_region("china.jpg", "held_out"))


def test_photos_are_cropped_at_several_scales_by_default(scenes):
    assert SourceConfig(kind="photos").scale == (0.25, 1.0) and PHOTOS.scale == (0.3, 1.0)
    assert scenes.scale == (1.0, 1.0)


def test_crops_look_at_the_picture():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    centre = center_crop(ramp, 50)
    assert (
        centre.shape == (50, 50, 3) and abs(int(centre[25, 0, 0]) - 51) <= 1 and abs(int(centre[0, -1, 0]) - 149) <= 1
    )
    rng = np.random.default_rng(0)
    small, large = (ViewConfig(name="image", image_size=size) for size in (20, 100))
    spans = [np.ptp(take_view(ramp, small, rng, crop_scale=(0.2, 1.0))[..., 0].astype(int)) for _ in range(200)]
    assert min(spans) < 25 and max(spans) > 85
    starts = [int(take_view(ramp, large, rng)[0, 0, 0]) for _ in range(100)]
    assert min(starts) < 10 and max(starts) > 90


def test_a_picture_smaller_than_the_crop_is_enlarged():
    assert center_crop(np.zeros((9, 7, 3), np.uint8), 32).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"sources": ()}, "sources is empty"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"sources": (dataclasses.replace(PHOTOS, weight=0.0),)}, "weight is 0.0"),
        ({"sources": (dataclasses.replace(PHOTOS, weight=float("nan")),)}, "weight is nan"),
        ({"sources": (dataclasses.replace(PHOTOS, crop_scale=(0.5, 2.0)),)}, "crop_scale is"),
        ({"sources": (dataclasses.replace(PHOTOS, split="test"),)}, "'train', 'held_out'"),
        ({"sources": (SourceConfig(kind="folder", path="/nowhere/at/all"),)}, "'/nowhere/at/all' does not exist"),
        ({"sources": (SourceConfig(kind="folder"),)}, "does not exist"),
        ({"sources": (SourceConfig(kind="tfds"),)}, "name is empty"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        make_batches(dataclasses.replace(config(PHOTOS), **changes), 0)


def test_unknown_kind():
    source = SourceConfig(kind="folder")
    object.__setattr__(source, "kind", "video")
    with pytest.raises(ValueError, match="kind is 'video', allowed are 'tfds', 'folder', 'photos'"):
        open_source(source)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ({"process_count": 3}, "batch_size is 8, 3 hosts do not divide it"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of 2"),
        ({"process_count": 0}, "of 0 processes"),
    ],
)
def test_bad_hosts(hosts, message):
    with pytest.raises(ValueError, match=message):
        make_batches(config(PHOTOS), 0, **hosts)


def test_bad_step():
    with pytest.raises(ValueError, match="start_step is -1"):
        make_batches(config(PHOTOS), -1)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        open_source(SourceConfig(kind="folder", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mini_scenes/64", r"; run: mini_scenes\.prepare\('.*', size\)$"),
        ("imagenet2012", "tfds build imagenet2012"),
        ("no_such", "tfds build"),
    ],
)
def test_missing_dataset(tmp_path, name, recipe):
    with pytest.raises(MissingDatasetError, match=recipe) as error:
        open_source(SourceConfig(kind="tfds", name=name, data_dir=str(tmp_path)))
    assert str(tmp_path) in str(error.value) and repr(name) in str(error.value)
    assert (error.value.name, error.value.data_dir) == (name, str(tmp_path))


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """The features of TFDS's imagenet2012, with two images."""

    VERSION = tfds.core.Version("5.1.0")
    url_infos = None

    def _info(self):
        image = tfds.features.Image(encoding_format="jpeg")
        label = tfds.features.ClassLabel(names=["n01440764", "n01443537"])
        features = {"image": image, "label": label, "file_name": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(2):
            image = io.BytesIO(encoded(Image.new("RGB", (50, 40), (90 * number,) * 3), "JPEG"))
            name = f"n0144{number}.JPEG"
            yield name, {"image": image, "label": number, "file_name": name}


def test_a_prepared_imagenet_and_one_without_random_access(tmp_path):
    builder = Imagenet2012(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    config = SourceConfig(kind="tfds", name="imagenet2012", data_dir=str(tmp_path))
    source = open_source(config)
    assert source.classes == ["n01440764", "n01443537"] and len(source) == 2
    for example in (source[0], source[1]):
        assert example["image"].shape == (40, 50, 3)
        assert abs(int(example["image"][0, 0, 0]) - 90 * example["label"]) <= 1

    # TFDS writes tfrecord only with TensorFlow: the folder says that it did.
    path = Path(builder.data_path) / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="was prepared as tfrecord, which has no random access; run: ") as error:
        open_source(config)
    flags = f"--dataset_version_dir={builder.data_path} --out_file_format=array_record"
    assert str(error.value).endswith(f"; run: tfds convert_format {flags}") and "\n" not in str(error.value)
    # What that command adds, beside files of both formats.
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}))
    assert np.array_equal(open_source(config)[1]["image"], source[1]["image"])


def test_missing_split(scenes):
    with pytest.raises(ValueError, match=r"no split 'holdout'.*'test', 'train', 'validation'"):
        open_source(dataclasses.replace(scenes, split="holdout"))


def test_tfds_slices(scenes):
    assert len(open_source(dataclasses.replace(scenes, split="train[:3]"))) == 3
    assert len(open_source(dataclasses.replace(scenes, split="train[:3]+test"))) == 8


def test_the_iterator_type():
    batches = make_batches(config(PHOTOS), 0)
    assert isinstance(batches, Batches) and iter(batches) is batches and batches.skipped == {}
    batches.close()
