"""A concept's captions bound to tokens, its images, and what is drawn for each step."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import SIDE, tiny_pipeline

from tokenverse_jax.concepts.captions import bind_captions
from tokenverse_jax.concepts.concept_data import (
    beside,
    draw,
    draw_times,
    encode_concept,
    encode_images,
    encode_prompts,
    read_image,
)
from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.concepts.learn import LearnConfig, StageConfig

CAPTIONS = [["a red ball on the beach", "the beach and a ball"], ["a blue ball"]]
ISOLATION = IsolationConfig(
    captions=("a dog", "a cat and a hat", "a hat"), template="two {left} beside {right}", sides=("left", "right")
)
CONFIG = LearnConfig(
    stage_1=StageConfig(steps=5000, high_share=0.92),
    stage_2=StageConfig(steps=5000, high_share=0.08),
    batch_size=4,
    isolation=ISOLATION,
)
LENGTH = 64


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return dataclasses.replace(tiny_pipeline(tmp_path_factory.mktemp("tokenizers")), text_length=LENGTH)


@pytest.fixture(scope="module")
def tokenizer(pipeline):
    return pipeline.tokenizer_2


@pytest.fixture(scope="module")
def captions(tokenizer):
    return bind_captions(tokenizer, LENGTH, CAPTIONS, ["ball", "A"], ISOLATION)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 2 * SIDE, 3 * SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def data(pipeline, captions, images):
    data = encode_concept(pipeline, CONFIG, images, captions)
    pool = np.random.default_rng(1).integers(0, 256, (3, 2 * SIDE, 3 * SIDE, 3), np.uint8)
    return dataclasses.replace(data, pool_latents=encode_images(pipeline, pool))


# Captions.


def pieces(tokenizer, prompt, positions):
    ids = tokenizer(prompt)["input_ids"]
    return "".join(tokenizer.convert_ids_to_tokens([ids[position] for position in positions])).replace("▁", "")


def test_words_and_captions_are_bound_to_tokens(tokenizer, captions):
    assert captions.texts == (*CAPTIONS[0], *CAPTIONS[1]) and captions.image == (0, 0, 1)
    for i, text in enumerate(captions.texts):
        assert pieces(tokenizer, text, captions.words["ball"][i]) == "ball"
        assert pieces(tokenizer, text, captions.tokens[i]) == text.replace(" ", "")
        assert tokenizer.eos_token_id not in np.asarray(tokenizer(text)["input_ids"])[list(captions.tokens[i])]
        expected = [f"two {text} beside {other}" for other in ISOLATION.captions]
        assert captions.merged[i] == (*expected, *(f"two {other} beside {text}" for other in ISOLATION.captions))
        for both, moved in zip(captions.merged[i], captions.merged_shifts[i], strict=True):
            assert pieces(tokenizer, both, [moved + position for position in captions.tokens[i]]) == text.replace(
                " ", ""
            )
    ids = tokenizer(captions.texts[0])["input_ids"]
    assert captions.word_ids == {
        word: tuple(ids[i] for i in positions[0]) for word, positions in captions.words.items()
    }


@pytest.mark.parametrize(
    ("texts", "words", "message"),
    [
        (CAPTIONS, ["dog"], "'dog' is not in the prompt 'a red ball on the beach'; its words are a, red, ball"),
        (CAPTIONS, ["ball", "red"], "'red' is not in the prompt 'the beach and a ball'"),  # the second variant
        (CAPTIONS, ["ball#2"], "'ball#2' is not in the prompt"),
        (CAPTIONS, [], "words: one or more different words"),
        (CAPTIONS, ["ball", "Ball"], "words: one or more different words"),
        (CAPTIONS, ["ball", "ball#1"], "words: one or more different words"),
        (CAPTIONS, ["caf\u00e9", "cafe\u0301"], "words: one or more different words"),
        ([["a ball"], []], ["ball"], "a caption for each"),
        ([], ["ball"], "at least one image is needed"),
        ([["a ball " * 40]], ["ball"], "tokens, but the text length is 64: shorten the prompt"),
        ([["a ball " * 9]], ["ball"], "shorten the prompt 'two a ball"),  # only with another caption beside it
    ],
)
def test_captions_and_words_that_do_not_fit(tokenizer, texts, words, message):
    with pytest.raises(ValueError, match=message):
        bind_captions(tokenizer, LENGTH, texts, words, ISOLATION)


def test_an_image_may_lack_words_of_others(tokenizer):
    isolation = dataclasses.replace(ISOLATION, together=0.5)
    bound = bind_captions(tokenizer, LENGTH, [*CAPTIONS, ["a dog"]], ["ball", "dog"], isolation)
    lacks = [[not own for own in bound.words[word]] for word in ("ball", "dog")]
    assert lacks == [[False] * (len(bound.texts) - 1) + [True], [True] * (len(bound.texts) - 1) + [False]]
    assert bound.word_ids["dog"] == (tokenizer(bound.texts[-1])["input_ids"][bound.words["dog"][-1][0]],)
    images = {bound.image[i]: set() for i in range(len(bound.texts))}
    for pair in bound.together:
        left, right = pair.captions
        assert bound.image[left] != bound.image[right]
        images[bound.image[left]].add(bound.image[right])
        for caption, shift in zip(pair.captions, pair.shifts, strict=True):
            at = [position + shift for position in bound.tokens[caption]]
            assert pieces(tokenizer, pair.text, at) == pieces(tokenizer, bound.texts[caption], bound.tokens[caption])
        assert pair.shifts[0] + max(bound.tokens[left]) < pair.shifts[1] + min(bound.tokens[right])
    assert all(others == images.keys() - {own} for own, others in images.items())
    with pytest.raises(ValueError, match=r"images\[2\]: none of the words \['ball'\] is in its caption 'a dog'"):
        bind_captions(tokenizer, LENGTH, [*CAPTIONS, ["a dog"]], ["ball"], ISOLATION)
    with pytest.raises(ValueError, match="two images or more are needed"):
        bind_captions(tokenizer, LENGTH, [["a ball"]], ["ball"], isolation)


def test_pairs_of_the_runs_own_images_belong_together(pipeline):
    isolation = dataclasses.replace(ISOLATION, together=1.0, probability=1.0)
    config = dataclasses.replace(CONFIG, isolation=isolation, batch_size=8)
    captions = bind_captions(pipeline.tokenizer_2, LENGTH, [*CAPTIONS, ["a dog"]], ["ball", "dog"], isolation)
    images = np.random.default_rng(1).integers(0, 256, (len(CAPTIONS) + 1, 2 * SIDE, 2 * SIDE, 3), np.uint8)
    data = encode_concept(pipeline, config, images, captions)
    rows = data.mask.shape[1]
    for row, pair in zip(data.own_rows, captions.together, strict=True):
        for half, (caption, shift) in enumerate(zip(pair.captions, pair.shifts, strict=True)):
            own = captions.tokens[caption]
            assert row[[position + shift for position in own]].tolist() == [half * rows + position for position in own]
        assert (row == 2 * rows).sum() == len(row) - sum(len(captions.tokens[caption]) for caption in pair.captions)
    batch = draw(data, config, 0, 0)
    assert batch.keys() >= {"other_latents", "other_txt", "other_mask", "pair_rows"} and "pool_latents" not in batch
    views = data.latents.reshape(-1, *data.latents.shape[2:])
    for i in range(8):
        (left,), (right,) = (
            [v for v in range(len(data.txt)) if (data.txt[v] == batch[name][i]).all()] for name in ("txt", "other_txt")
        )
        assert captions.image[left] != captions.image[right]
        places = [
            np.flatnonzero([(view == batch[name][i]).all() for view in views])[0] // data.latents.shape[1]
            for name in ("latents", "other_latents")
        ]
        assert places == [captions.image[left], captions.image[right]]
        (pair,) = [q for q, each in enumerate(captions.together) if each.captions == (left, right)]
        np.testing.assert_array_equal(batch["pair_txt"][i], data.own_txt[pair])
        np.testing.assert_array_equal(batch["pair_rows"][i], data.own_rows[pair])


def test_captions_and_words_with_other_quotes(tokenizer):
    texts = ["the dog\u2019s hat", "a hat, the dog's"]
    positions = bind_captions(tokenizer, LENGTH, [texts], ["dog\u02bcs"], None).words["dog\u02bcs"]
    found = [pieces(tokenizer, *bound) for bound in zip(texts, positions, strict=True)]
    assert found == ["dog<unk>s", "dog's"]  # T5 reads them as they are


def test_a_template_that_changes_the_captions_tokens(tokenizer):
    glued = dataclasses.replace(ISOLATION, template="two{left} beside {right}")
    with pytest.raises(ValueError, match=r"has other tokens in 'twothe beach .* than by itself: put spaces"):
        bind_captions(tokenizer, LENGTH, CAPTIONS, ["ball"], glued)


# Images.


def test_images_are_read_as_squares(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", 8), pixels[:, 2:10])
    assert read_image(tmp_path / "x.png", 16).shape == (16, 16, 3)


def test_images_that_cannot_be_used(tmp_path):
    Image.fromarray(np.zeros((10, 21, 3), np.uint8)).save(tmp_path / "long.png")
    (tmp_path / "text.jpg").write_text("no picture")
    for name, message in (
        ("none.png", "none.png: no such file"),
        ("text.jpg", "text.jpg: not a readable image"),
        ("long.png", "long.png: 21 x 10 pixels: one side is more than 2 times the other"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name, 8)


# What a step takes.


def test_everything_is_encoded_once(pipeline, data, images, captions):
    np.testing.assert_array_equal(data.latents[:, 0], encode_images(pipeline, images))
    np.testing.assert_array_equal(data.latents[:, 1], encode_images(pipeline, images[:, :, ::-1]))
    assert data.grid == (2, 3) and data.latents.shape == (2, 2, 6, 16)
    one = pipeline.encode_prompts([captions.merged[2][1]])
    np.testing.assert_allclose(data.pair_txt[2, 1], one.txt[0], atol=1e-5)
    np.testing.assert_allclose(data.pair_vec[2, 1], one.vec[0], atol=1e-5)
    assert data.mask.shape[1] % 16 == 0
    assert [tuple(np.flatnonzero(row)) for row in data.mask] == list(captions.tokens)
    plain = encode_concept(pipeline, dataclasses.replace(CONFIG, flip=False, tokens="words"), images, captions)
    assert plain.latents.shape == (2, 1, 6, 16)
    words = zip(*captions.words.values(), strict=True)
    assert [set(np.flatnonzero(row)) for row in plain.mask] == [set(itertools.chain(*found)) for found in words]
    assert plain.mask.sum() < data.mask.sum()


def test_any_number_of_prompts_is_encoded(pipeline):
    prompts = [f"a ball {'on ' * i}" for i in range(11)]
    got, expected = encode_prompts(pipeline, prompts), pipeline.encode_prompts(prompts)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_captions_that_cannot_be_read_are_warned_of_once(pipeline, caplog):
    captions = bind_captions(pipeline.tokenizer_2, LENGTH, [["a dog and a 犬", "a dog"]], ["dog"], None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            encode_prompts(pipeline, ["", *captions.texts, " "])
    assert caplog.messages == [
        "prompt 'a dog and a 犬': T5 does not know '犬'; "
        "CLIP stops at a character that it does not know, and does not see '犬'",
        "prompt ' ': it has only spaces or invisible characters, so nothing to draw",
    ]


def test_a_batch_is_a_function_of_seed_and_step(data):
    steps = range(5)
    first, again, other = ([draw(data, CONFIG, seed, step) for step in steps] for seed in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert all((one["noise"] != two["noise"]).any() for one, two in zip(first, other, strict=True))
    assert (first[0]["noise"] != first[1]["noise"]).any()
    assert [("pair_txt" in batch) for batch in first] == [beside(CONFIG, 3, step) == "pool" for step in steps]


def test_rows_of_a_batch_belong_together(data):
    seen = set()
    for step in range(120):
        batch = draw(data, CONFIG, 0, step)
        for row in range(CONFIG.batch_size):
            (caption,) = [i for i in range(3) if np.array_equal(batch["txt"][row], data.txt[i])]
            views = data.latents[data.captions.image[caption]]
            (view,) = [i for i in range(2) if np.array_equal(batch["latents"][row], views[i])]
            np.testing.assert_array_equal(batch["mask"][row], data.mask[caption])
            np.testing.assert_array_equal(batch["vec"][row], data.vec[caption])
            merged = None
            if "pair_txt" in batch:
                (other,) = [i for i in range(3) if np.array_equal(batch["pool_latents"][row], data.pool_latents[i])]
                merged = other + 3 * int(batch["on_right"][row])
                np.testing.assert_array_equal(batch["pair_txt"][row], data.pair_txt[caption, merged])
                np.testing.assert_array_equal(batch["pair_vec"][row], data.pair_vec[caption, merged])
                np.testing.assert_array_equal(batch["pair_rows"][row], data.pair_rows[caption, merged])
            seen.add((caption, view, merged))
    assert len(seen) == 3 * 2 * (1 + 2 * 3)


def test_every_token_of_a_merged_caption_knows_its_row(pipeline, data):
    tokenizer, rows = pipeline.tokenizer_2, data.mask.shape[1]
    for i, caption in enumerate(data.captions.texts):
        ids = tokenizer(caption)["input_ids"]
        for merged, both in enumerate(data.captions.merged[i]):
            whole = tokenizer(both)["input_ids"]
            own = data.pair_rows[i, merged]
            found = {position: row for position, row in enumerate(own) if row < rows and data.mask[i, row]}
            assert sorted(found.values()) == list(np.flatnonzero(data.mask[i]))
            assert all(whole[position] == ids[row] for position, row in found.items())


def test_times_and_isolation_have_their_shares():
    for step, share in ((0, 0.92), (5000, 0.08)):
        times = np.concatenate([draw_times(CONFIG, np.random.default_rng(i), step + i) for i in range(2000)])
        assert times.min() >= 0 and times.max() <= 1
        assert np.mean(times > 0.8) == pytest.approx(share, abs=0.02)
        for low, high in ((0.0, 0.8), (0.8, 1.0)):
            part = np.sort(times[(times > low) & (times <= high)])
            even = np.linspace(low, high, len(part))
            assert np.abs(part - even).max() < 0.08 * (high - low) + 3 / len(part)
    assert np.mean([beside(CONFIG, 0, step) == "pool" for step in range(2000)]) == pytest.approx(0.5, abs=0.04)
    assert beside(dataclasses.replace(CONFIG, isolation=None), 0, 0) == "nothing"
