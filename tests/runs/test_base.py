"""The tiny base: tokenizers, corpus, both losses, and a whole run on tiny shapes."""

import dataclasses
import functools
import itertools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from several_tools import ended, launched, write_config
from tiny_pipeline import random_params

from mini_scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    SHADED,
    TEXTURES,
    Light,
    SceneObject,
    Style,
    caption,
    example_scene,
    full_caption,
)
from runtime_jax import config as config_lib
from runtime_jax.mesh import make_mesh
from runtime_jax.networks.clip import CLIPTextEncoder
from runtime_jax.nn.compute import Compute
from runtime_jax.training import loop, network
from runtime_jax.training.network import train_network
from tokenverse_jax.base import corpus, run, text_to_image, vae
from tokenverse_jax.base.corpus import CaptionConfig, Corpus, describe
from tokenverse_jax.base.layout import COVERS, FEATURES, layout, layout_loss
from tokenverse_jax.base.report import held_out_captions, report
from tokenverse_jax.base.tokenizers import make_tokenizers, scene_words
from tokenverse_jax.base.words import PHRASES, UNSAID, VALUES, bag_loss, bags, words, words_loss
from tokenverse_jax.flux.model import direction
from tokenverse_jax.flux.model_folder import Part
from tokenverse_jax.flux.offsets import NO_OFFSETS
from tokenverse_jax.flux.pipeline import PARTS, Pipeline
from tokenverse_jax.flux.words import find_word

SIZE = 16


@pytest.fixture(scope="module")
def tokenizers():
    return make_tokenizers(scene_words(), 40)


@pytest.fixture(scope="module")
def scenes():
    return corpus.rows(0, "train", range(24))


def test_every_word_of_a_caption_is_one_token(tokenizers, scenes):
    rng = np.random.default_rng(0)
    for text in (text for scene in scenes for text in (full_caption(scene), caption(scene, rng))):
        words = text.replace(",", " ,").split()
        assert tokenizers.tokenizer_2(text)["input_ids"][-1] == tokenizers.tokenizer_2.eos_token_id
        assert len(tokenizers.tokenizer_2(text)["input_ids"]) == len(words) + 1
        assert len(tokenizers.tokenizer(text)["input_ids"]) == len(words) + 2


