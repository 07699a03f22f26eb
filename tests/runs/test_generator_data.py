"""Codes on disk as batches: what they hold, that a batch is a function of its number, and folders that do not fit."""

import dataclasses
import functools
import itertools
import json
import shutil

import numpy as np
import pytest
from generator_run_tools import (
    IMAGES,
    MODEL,
    TOKENIZER,
    images_of,
    random_tokenizer,
    run_config,
    write_pictures,
)

from mergevq_jax.commands.tokenize import tokenize
from mergevq_jax.generator.data import TokensConfig, check_data, check_tokenizer, make_batches, num_examples
from mergevq_jax.generator.model import GeneratorModel
from mergevq_jax.generator.run import train
from mergevq_jax.merge_ratio import MergeRatioConfig, draw_keep
from mergevq_jax.tokens_folder import read_tokens
from runtime_jax.config import build, to_dict
from runtime_jax.data import DataConfig, SourceConfig

RATIO = MergeRatioConfig(keeps=(10, 16), weights=(0.5, 0.5))
DRAW = functools.partial(draw_keep, RATIO, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, a tokenizer, and the pictures' codes at K = 10 and 16 in shards of four."""
    root = tmp_path_factory.mktemp("codes")
    random_tokenizer().save_pretrained(root / "tokenizer")
    source = SourceConfig(kind="folder", path=str(write_pictures(root / "pictures")))
    for keep in RATIO.keeps:
        tokenize(source, str(root / "tokenizer"), root / str(keep), keep=keep, batch_size=5, shard_size=4)
    return root


def tokens(root, *keeps, **changes):
    return TokensConfig(folders=tuple(str(root / str(keep)) for keep in keeps), **{"batch_size": 4, **changes})


def first(batches, count):
    return list(itertools.islice(batches, count))


def test_batches_are_the_records(root):
    config = tokens(root, 10, 16, shuffle=False)
    assert num_examples(config) == IMAGES
    records = {keep: list(read_tokens(root / str(keep))) for keep in RATIO.keeps}
    steps = first(make_batches(config, DRAW, 0), 6)
    assert {DRAW(step) for step in range(6)} == set(RATIO.keeps)
    for step, batch in enumerate(steps):
        np.testing.assert_array_equal(batch["example"], 4 * step + np.arange(4))
        for row, place in enumerate(batch["example"]):
            record = records[DRAW(step)][place % IMAGES]
            np.testing.assert_array_equal(batch["source_map"][row], record["source_map"])
            np.testing.assert_array_equal(batch["indices"][row], record["indices"][record["source_map"]])
            assert batch["label"][row] == record["label"]
        assert len(np.unique(batch["source_map"][0])) == DRAW(step)
        assert {name: value.dtype.name for name, value in batch.items()} == {
            "indices": "int32",
            "source_map": "int32",
            "label": "int32",
            "example": "int64",
        }


def test_a_batch_is_a_function_of_its_number(root):
    config = tokens(root, 10, 16)
    whole = first(make_batches(config, DRAW, 0), 6)
    later = first(make_batches(config, DRAW, 3), 3)
    for name in whole[0]:
        for step in range(3):
            np.testing.assert_array_equal(later[step][name], whole[3 + step][name])
    for count in (2, 4):
        parts = [{"process_index": host, "process_count": count} for host in range(count)]
        hosts = [first(make_batches(config, DRAW, 3, **part), 3) for part in parts]
        for name in whole[0]:
            for step in range(3):
                split = np.concatenate([host[step][name] for host in hosts])
                np.testing.assert_array_equal(split, whole[3 + step][name])
    epoch = np.concatenate(
        [batch["label"] for batch in first(make_batches(tokens(root, 10, batch_size=5), lambda _: 10, 0), 2)]
    )
    assert np.bincount(epoch).tolist() == [5, 5]  # every image once


def test_one_view_of_an_image_each_time(root, tmp_path):
    source = SourceConfig(kind="folder", path=str(root / "pictures"))
    tokenize(source, str(root / "tokenizer"), tmp_path, keep=10, batch_size=5, shard_size=4, views="flip")
    config = TokensConfig(folders=(str(tmp_path),), batch_size=IMAGES, shuffle=False)
    records, drawn = list(read_tokens(tmp_path)), []
    for batch in first(make_batches(config, lambda _: 10, 0), 6):
        for number, record in enumerate(records):
            pairs = zip(record["indices"], record["source_map"], strict=True)
            views = [indices[source_map] for indices, source_map in pairs]
            assert not np.array_equal(*views)
            drawn.append([np.array_equal(batch["indices"][number], view) for view in views].index(True))
    drawn = np.reshape(drawn, (6, IMAGES))
    assert 0.2 < drawn.mean() < 0.8 and len({tuple(epoch) for epoch in drawn}) == 6
    whole = first(make_batches(config, lambda _: 10, 0), 4)
    hosts = [first(make_batches(config, lambda _: 10, 3, process_index=i, process_count=2), 1)[0] for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([host["indices"] for host in hosts]), whole[3]["indices"])
    other = first(make_batches(dataclasses.replace(config, seed=1), lambda _: 10, 0), 4)
    assert any(not np.array_equal(a["indices"], b["indices"]) for a, b in zip(whole, other, strict=True))
    folders = (str(root / "16"), str(tmp_path))
    with pytest.raises(ValueError, match="do not belong together: they differ in views"):
        num_examples(dataclasses.replace(config, folders=folders))


def test_a_run_from_codes_on_disk(root, tmp_path):
    ratio = {"keeps": [10], "weights": [1.0]}
    config = run_config(root / "tokenizer", to_dict(tokens(root, 10, batch_size=8)), steps=2, merge_ratio=ratio)
    done = train(dataclasses.replace(config, loop=dataclasses.replace(config.loop, eval_every=2)), tmp_path)
    assert done.step == 2 and GeneratorModel.from_pretrained(tmp_path / "generator").config == MODEL
    first_line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(first_line["loss"], TOKENIZER.z_channels * np.log(2), rtol=1e-5)


def test_config_is_built_from_either_kind():
    assert isinstance(build(TokensConfig, {"folders": ["a"], "batch_size": 2}), TokensConfig)
    config = run_config("x", {"folders": ["a"], "batch_size": 8})
    assert config.data == TokensConfig(folders=("a",), batch_size=8)


def altered(root, out, **changes):
    """A copy of the folder for K = 10 whose tokens.json says something else."""
    shutil.copytree(root / "10", out)
    info = json.loads((out / "tokens.json").read_text())
    (out / "tokens.json").write_text(json.dumps(info | changes))
    return str(out)


def test_folders_that_do_not_belong_together(root, tmp_path):
    other = altered(root, tmp_path / "source", source={}, keep=12)
    with pytest.raises(ValueError, match="do not belong together: they differ in source"):
        num_examples(TokensConfig(folders=(str(root / "10"), other), batch_size=1))
    with pytest.raises(ValueError, match=r"one folder for each number of kept tokens is needed, these have \[10, 10\]"):
        num_examples(TokensConfig(folders=(str(root / "10"), altered(root, tmp_path / "twin")), batch_size=1))
    with pytest.raises(ValueError, match=r"data.folders is empty"):
        num_examples(tokens(root))
    with pytest.raises(ValueError, match=r"no tokens.json"):
        num_examples(tokens(root, "pictures"))


def test_codes_that_do_not_fit_the_generator(root, tmp_path):
    tokenizer = random_tokenizer()
    assert check_data(tokens(root, 10, 16), MODEL, tokenizer, (10, 16)) == ("even", "odd")
    with pytest.raises(ValueError, match="codes of another tokenizer"):
        check_data(tokens(root, 10), MODEL, random_tokenizer(1), (10,))
    with pytest.raises(ValueError, match=r"no folder of tokens with K = 16; there are K = 10"):
        check_data(tokens(root, 10), MODEL, tokenizer, (10, 16))
    with pytest.raises(ValueError, match=r"has 2 classes, the generator model.num_classes=3"):
        check_data(tokens(root, 10), dataclasses.replace(MODEL, num_classes=3), tokenizer, (10,))
    unnamed = TokensConfig(folders=(altered(root, tmp_path / "unnamed", classes=None),), batch_size=1)
    with pytest.raises(ValueError, match="has no labels"):
        check_data(unnamed, MODEL, tokenizer, (10,))
    for changes in ({"vocab_sizes": (4, 8)}, {"grid": (2, 8)}):
        with pytest.raises(ValueError, match=r"has 16 codes on a grid \(4, 4\)"):
            check_tokenizer(dataclasses.replace(MODEL, **changes), tokenizer)


def test_images_that_do_not_fit(root):
    tokenizer = random_tokenizer()
    with pytest.raises(ValueError, match=f"the tokenizer's images have {TOKENIZER.resolution} pixels"):
        check_data(build(DataConfig, images_of(root / "pictures", image_size=16)), MODEL, tokenizer, (10,))
    with pytest.raises(ValueError, match="has no labels"):
        check_data(build(DataConfig, images_of(root / "pictures" / "even")), MODEL, tokenizer, (10,))
