"""Alignment losses, the DINOv2 teacher's files, and initialisation from wider weights."""

import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergevq_jax.tokenizer.losses import alignment
from mergevq_jax.tokenizer.losses.alignment import init_blocks_from_dinov2, select_uniform
from runtime_jax.networks import dinov2
from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config, bicubic_matrix, load_dinov2
from runtime_jax.training.update import Optimizer
from runtime_jax.weights import WeightError, read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def golden(goldens):
    tensors, metadata = read_safetensors(goldens / "dinov2.safetensors")
    return tensors, json.loads(metadata["config"])


@pytest.fixture(scope="module")
def state_dict(golden):
    return {name.removeprefix("param/"): array for name, array in golden[0].items() if name.startswith("param/")}


@pytest.fixture(scope="module")
def folder(golden, state_dict, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2")
    (path / "config.json").write_text(json.dumps(golden[1] | {"model_type": "dinov2"}))
    write_safetensors(path / "model.safetensors", state_dict, {})
    return path


@pytest.fixture(scope="module")
def teacher(folder):
    return load_dinov2(folder)


def error(actual, expected):
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def test_files_of_older_transformers_give_the_same(golden, state_dict, folder, teacher, tmp_path):
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    old_names = {new: f"attention.{old}" for new, old in projections.items()} | {"o_proj": "output.dense"}
    renamed = {}
    for name, array in state_dict.items():
        for new, old in old_names.items():
            name = name.replace(new, old)
        renamed[name] = array
    assert "encoder.layer.0.attention.attention.query.weight" in renamed
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_safetensors(tmp_path / "model.safetensors", renamed, {})
    config, params = load_dinov2(tmp_path)
    assert config == teacher[0]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), params, teacher[1])


def test_hub_id(folder, teacher, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert load_dinov2("facebook/dinov2-base")[0] == teacher[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "vit", "model_type = 'vit'; only 'dinov2'"),
        ("use_swiglu_ffn", True, "use_swiglu_ffn = True; only False"),
        ("hidden_size", None, "not a whole number: hidden_size"),
        ("hidden_size", 64, r"position_embeddings: shape \(17, 32\) after conversion, but positions has \(17, 64\)"),
        ("num_hidden_layers", 2, r"blocks/norm1/scale"),
    ],
)
def test_other_models_are_refused(golden, folder, tmp_path, field, value, message):
    (tmp_path / "config.json").write_text(json.dumps(golden[1] | {field: value}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(WeightError, match=message):
        load_dinov2(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(WeightError, match=r"not a readable config\.json"):
        load_dinov2(tmp_path)
    with pytest.raises(WeightError, match="no such file or folder"):
        load_dinov2(tmp_path / "absent")


def test_full_size_and_bad_image_size():
    shapes = jax.eval_shape(DINOv2().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 86_580_480 - 768  # DINOv2-Base without its mask token
    output = jax.eval_shape(DINOv2(dtype=jnp.bfloat16).apply, shapes, jnp.zeros((2, 224, 224, 3)))
    assert (output.hidden.shape, output.pooled.dtype) == ((2, 257, 768), jnp.float32)
    with pytest.raises(ValueError, match="image size 225x224 is not a multiple of 14"):
        jax.eval_shape(DINOv2().init, jax.random.key(0), jnp.zeros((1, 225, 224, 3)))


def test_bicubic_weights():
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5))
    for old, new in ((4, 6), (37, 16), (3, 11)):
        np.testing.assert_allclose(bicubic_matrix(old, new).sum(axis=1), 1, rtol=1e-6)
    # Halfway between two samples a = -0.75 gives (-3, 19, 19, -3) / 32.
    np.testing.assert_allclose(bicubic_matrix(8, 4)[1], np.array([0, -3, 19, 19, -3, 0, 0, 0]) / 32)


def test_standardize():
    white = dinov2.standardize(jnp.ones((1, 1, 1, 3)))
    expected = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(white[0, 0, 0], expected, rtol=1e-5)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 16)).astype(np.float32) * 3, rng.normal(size=(3, 16)).astype(np.float32) * 3