def test_another_process_numbers_the_tokens_alike(tokenizers):
    """A resumed run makes its tokenizers again."""
    code = """import json
from tokenverse_jax.base.tokenizers import make_tokenizers, scene_words
print(json.dumps([tokenizer.get_vocab() for tokenizer in make_tokenizers(scene_words(), 40)]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [tokenizer.get_vocab() for tokenizer in tokenizers]


def test_captions_of_pairs_are_whole_words_too(tokenizers):
    text = corpus.PAIR.format(left="a ring", right="a star")
    assert len(tokenizers.tokenizer_2(text)["input_ids"]) == len(text.replace(":", " :").replace(",", " ,").split()) + 2


def test_capitals_do_not_matter_and_other_words_are_spelt(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer("A Red STAR")["input_ids"] == tokenizer("a red star")["input_ids"]
        assert tokenizer.unk_token_id not in tokenizer("zebra-7!")["input_ids"][:-1]
    assert find_word(tokenizers.tokenizer_2, "a Star and a ring, a star", "star#2") == (7,)


def _corpus(scenes, tokenizers, **captions) -> Corpus:
    latents = np.arange(len(scenes) * 4 * 4 * 2, dtype=np.float32).reshape(len(scenes), 4, 4, 2)
    layouts = np.stack([layout(scene, SIZE, (2, 2)) for scene in scenes])
    config = CaptionConfig(**{"pair_every": 3} | captions)
    texts = {"tokenizers": tokenizers, "captions": config}
    return Corpus(latents=latents, layouts=layouts, scenes=scenes, **texts, batch_size=6, seed=0)


def test_batches_are_a_function_of_their_number(tokenizers, scenes):
    data = _corpus(scenes, tokenizers, pair_every=0)
    batches = list(itertools.islice(data.batches(2), 4))
    jax.tree.map(np.testing.assert_array_equal, batches[3], data.batch(5))
    assert batches[1]["example"].tolist() == list(range(18, 24))
    latents = np.concatenate([batch["latents"] for batch in batches])
    assert len(np.unique(latents[:, 0, 0, 0])) > 8


def test_scenes_are_seen_by_their_number_of_objects(tokenizers, scenes):
    data = _corpus(scenes, tokenizers, pair_every=0, object_weights=(3.0, 1.0))
    picks = np.concatenate([data.batch(step)["latents"][:, 0, 0, 0] for step in range(50)]).astype(int) // 32
    counts = np.bincount([len(scenes[pick].objects) for pick in picks], minlength=3) / len(picks)
    assert abs(counts[1] - 0.75) < 0.1
    for weights in ((1.0, 1.0, 1.0), (0.0, 0.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="object_weights"):
            CaptionConfig(object_weights=weights)


def test_a_pair_is_two_scenes_side_by_side_under_both_captions(tokenizers, scenes):
    data = _corpus(scenes, tokenizers, drop_t5=0.0, drop_clip=0.0)
    single, pair = data.batch(1), data.batch(2)
    assert single["latents"].shape == (6, 4, 4, 2) and pair["latents"].shape == (3, 4, 8, 2)
    assert pair["layouts"].shape == (3, 2, 4, FEATURES)
    text = tokenizers.tokenizer_2.decode(pair["t5_ids"][0], skip_special_tokens=True)
    assert text.startswith("two pictures side by side: on the left ")
    place = int(pair["latents"][0, 0, 4, 0]) // 32  # the right one's scene
    assert all(item.shape in text.split("on the right")[1] for item in scenes[place].objects)


def test_the_first_steps_see_one_object_at_a_time_and_full_captions(tokenizers, scenes):
    data = _corpus(scenes, tokenizers, easy_steps=3, full_steps=5, drop_t5=0.0, drop_clip=0.0)
    alone = [number for number, scene in enumerate(scenes) if len(scene.objects) == 1]
    seen = np.concatenate([data.batch(step)["latents"][:, 0, 0, 0] for step in range(3)]) // 32
    assert set(seen) <= set(alone) and data.batch(5)["latents"].shape[2] == 8  # of three steps none was a pair
    for step in (1, 3):
        batch = data.batch(step)
        told = tokenizers.tokenizer_2.batch_decode(batch["t5_ids"], skip_special_tokens=True)
        for place, text in zip((batch["latents"][:, 0, 0, 0] // 32).astype(int), told, strict=True):
            assert text == full_caption(scenes[place])
    ids = np.concatenate([data.batch(step)["t5_ids"] for step in (6, 7, 9)])
    told = tokenizers.tokenizer_2.batch_decode(ids, skip_special_tokens=True)
    assert not all(set(text.split()) & set(COLORS) for text in told)


def test_the_share_of_captions_that_name_the_light_is_a_setting(tokenizers, scenes):
    for light in (0.0, 1.0):
        data = _corpus(scenes, tokenizers, light=light, drop_t5=0.0, drop_clip=0.0, pair_every=0)
        for step in range(3):
            batch = data.batch(step)
            for reader, ids in ((tokenizers.tokenizer_2, batch["t5_ids"]), (tokenizers.tokenizer, batch["clip_ids"])):
                told = reader.batch_decode(ids, skip_special_tokens=True)
                for place, text in zip((batch["latents"][:, 0, 0, 0] // 32).astype(int), told, strict=True):
                    assert ("lit from" in text) == (light > 0), (scenes[place].style, text)


def test_captions_read_from_left_to_right(scenes):
    for number, scene in enumerate(scenes):
        text = describe(scene, np.random.default_rng(number))
        shapes = [item.shape for item in sorted(scene.objects, key=lambda item: item.x)]
        assert [word for word in text.replace(",", "").split() if word in CLASSES] == shapes
        assert "to the right of" not in text


def test_a_layout_tells_what_covers_each_token():
    item = SceneObject(
        shape="square", color="red", rgb=(255, 0, 0), texture="dotted", accent=(0, 0, 0), size=0.2, x=0.25, y=0.75,
        rotation=0.0,
    )  # fmt: skip
    light = Light(azimuth=90.0, elevation=45.0, warmth=0.5)
    scene = dataclasses.replace(example_scene(0, "train", 0)[0], objects=(item,), light=light)
    found = layout(scene, 64, (2, 2))
    assert found.shape == (2, 2, FEATURES)
    cover = found[..., CLASSES.index("square")]
    assert cover[1, 0] > 0.2 and cover.sum() == cover[1, 0]  # in the lower left quarter alone
    assert found[..., :COVERS].sum() == cover.sum() and (found[0] == 0).all() and (found[1, 1] == 0).all()
    dotted = [float(name == "dotted") for name in TEXTURES]
    owner = [*dotted, 1, 0, 1, -1, -1, 1]
    np.testing.assert_allclose(found[1, 0, COVERS:], [*owner, 0, 1, 0.5, 0, 0, 1], atol=1e-6)
    flat = dataclasses.replace(scene, style=Style(shading=False))
    np.testing.assert_allclose(layout(flat, 64, (2, 2))[1, 0, COVERS:], [*owner, 0, 0, 0.5, 0, 0, 1], atol=1e-6)


def test_every_word_of_an_object_tells_what_the_caption_says_of_it(tokenizers):
    text = "a picture of a star that is dotted and a red ring upside down to the left of a plain heart on the beach"
    (said,) = words(tokenizers.tokenizer_2, [text], 40)

    def numbers(*named):
        return [UNSAID if name is None else values.index(name) for values, name in zip(VALUES, named, strict=True)]

    nothing = numbers(None, None, None, None, None)
    expected = [nothing] * 3 + [numbers("star", None, "dotted", None, 0)] * 5 + [nothing]
    expected += [numbers("ring", "red", None, "upside down", 1)] * 5 + [nothing] * 4
    expected += [numbers("heart", None, "plain", None, 2)] * 3
    np.testing.assert_array_equal(said, expected + [nothing] * (40 - len(expected)))


def test_words_agree_with_the_scenes(tokenizers, scenes):
    some = [describe(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes)]
    for named, texts in ((True, [full_caption(scene) for scene in scenes]), (False, some)):
        for scene, said in zip(scenes, words(tokenizers.tokenizer_2, texts, 40), strict=True):
            objects = sorted(scene.objects, key=lambda item: item.x)
            assert set(said[:, -1]) == {UNSAID, *range(len(objects))}
            for order, item in enumerate(objects):
                (numbers,) = np.unique(said[said[:, -1] == order], axis=0)
                true = item.shape, item.color, item.texture, item.pose
                read = [None if n == UNSAID else values[n] for values, n in zip(VALUES[:-1], numbers[:-1], strict=True)]
                assert read[0] == item.shape
                assert all(r == t or (r is None and not named) for r, t in zip(read, true, strict=True))


def test_t5_reads_captions_of_one_scene_or_two_whole_or_not(tokenizers, scenes):
    captions = CaptionConfig(text_length=60)
    batches = list(itertools.islice(corpus.texts(scenes, tokenizers, captions, 16, seed=0, start_step=0), 3))
    jax.tree.map(np.testing.assert_array_equal, batches[2], next(corpus.texts(scenes, tokenizers, captions, 16, 0, 2)))
    told = tokenizers.tokenizer_2.batch_decode(batches[1]["t5_ids"], skip_special_tokens=True)
    assert [text.startswith("two pictures") for text in told] == [number % 8 == 0 for number in range(16)]
    whole = {full_caption(scene) for scene in scenes}
    assert set(told[1::2]) <= whole and not set(told[2::2]) <= whole
    np.testing.assert_array_equal(batches[1]["words"], words(tokenizers.tokenizer_2, told, 60))
    read = tokenizers.tokenizer.batch_decode(batches[1]["clip_ids"], skip_special_tokens=True)
    same = ["".join(mine.split()) == "".join(other.split()) for mine, other in zip(read, told, strict=True)]
    assert [i for i, alike in enumerate(same) if not alike] == [i for i in range(16) if i // 2 % 2]
    np.testing.assert_array_equal(batches[1]["bags"], bags(read))
    assert batches[1]["bags"].sum(axis=1).min() > 0 and batches[1]["bags"].sum(axis=0).max() < 16


def test_the_words_loss_is_the_cross_entropy_of_what_is_said():
    nothing = jnp.full((2, 3, 5), UNSAID)
    truth = nothing.at[0, 1, :2].set(jnp.array([3, 7]))
    sizes = [len(values) for values in VALUES]
    assert words_loss(jnp.zeros((2, 3, sum(sizes))), truth) == pytest.approx(np.log([12, 10]).mean())
    assert words_loss(jnp.zeros((2, 3, sum(sizes))), nothing) == 0
    right = np.zeros((2, 3, sum(sizes)))
    right[0, 1, [3, 12 + 7]] = 50.0
    assert words_loss(jnp.asarray(right), truth) < 1e-6


def test_the_layout_loss_counts_owners_only_where_there_is_one(scenes):
    truth = jnp.asarray([layout(scene, SIZE, (4, 4)) for scene in scenes])
    flat = truth.reshape(len(scenes), 16, FEATURES)
    assert layout_loss(flat, truth) == 0
    elsewhere = flat + 10 * (flat[..., -1:] == 0) * (np.arange(FEATURES) >= COVERS)[None, None]
    assert (elsewhere != flat).any() and layout_loss(elsewhere, truth) == 0
    assert layout_loss(flat + 1, truth) > 4 * COVERS


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"drop_t5": 1.0, "drop_clip": 1.0}, (False, False)),
        ({"drop_t5": 1.0, "drop_clip": 0.0}, (False, True)),
        ({"drop_t5": 0.0, "drop_clip": 1.0}, (True, False)),
        ({"drop_t5": 1.0, "drop_clip": 1.0, "local": 1.0}, (True, False)),  # a word that takes a step must be there
    ],
)
def test_captions_are_kept_from_one_encoder_or_both(tokenizers, scenes, shares, told):
    batch = _corpus(scenes, tokenizers, **shares).batch(0)
    empty = (tokenizers.tokenizer_2.eos_token_id, tokenizers.tokenizer.eos_token_id)
    first = batch["t5_ids"][:, 0], batch["clip_ids"][:, 1]
    assert tuple(bool((ids != end).all()) for ids, end in zip(first, empty, strict=True)) == told
    assert all((ids != end).all() or (ids == end).all() for ids, end in zip(first, empty, strict=True))


def test_a_bag_has_the_phrases_of_a_caption():
    text = "a drawing of a red star leaning left to the left of an arrow on the beach, in warm light lit from above"
    (found,) = bags([text])
    there = {phrase for phrase, value in zip(PHRASES, found, strict=True) if value}
    assert there == {
        "a drawing of", "red", "star", "leaning left", "arrow", "on the beach", "in warm light", "lit from above"
    }  # fmt: skip
    scores = jnp.where(jnp.asarray(found) > 0, 50.0, -50.0)[None]
    assert bag_loss(scores, jnp.asarray([found])) < 1e-6
    assert bag_loss(jnp.zeros_like(scores), jnp.asarray([found])) == pytest.approx(len(PHRASES) * np.log(2))


def test_local_examples_tell_looks_to_the_words_of_their_parts_alone(tokenizers, scenes):
    """In single pictures and in pairs: bare captions, and an owner for every word of an object or a place."""
    data = _corpus(scenes, tokenizers, local=1.0, drop_clip=0.0, pair_every=2)
    for step in range(4):
        batch = data.batch(step)
        pictures = batch["latents"].shape[2] // 4
        assert batch["part_ids"].shape[1:] == (2, 3 * pictures, corpus.PART_LENGTH)
        told = tokenizers.tokenizer_2.batch_decode(batch["t5_ids"], skip_special_tokens=True)
        for row, text in enumerate(told):
            assert not set(text.split()) & {*COLORS, *TEXTURES}
            tokens = tokenizers.tokenizer_2.convert_ids_to_tokens(batch["t5_ids"][row])
            numbers = batch["latents"][row, 0, ::4, 0].astype(int) // 32
            parts = tokenizers.tokenizer.batch_decode(
                batch["part_ids"][row].reshape(-1, corpus.PART_LENGTH), skip_special_tokens=True
            )
            bare, look = (half.tolist() for half in np.split(np.asarray([part.strip() for part in parts]), 2))
            for picture, number in enumerate(numbers):
                objects = sorted(scenes[number].objects, key=lambda item: item.x)
                for i, item in enumerate(objects):
                    part = 3 * picture + i
                    own = [t.strip("▁") for t, owner in zip(tokens, batch["owners"][row], strict=True) if owner == part]
                    assert " ".join(own) == bare[part] and bare[part].split()[1:] == [item.shape]
                    assert set(look[part].split()) & {*COLORS} <= {item.color}
                assert bare[3 * picture : 3 * picture + 2][len(objects) :] == [""] * (2 - len(objects))
                own = [
                    t.strip("▁")
                    for t, owner in zip(tokens, batch["owners"][row], strict=True)
                    if owner == 3 * picture + 2
                ]
                place = BACKGROUNDS[scenes[number].background.kind]
                assert " ".join(own) in ("", place) and look[3 * picture + 2].startswith(place)
    assert any((data.batch(step)["owners"] == 2).any() for step in range(4))
    assert (_corpus(scenes, tokenizers, local=1e-9).batch(0)["owners"] == corpus.NOBODY).all()
    assert "owners" not in _corpus(scenes, tokenizers).batch(0)


def test_a_word_takes_the_step_from_its_bare_part_to_the_look(tokenizers, scenes):
    """The training's steps are those of `tokenverse direction`: vectors of two prompts, through the same layers."""
    config = _config()
    networks = text_to_image.make_networks(config.text_to_image, tokenizers, Compute())
    params = random_params(jax.eval_shape(lambda: text_to_image.init_params(networks, 0)), seed=0)
    batch = _corpus(scenes, tokenizers, local=1.0).batch(0)
    offsets = text_to_image.modulation(
        params["transformer"], params["clip"], jax.tree.map(jnp.asarray, batch), networks
    )
    vec = jnp.stack([
        CLIPTextEncoder(networks.clip).apply({"params": params["clip"]}, jnp.asarray(ids)).pooled
        for ids in np.moveaxis(batch["part_ids"], 1, 0).reshape(2, -1, corpus.PART_LENGTH)
    ])  # fmt: skip
    steps = direction(networks.transformer, params["transformer"], vec[1], vec[0]).reshape(6, 3, -1)
    for row, token in itertools.product(range(6), range(40)):
        owner = batch["owners"][row, token]
        expected = np.zeros(steps.shape[-1]) if owner == corpus.NOBODY else steps[row, owner]
        np.testing.assert_allclose(offsets.shared[row, token], expected, atol=1e-5)
    assert text_to_image.modulation(params["transformer"], params["clip"], {}, networks) == NO_OFFSETS


def test_drawings_are_a_share_of_the_scenes():
    found = corpus.rows(0, "train", range(60), drawn=0.25)
    share = np.mean([scene.style != SHADED for scene in found])
    assert 0.1 < share < 0.4 and all(scene.style == SHADED for scene in corpus.rows(0, "train", range(20)))
    plain, drawn = (next(corpus.picture_batches(0, SIZE, 8, 0, drawn=share))["image"] for share in (0.0, 1.0))
    assert (plain != drawn).any(axis=(1, 2, 3)).all()


def _config(**changes) -> run.BaseConfig:
    """All stages at 16 px, two steps each, of few pictures."""

    def training(batch_size: int, learning_rate: float = 1e-3) -> dict:
        return {
            "batch_size": batch_size,
            "optimizer": {"learning_rate": learning_rate},
            "loop": {"duration": {"steps": 2}, "log_every": 1, "preview_every": 2, "min_free_bytes": 0},
        }

    flux = {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "guidance_embeds": False,
        "axes_dims_rope": [4, 2, 2],
    }
    model = {"block_out_channels": [4], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 2}
    values = {
        "image_size": SIZE,
        "num_scenes": 8,
        "vae": {"model": model, "training": training(2)},
        "text_to_image": {
            "flux": flux,
            "captions": {"pair_every": 1, "local": 0.5},
            "reading": training(4, learning_rate=0.5),
            "training": training(4),
        },
        "sampling": {"num_steps": 2, "cfg_scale": 2.0},
    }
    return config_lib.build(run.BaseConfig, values | changes)