def test_kl(features):
    student, teacher = features
    p, q = softmax(teacher.astype(np.float64) / 4), softmax(student.astype(np.float64) / 4)
    expected = 16 * np.mean(np.sum(p * np.log(p / q), axis=-1))
    student, teacher = map(jnp.asarray, features)
    assert float(alignment.kl_alignment_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(alignment.kl_alignment_loss(teacher, teacher)) == 0
    assert float(alignment.kl_alignment_loss(student + 7, teacher)) == pytest.approx(expected, rel=1e-4)


def test_cosine(features):
    student, teacher = map(jnp.asarray, features)
    a, b = (x.astype(np.float64) for x in features)
    expected = -np.mean(np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    assert float(alignment.cosine_alignment_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(alignment.cosine_alignment_loss(5 * teacher, teacher)) == pytest.approx(-1, rel=1e-6)
    assert np.all(np.isfinite(jax.grad(alignment.cosine_alignment_loss)(jnp.zeros((3, 16)), teacher)))


@pytest.mark.parametrize("loss", [alignment.kl_alignment_loss, alignment.cosine_alignment_loss])
def test_only_the_student_learns(features, loss):
    student, teacher = map(jnp.asarray, features)
    assert np.any(jax.grad(loss)(student, teacher))
    assert not np.any(jax.grad(loss, argnums=1)(student, teacher))


def test_smoothed_cross_entropy(features):
    logits, labels = features[0], np.array([1, 0, 15])
    log_p = np.log(softmax(logits.astype(np.float64)))
    expected = -np.mean(0.9 * log_p[np.arange(3), labels] + 0.1 * log_p.mean(axis=1))
    actual = alignment.smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_random_crops_are_crops_fixed_by_their_keys():
    rows, columns = jnp.meshgrid(jnp.arange(32.0), jnp.arange(48.0), indexing="ij")
    images = jnp.stack([jnp.stack([rows, columns, jnp.ones((32, 48))], axis=-1)] * 3)
    keys = jax.random.split(jax.random.key(0), 3)
    crops = jax.jit(alignment.random_resized_crops, static_argnums=2)(images, keys, 16)
    np.testing.assert_allclose(crops[..., 2], 1, rtol=1e-5)
    for crop in np.asarray(crops):
        down, right = np.diff(crop[2:-2, 8, 0]), np.diff(crop[8, 2:-2, 1])
        # Coordinates rise evenly: one window, one zoom.
        np.testing.assert_allclose(down, down.mean(), rtol=0.1)
        np.testing.assert_allclose(down.mean() * 16 / 32, right.mean() * 16 / 48, rtol=0.03)
        assert 0.38 <= down.mean() * 16 / 32 <= 1.02
        assert crop[..., :2].min() >= -0.01 and crop[..., 0].max() <= 31.01 and crop[..., 1].max() <= 47.01
    # The crop of an image and key does not depend on the batch.
    alone = jax.jit(alignment.random_resized_crops, static_argnums=2)(images[1:2], keys[1:2], 16)
    np.testing.assert_allclose(alone[0], crops[1], rtol=1e-5, atol=1e-4)
    assert np.abs(crops[0] - crops[1]).max() > 1
    assert alignment.resized(images, 16).shape == (3, 16, 16, 3)


def test_select_uniform():
    x = np.arange(48).reshape(6, 8)
    np.testing.assert_array_equal(select_uniform(x, (3, 4)), x[::2, ::2])
    np.testing.assert_array_equal(select_uniform(x, (6, 8)), x)
    # 8 to 5: positions 0, 1.75, 3.5, 5.25, 7 round to 0, 2, 4, 5, 7.
    np.testing.assert_array_equal(select_uniform(x, (1, 5)), x[:1, [0, 2, 4, 5, 7]])
    for shape in ((7, 8), (48,), (0, 8)):
        with pytest.raises(ValueError, match="cannot be taken"):
            select_uniform(x, shape)


def block_shapes(width, layers):
    def norm():
        return {"scale": np.zeros(width, np.float32), "bias": np.zeros(width, np.float32)}

    def dense(inputs, outputs):
        return {"kernel": np.zeros((inputs, outputs), np.float32), "bias": np.zeros(outputs, np.float32)}

    return {"cls_token": np.ones((1, 1, width), np.float32)} | {
        f"blocks_{i}": {
            "norm1": norm(),
            "attn": {"qkv": dense(width, 3 * width), "proj": dense(width, width)},
            "ls1": {"gamma": np.zeros(width, np.float32)},
            "norm2": norm(),
            "mlp": {"fc1": dense(width, 4 * width), "fc2": dense(4 * width, width)},
            "ls2": {"gamma": np.zeros(width, np.float32)},
        }
        for i in range(layers)
    }


def test_encoder_blocks_from_dinov2(teacher):
    source = teacher[1]["blocks"]
    target = block_shapes(16, 3)
    filled = init_blocks_from_dinov2(target, teacher[1])
    blocks = {name: block for name, block in target.items() if name != "cls_token"}
    assert jax.tree.map(np.shape, filled) == jax.tree.map(np.shape, blocks)
    for i in range(3):
        block = filled[f"blocks_{i}"]
        np.testing.assert_array_equal(block["ls1"]["gamma"], source["scale1"][i, ::2])
        np.testing.assert_array_equal(block["mlp"]["fc1"]["kernel"], source["fc1"]["kernel"][i, ::2, ::2])
        for n, name in enumerate(("query", "key", "value")):
            part = slice(16 * n, 16 * (n + 1))
            np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"][:, part], source[name]["kernel"][i, ::2, ::2])
            np.testing.assert_array_equal(block["attn"]["qkv"]["bias"][part], source[name]["bias"][i, ::2])
    with pytest.raises(ValueError, match="4 transformer blocks, DINOv2 3"):
        init_blocks_from_dinov2(block_shapes(16, 4), teacher[1])
    with pytest.raises(ValueError, match="cannot be taken"):
        init_blocks_from_dinov2(block_shapes(64, 3), teacher[1])


def test_a_new_run_starts_from_the_teachers_blocks(folder, teacher):
    import optax

    from mergevq_jax.tokenizer import train
    from mergevq_jax.tokenizer.config import TokenizerConfig
    from mergevq_jax.tokenizer.run import make_program, new_state
    from runtime_jax.mesh import MeshConfig, make_mesh

    sizes = {"resolution": 32, "ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": (0, 0, 0), "num_att_blocks": 2}
    model = TokenizerConfig(**sizes, z_channels=6, keep=48, dist_head=None, recovery=None)
    losses = train.LossConfig(perceptual_weight=0.0, source_weight=0.0)
    optimizer = Optimizer(optax.sgd(1.0), optax.constant_schedule(1.0))
    optimizers = train.Optimizers(optimizer, optimizer)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        config = train.StepConfig(
            model=model, losses=losses, discriminator=train.DiscriminatorConfig(ndf=8, num_layers=1)
        )
        program = make_program(config, optimizers, mesh, train.Frozen())
        plain, filled = (jax.device_get(new_state(program, source)) for source in (None, str(folder)))
    expected = init_blocks_from_dinov2(plain.params["encoder"]["attn"], teacher[1])
    for params in (filled.params, filled.ema):
        encoder = params["encoder"]
        jax.tree.map(np.testing.assert_array_equal, {name: encoder["attn"][name] for name in expected}, expected)
        jax.tree.map(np.testing.assert_array_equal, encoder["stem"], plain.params["encoder"]["stem"])


def test_filled_blocks_are_the_teachers_at_equal_width(golden, teacher):
    """The encoder's block, filled at the teacher's width, equals the teacher's block."""
    from mergevq_jax.tokenizer.layers import Block
    from runtime_jax.nn.compute import Compute

    config, params = teacher
    x = jnp.asarray(golden[0]["out/hidden"])
    filled = init_blocks_from_dinov2(block_shapes(config.width, 1), params)["blocks_0"]
    actual, _, _ = Block(config.num_heads, 1e-5, Compute()).apply({"params": filled}, x)
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    expected, _ = dinov2.Block(config, "xla", jnp.float32).apply({"params": first}, x, None)
    assert error(actual, expected) < 1e-4  # the norms' epsilons differ: 1e-5 here, 1e-6 there


def test_config_defaults_are_dinov2_base():
    assert DINOv2Config() == dinov2.parse_config(
        {
            "model_type": "dinov2",
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "mlp_ratio": 4,
            "patch_size": 14,
            "image_size": 518,
        }
    )