def test_the_shipped_configs_build():
    config = config_lib.build(run.BaseConfig, config_lib.load("configs/flux_tiny.py"))
    assert config.vae.model.token_grid(config.image_size, config.image_size) == (8, 8)
    more = config_lib.build(run.BaseConfig, config_lib.load("configs/flux_tiny.py:more"))
    training = dataclasses.replace(more.vae.training, loop=config.vae.training.loop)  # it may be longer
    assert dataclasses.replace(more.vae, training=training) == config.vae
    assert more.text_to_image.flux == config.text_to_image.flux
    assert more.init_from and more.seed != config.seed and not more.text_to_image.captions.easy_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 17}, "multiples of 2"),
        ({"num_scenes": 8, "vae": {"model": {"latent_channels": 3}}}, "in_channels=8.*so 12 are needed"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    if "vae" in changes:
        vae_config = config_lib.to_dict(_config().vae)
        changes["vae"] = vae_config | {"model": vae_config["model"] | changes["vae"]["model"]}
    with pytest.raises(ValueError, match=message):
        _config(**changes)


def test_shares_of_dropped_captions_are_checked():
    for name in ("drop_t5", "drop_clip", "local", "light"):
        for share in (-0.1, 1.1):
            with pytest.raises(ValueError, match=f"{name}={share}: a share is needed"):
                CaptionConfig(**{name: share})


def test_the_autoencoder_is_trained_on_samples_of_its_latents():
    config = _config()
    params = random_params(jax.eval_shape(lambda: vae.init_params(config.vae, 0)), seed=0)
    batch = jax.tree.map(jnp.asarray, next(corpus.picture_batches(0, SIZE, 2, 0)))
    how = {"frozen": {}, "config": config.vae, "compute": Compute(), "seed": 0}
    loss = jax.jit(lambda params, step: vae.loss(params, batch, step, **how))
    first, metrics = loss(params, jnp.zeros((), jnp.int32))
    other, _ = loss(params, jnp.ones((), jnp.int32))
    assert first != other  # other noise
    weights = config.vae.l2_weight, config.vae.kl_weight
    expected = metrics["l1"] + weights[0] * metrics["l2"] + weights[1] * metrics["kl"]
    np.testing.assert_allclose(first, expected, rtol=1e-6)


def test_the_velocity_loss_starts_at_the_targets_power_and_reaches_all_networks(tokenizers, scenes):
    config = _config()
    networks = text_to_image.make_networks(config.text_to_image, tokenizers, Compute())
    params = random_params(jax.eval_shape(lambda: text_to_image.init_params(networks, 0)), seed=0)
    clip = params.pop("clip")
    del params["bag_head"]  # trained by reading alone
    batch = dataclasses.replace(_corpus(scenes, tokenizers, local=0.5), batch_size=24).batch(0)
    batch["latents"] = np.random.default_rng(0).normal(size=batch["latents"].shape).astype(np.float32)
    batch, step = jax.tree.map(jnp.asarray, batch), jnp.zeros((), jnp.int32)

    @jax.jit
    def differentiate(params, batch, step):
        loss = functools.partial(text_to_image.loss, clip=clip, config=config.text_to_image, networks=networks, seed=0)
        return jax.value_and_grad(loss, has_aux=True)(params, batch, step)

    _, gradients = differentiate(params, batch, step)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    # The last layer of a new model is zero: it says 0.
    last = params["transformer"]["final_layer"]
    last["linear"] = jax.tree.map(jnp.zeros_like, last["linear"])
    (_, metrics), _ = differentiate(params, batch, step)
    np.testing.assert_allclose(metrics["velocity"], 2.0, rtol=0.2)  # of noise minus data, both of variance 1


def test_a_training_spreads_its_batches_over_all_devices(tmp_path):
    """A regression whose loss tells how many rows a device has, and whose preview where the parameters are."""
    rows, shown = [], []

    def loss(params, batch, step):
        jax.debug.inspect_array_sharding(batch["x"], callback=lambda found: rows.append(found.shard_shape((16, 3))))
        return jnp.mean(jnp.square(batch["x"] @ params["w"] - batch["y"])), {}

    def preview(params, step):
        shown.append(params["w"])
        return {}

    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    batch = {"x": x, "y": x @ np.float32([[1], [2], [3]])}
    config = dataclasses.replace(_config().vae.training, batch_size=16)
    result = train_network(
        config,
        tmp_path,
        resolved_config={},
        must_match=(),
        init=lambda: {"w": jnp.zeros((3, 1))},
        loss=loss,
        batches=lambda step: itertools.repeat(batch),
        dtype="float32",
        preview=preview,
    )
    assert result.step == 2 and rows == [(2, 3)]
    assert len(shown[-1].sharding.device_set) == 8 and shown[-1].is_fully_replicated
    np.testing.assert_allclose(result.state.params["w"], np.full((3, 1), 2e-3), rtol=1e-2)  # Adam's two steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a whole run, and how to run it again."""
    workdir = tmp_path_factory.mktemp("base")

    def train() -> loop.Result:
        # Programs for few devices compile faster; the test above has eight.
        two_devices = functools.partial(make_mesh, devices=jax.devices()[:2])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "make_mesh", two_devices)
            return run.train(_config(), workdir)

    result = train()
    assert (result.step, result.stopped_by) == (2, None)
    return workdir, train


def test_a_run_leaves_a_pipeline_and_goes_on_where_it_was(trained):
    workdir, train = trained
    config = _config()
    pipeline = Pipeline.from_pretrained(workdir / "pipeline")
    assert pipeline.text_length == 40
    assert any((leaf != leaf.astype(jnp.bfloat16)).any() for leaf in jax.tree.leaves(pipeline.vae.params))  # float32
    tokens = pipeline.encode_images(corpus.draw(corpus.rows(0, "train", range(8)), SIZE))
    np.testing.assert_allclose([tokens.mean(), tokens.std()], [0, 1], atol=2e-2)  # what scaling and shift are for
    networks = text_to_image.make_networks(config.text_to_image, make_tokenizers(scene_words(), 40), Compute())
    before = text_to_image.init_params(networks, 0)["t5"]["shared"]["embedding"]
    after = np.asarray(pipeline.t5.params["shared"]["embedding"], np.float32)
    assert np.abs(after - before).max() > 0.3  # T5 has read, at the higher learning rate
    before = text_to_image.init_params(networks, 0)["clip"]["token_embedding"]["embedding"]
    after = np.asarray(pipeline.clip.params["token_embedding"]["embedding"], np.float32)
    assert np.abs(after - before).max() > 0.3  # so has CLIP
    written = {path: path.stat().st_mtime_ns for path in workdir.glob("*.npy")}
    assert len(written) == 2 and list(workdir.glob("text_to_image/**/*.png"))
    again = train()
    assert again.step == 2 and {path: path.stat().st_mtime_ns for path in workdir.glob("*.npy")} == written


def test_a_run_may_go_on_from_a_pipeline(trained, tmp_path, monkeypatch):
    """Its encoder and CLIP stay to the bit, its decoder is trained; without updates to speak of the rest stays too."""
    monkeypatch.setattr(network, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:2]))
    folder = trained[0] / "pipeline"
    config = _config(init_from=str(folder), seed=1)
    stage = config.text_to_image
    still = dataclasses.replace(
        stage.training, optimizer=dataclasses.replace(stage.training.optimizer, learning_rate=1e-12)
    )
    config = dataclasses.replace(config, text_to_image=dataclasses.replace(stage, training=still))
    run.train(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"vae", "text_to_image", "pipeline"}
    ours, start = Pipeline.from_pretrained(tmp_path / "pipeline"), Pipeline.from_pretrained(folder)
    for name in PARTS:
        assert getattr(ours, name).config == getattr(start, name).config
    exactly, nearly = (functools.partial(np.testing.assert_allclose, rtol=0, atol=atol) for atol in (0, 1e-11))
    jax.tree.map(exactly, ours.vae.params["encoder"], start.vae.params["encoder"])
    jax.tree.map(exactly, ours.clip.params, start.clip.params)
    for name in ("transformer", "t5"):
        jax.tree.map(nearly, getattr(ours, name).params, getattr(start, name).params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours.vae.params["decoder"], start.vae.params["decoder"])
    assert max(jax.tree.leaves(moved)) > 1e-6
    other = dataclasses.replace(start, clip=Part(start.clip.config, jax.tree.map(lambda x: 2 * x, start.clip.params)))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"frozen\.clip"):
        run.train(dataclasses.replace(config, init_from=str(tmp_path / "other")), tmp_path)


def test_a_pipeline_that_a_run_cannot_go_on_from_is_refused(trained, tmp_path, tokenizers):
    folder = trained[0] / "pipeline"
    changed = config_lib.to_dict(_config())["text_to_image"]
    changed["flux"] |= {"num_single_layers": 2}
    config = _config(init_from=str(folder), text_to_image=changed)
    with pytest.raises(ValueError, match=r"init_from .*: its transformer is .*num_single_layers=1"):
        run.train(config, tmp_path / "a")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    shutil.rmtree(other / "tokenizer_2")
    make_tokenizers([*scene_words()[1:], "zebra"], 40).tokenizer_2.save_pretrained(other / "tokenizer_2")
    with pytest.raises(ValueError, match=r"init_from .*: its tokenizer_2 has other tokens"):
        run.train(_config(init_from=str(other)), tmp_path / "b")


def test_captions_may_be_read_by_one_encoder_alone(trained, tmp_path, monkeypatch):
    pipeline = Pipeline.from_pretrained(trained[0] / "pipeline")
    seen = []

    def recorded(self, prompts, **settings):
        seen.append(jax.tree.map(np.asarray, prompts))
        return np.zeros((len(prompts.vec), 64, 64, 3), np.uint8)

    monkeypatch.setattr(Pipeline, "generate", recorded)
    for reads in ("both", "clip", "t5"):
        report(pipeline, tmp_path, count=3, sampling=pipeline.usual, reads=reads, objects=1)
    both, clip, t5 = seen
    assert (clip.vec == both.vec).all() and (t5.txt == both.txt).all()
    assert (clip.txt == clip.txt[:1]).all() and (t5.vec == t5.vec[:1]).all()  # of nothing
    assert (clip.txt != both.txt).any() and (t5.vec != both.vec).any()
    captions = held_out_captions("test", 5, objects=2)
    assert len(captions) == 5 and all(
        sum(word in CLASSES for word in c.replace(",", "").split()) == 2 for c in captions
    )


@pytest.mark.slow
def test_two_processes_train_the_same(trained, tmp_path):
    write_config(tmp_path / "config.py", config_lib.to_dict(_config()))
    options = ["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]
    code, _, err = ended(launched(2, ["-m", "tokenverse_jax.cli", "train-base", *options], devices=1))
    assert code == 0, err
    for stage in ("vae", "reading", "text_to_image"):
        ours, theirs = (
            [json.loads(line)["loss"] for line in (path / stage / "metrics.jsonl").read_text().splitlines()]
            for path in (tmp_path / "run", trained[0])
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert Pipeline.from_pretrained(tmp_path / "run" / "pipeline").text_length == 40
