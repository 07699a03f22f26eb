"""Every module against the outputs of the released code and of transformers, through check_golden.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import check_golden
import golden_mergevq
import golden_tools
import jax
import numpy as np
import pytest
from flax import traverse_util

from mergevq_jax.tokenizer import convert
from mergevq_jax.tokenizer.config import RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.decoder import Decoder
from mergevq_jax.tokenizer.encoder import Encoder
from mergevq_jax.tokenizer.losses import adversarial
from mergevq_jax.tokenizer.recovery import SourceRecovery
from runtime_jax.networks import inception
from runtime_jax.weights import export_weights, read_safetensors, write_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(path.name for path in GOLDEN.iterdir())

# Measured on a CPU: 1.5e-6 at most, but 2.3e-6 for the entropy's gradient, 3.9e-6 for the recovery's softmax, 5.3e-6
# for Inception's maps, and up to 1.3e-5 for FLUX, whose random blocks have activations of some thousands.
MEASURED = {
    "lfq": 2e-5,
    "source_recovery": 2e-5,
    "inception": 2e-5,
    "flux_transformer": 4e-5,
    "flux_transformer_schnell": 4e-5,
}

# Parameters that the mutation test changes: one of stacked blocks, and what a second encoder adds to the first.
MUTATED = {
    "encoder_r": r".*",
    "encoder_gr": r"conv_in.*|down.*",
    "encoder_g_nomerge": r"dist_head.*",
    "decoder": r"(?!attn\.blocks\.[02]).*",
    "source_recovery": r".*",
    "patchgan": r".*",
    "gpt": r"(?!spatial_blocks\.0).*",
    "dinov2": r"(?!encoder\.layer\.[02]).*",
    "clip_text": r"(?!encoder\.layers\.[02]).*",
    # Its token embedding has two names, which must agree: test_text_encoders.py changes both.
    "t5_encoder": r"encoder\.(block\.1|final).*|.*relative_attention_bias.*",
    "flux_vae": r"encoder\.(conv|down).*|decoder\.(mid_block\.(resnets\.0|att)|up_blocks\.1\.resnets\.0).*",
}
# Parameters without effect: a bias before a norm of each channel, and what cancels in a softmax.
WITHOUT_EFFECT = {
    "encoder_r": {"conv_in.0.bias"},
    "dinov2": {"embeddings.mask_token", "encoder.layer.1.attention.k_proj.bias"},
    "clip_text": {"encoder.layers.1.self_attn.k_proj.bias"},
    "patchgan": {"main.3.num_batches_tracked", "main.6.num_batches_tracked"},
    "flux_vae": {"decoder.mid_block.attentions.0.to_k.bias"},
}

AVERAGE_IN_THE_LAST_BLOCK = inception._BLOCKS | {"Mixed_7c": inception._BLOCKS["Mixed_7b"]}
T5_MLP = "encoder.block.1.layer.1.DenseReluDense"


def errors(path: Path) -> dict[str, float]:
    """Relative error of every output, or the share of entries that differ."""
    return {name: 1.0 - value if exact else value for name, (value, exact) in check_golden.check(path).items()}


def load(name: str):
    tensors, metadata = read_safetensors(GOLDEN / f"{name}.safetensors")
    return json.loads(metadata["config"]), tensors


def save(path: Path, config: dict, tensors: dict) -> Path:
    write_safetensors(path, tensors, {"config": json.dumps(config)})
    return path


@pytest.mark.parametrize("file", FILES)
def test_parity(file):
    found = errors(GOLDEN / file)
    assert found and max(found.values()) <= MEASURED.get(Path(file).stem, 5e-6), found


def test_every_released_module_has_a_golden():
    released = {"tome_step", "encoder", "decoder", "lfq", "lfq_factorized", "source_recovery", "patchgan", "gpt"}
    assert {check_golden.runner_for(GOLDEN / file) for file in FILES if file.endswith(".safetensors")} == set(
        check_golden.RUNNERS.values()
    )
    assert released <= check_golden.RUNNERS.keys()
    assert {"encoder_gr.safetensors", "encoder_r.safetensors", "tome_schedule.json"} <= set(FILES)


@pytest.mark.parametrize("name", MUTATED)
def test_every_mutated_weight_fails(name):
    config, tensors = load(name)
    params, inputs, expected = (golden_tools.parts(tensors, kind) for kind in ("param", "in", "out"))
    runner = check_golden.runner_for(GOLDEN / name)
    rng = np.random.default_rng(0)
    unnoticed = set()
    for key, array in params.items():
        if not re.fullmatch(MUTATED[name], key):
            continue
        changed = array + 1 if array.ndim == 0 else array + rng.normal(0.3, 0.1, array.shape).astype(array.dtype)
        got = runner(config, params | {key: changed}, inputs)
        if all(check_golden.good(*check_golden.compare(np.asarray(got[out]), expected[out])) for out in expected):
            unnoticed.add(key)
    assert unnoticed == WITHOUT_EFFECT.get(name, set())


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("encoder_gr", "attn.blocks.0.norm1.weight", "attn.blocks.0.norm2.weight"),
        ("encoder_gr", "attn.blocks.0.attn.qkv.weight", "attn.blocks.1.attn.qkv.weight"),
        ("encoder_r", "attn.blocks.1.ls1.gamma", "attn.blocks.1.ls2.gamma"),
        ("decoder", "adaptive.1.gamma.weight", "adaptive.1.beta.weight"),
        ("decoder", "attn.blocks.0.mlp.dwconv.weight", "attn.blocks.2.mlp.dwconv.weight"),
        ("source_recovery", "blocks.0.q.weight", "blocks.1.q.weight"),
        ("patchgan", "main.3.weight", "main.3.running_var"),
        ("gpt", "spatial_blocks.0.feed_forward.w1.weight", "spatial_blocks.0.feed_forward.w3.weight"),
        ("gpt", "spatial_blocks.1.attention.wqkv.weight", "spatial_blocks.0.attention.wqkv.weight"),
        ("dinov2", "encoder.layer.0.attention.q_proj.weight", "encoder.layer.2.attention.q_proj.weight"),
        ("clip_text", "encoder.layers.0.layer_norm1.weight", "encoder.layers.0.layer_norm2.weight"),
        ("t5_encoder", f"{T5_MLP}.wi_0.weight", f"{T5_MLP}.wi_1.weight"),
        ("flux_vae", "decoder.mid_block.attentions.0.to_q.weight", "decoder.mid_block.attentions.0.to_v.weight"),
    ],
)
def test_two_swapped_weights_fail(name, one, other, tmp_path):
    config, tensors = load(name)
    one, other = f"param/{one}", f"param/{other}"
    swapped = tensors | {one: tensors[other], other: tensors[one]}
    path = save(tmp_path / f"{name}.safetensors", config, swapped)
    assert max(errors(path).values()) > check_golden.TOLERANCE


@pytest.fixture
def fresh_programs():
    """Drops compiled modules, which hide a patched constant, before and after."""
    golden_tools.apply.clear_cache()
    yield
    golden_tools.apply.clear_cache()


@pytest.mark.parametrize(
    ("name", "constant", "value", "limit"),
    [
        ("encoder_g_nomerge", "runtime_jax.nn.group_norm.EPSILON", 1e-3, 1e-4),  # 1e-6 is right
        ("encoder_g_nomerge", "mergevq_jax.tokenizer.layers.LAYER_NORM_EPSILON", 1e-6, 5e-6),  # 1e-5 is right
        ("decoder", "runtime_jax.nn.group_norm.EPSILON", 1e-5, 5e-6),  # 4.4e-5
        ("source_recovery", "mergevq_jax.tokenizer.layers.LAYER_NORM_EPSILON", 1e-6, 1e-4),  # 5.8e-2
        ("flux_vae", "runtime_jax.nn.group_norm.EPSILON", 1e-5, 5e-6),  # 1.2e-5
        ("dinov2", "runtime_jax.networks.dinov2.LAYER_NORM_EPSILON", 1e-5, 5e-6),  # 6.9e-6
        ("dinov2", "runtime_jax.networks.dinov2.BICUBIC_A", -0.5, 1e-4),  # -0.75 is right
        ("patchgan", "mergevq_jax.tokenizer.losses.adversarial.BATCH_NORM_EPSILON", 1e-4, 5e-6),
        ("inception", "runtime_jax.networks.inception.EPSILON", 1e-5, 1e-4),  # 1e-3 is right
        (
            "inception",
            "runtime_jax.networks.inception._BLOCKS",
            AVERAGE_IN_THE_LAST_BLOCK,
            1e-4,
        ),  # the maximum is right
    ],
)
def test_a_changed_constant_fails(name, constant, value, limit, monkeypatch, fresh_programs):
    monkeypatch.setattr(constant, value)
    assert max(errors(GOLDEN / f"{name}.safetensors").values()) > limit


# Files of other sizes and arguments, from our own modules: they test how the script reads files, not parity.

SMALL = {"ch": 32, "in_channels": 3, "ch_mult": [1, 1, 1], "resolution": 16, "z_channels": 5, "num_att_blocks": 2}


def write_golden(path: Path, config: dict, module, table, images: np.ndarray, outputs, **options) -> Path:
    """A golden file of `module` with random weights; `outputs` turns its result into named NCHW arrays."""
    shapes = traverse_util.flatten_dict(golden_tools.shapes(module, images.shape, tuple(options.items())), sep="/")
    rng = np.random.default_rng(1)
    variables = {key: rng.normal(0.5, 0.2, shape.shape).astype(np.float32) for key, shape in shapes.items()}
    variables = traverse_util.unflatten_dict(variables, sep="/")
    result = golden_tools.apply(variables, images, module=module, options=tuple(options.items()))
    is_discriminator = "batch_stats" in variables
    params = export_weights(table, variables if is_discriminator else variables["params"])
    tensors = {f"param/{key}": array for key, array in params.items()}
    tensors |= {f"out/{key}": np.asarray(array) for key, array in outputs(result).items()}
    source = images if images.ndim == 3 else np.moveaxis(images, -1, 1)
    return save(path, config, tensors | {"in/z" if "decoder" in path.name else "in/x": np.ascontiguousarray(source)})


def pixels(*shape):
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def nchw(tokens, rows, columns):
    tokens = np.asarray(tokens)
    return np.ascontiguousarray(tokens.swapaxes(1, 2).reshape(tokens.shape[0], -1, rows, columns))


@pytest.mark.parametrize(
    ("name", "arguments", "fields", "shape", "keep"),
    [
        # no head, no merging, a width given only by the weights, more heads than num_heads
        (
            "encoder_none",
            {"dist_head": None, "merge_num": None, "isotropic": True, "head_dim": 16, "drop_path": 0.2},
            {"dist_head": None, "isotropic": 64, "head_dim": 16},
            (16, 16),
            16,
        ),
        # a CNN with blocks on one level, a head whose width only the weights give, an image that is not square
        (
            "encoder_foo_2",
            {"dist_head": True, "merge_num": 12, "num_res_blocks": [0, 1, 0], "head_dim": None},
            {"dist_head": "layer2", "num_classes": 7, "num_res_blocks": (0, 1, 0)},
            (16, 24),
            12,
        ),
    ],
)
def test_other_encoders(name, arguments, fields, shape, keep, tmp_path):
    ours = TokenizerConfig(
        ch=32, ch_mult=(1, 1, 1), resolution=16, z_channels=5, num_att_blocks=2, num_heads=2, keep=9, **fields
    )

    def outputs(encoded):
        source = golden_mergevq.with_class_token(golden_mergevq.one_hot(encoded.source_map, keep)).astype(np.float32)
        head = {} if encoded.head is None else {"head": encoded.head}
        return {"z": nchw(encoded.z, keep // 4, 4), "source": source} | head

    path = write_golden(
        tmp_path / f"{name}.safetensors",
        SMALL | {"num_heads": 2} | arguments,
        Encoder(ours),
        convert.encoder_table(ours),
        pixels(2, *shape, 3),
        outputs,
        keep=keep,
        with_head=ours.dist_head is not None,
    )
    assert max(errors(path).values()) == 0
    assert ("head" in errors(path)) == (ours.dist_head is not None)


def test_another_decoder(tmp_path):
    ours = TokenizerConfig(
        ch=32,
        ch_mult=(1, 1),
        resolution=16,
        z_channels=5,
        num_att_blocks=2,
        num_heads=2,
        keep=64,
        num_res_blocks=(1, 2),
    )
    config = SMALL | {"num_heads": 2, "ch_mult": [1, 1], "num_res_blocks": [1, 2]}
    path = write_golden(
        tmp_path / "decoder_wide.safetensors",
        config,
        Decoder(ours),
        convert.DECODER,
        pixels(1, 2, 5, 5),
        lambda images: {"x": np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, 1))},
    )
    assert max(errors(path).values()) == 0


def test_another_source_recovery(tmp_path):
    sizes = {"rec_embed_dim": 12, "num_layers": 1, "num_heads": 3}
    path = write_golden(
        tmp_path / "source_recovery_b.safetensors",
        sizes | {"keep_num": 4, "full_num": 10, "embed_dim": 31, "learn_source": False},
        SourceRecovery(RecoveryConfig(**sizes), raw_tokens=10),
        convert.RECOVERY,
        pixels(2, 4, 31),
        lambda logits: {"source": jax.nn.softmax(logits, axis=-1).swapaxes(1, 2)},
    )
    assert max(errors(path).values()) == 0


def test_another_discriminator(tmp_path):
    path = write_golden(
        tmp_path / "patchgan_small.safetensors",
        {},
        adversarial.PatchDiscriminator(ndf=4, num_layers=1),
        golden_mergevq.discriminator_table(1),
        pixels(3, 16, 18, 3),
        lambda logits: {"logits_eval": np.ascontiguousarray(np.moveaxis(np.asarray(logits), -1, 1))},
        train=False,
    )
    tensors, metadata = read_safetensors(path)
    with_losses = tensors | {"in/real": pixels(2, 1, 3, 4), "in/fake": pixels(2, 1, 3, 4)}
    write_safetensors(path, with_losses, metadata)
    assert max(errors(path).values()) == 0


def test_a_merge_of_more_than_half_is_cut_as_in_the_reference(tmp_path):
    config, tensors = load("tome_step")
    inputs = {key: array for key, array in tensors.items() if key.startswith("in/")}
    half = golden_mergevq.run_tome_step(config | {"r": 8}, {}, golden_tools.parts(inputs, "in"))
    outputs = {f"out/{key}": np.asarray(array, np.float32) for key, array in half.items()}
    path = save(tmp_path / "tome_step_half.safetensors", config | {"r": 30}, inputs | outputs)
    assert max(errors(path).values()) == 0


# The command.


def run(capsys, *paths) -> tuple[int, str, str]:
    precision = jax.config.jax_default_matmul_precision
    code = check_golden.main([str(path) for path in paths])
    jax.config.update("jax_default_matmul_precision", precision)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_prints_every_output(capsys):
    code, out, err = run(capsys, GOLDEN / "tome_step.safetensors", GOLDEN / "tome_schedule.json")
    assert (code, err) == (0, "")
    assert "source               100.000 % identical" in out and "256->144/12" in out and "FAILED" not in out


def test_command_fails_for_a_mutated_weight(capsys, tmp_path):
    config, tensors = load("source_recovery")
    key = "param/blocks.1.norm2.weight"
    path = save(tmp_path / "source_recovery_x.safetensors", config, tensors | {key: tensors[key] * np.float32(1.01)})
    code, out, _ = run(capsys, path, GOLDEN / "tome_step.safetensors")
    assert code == 1
    assert "FAILED" in out and "tome_step" in out


def _spoil(path: Path, kind: str) -> Path:
    config, tensors = load("tome_step")
    if kind == "corrupt":
        path.write_bytes(b"\0" * 40)
    elif kind == "no config":
        write_safetensors(path, tensors, {})
    elif kind == "bad config":
        write_safetensors(path, tensors, {"config": "{r: 5"})
    elif kind == "no input":
        save(path, config, {key: array for key, array in tensors.items() if key != "in/size"})
    elif kind == "no output":
        save(path, config, {key: array for key, array in tensors.items() if key.startswith("in/")})
    elif kind == "another output":
        save(path, config, tensors | {"out/entropy": tensors["out/x"]})
    elif kind == "another shape":
        save(path, config, tensors | {"out/x": tensors["out/x"][:, :3]})
    return path


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        ("tome_step.safetensors", "missing", "no such file"),
        ("tome_step.safetensors", "corrupt", "not a readable safetensors file"),
        ("unet.safetensors", "no output", "no module of that name; known are clip, clip_text, decoder, dino, dinov2"),
        ("tome_stepper.safetensors", "no output", "no module of that name"),
        ("tome_step.safetensors", "no config", "'config' is missing"),
        ("tome_step.safetensors", "bad config", "Expecting property name"),
        ("tome_step.safetensors", "no input", "'size' is missing"),
        ("tome_step.safetensors", "no output", "no out/... among its 3 tensors"),
        ("tome_step.safetensors", "another output", "'entropy' is missing"),
        ("tome_step.safetensors", "another shape", "shape (2, 12, 8), but the reference has (2, 3, 8)"),
    ],
)
def test_command_explains_what_it_cannot_check(file, kind, message, tmp_path, capsys):
    path = _spoil(tmp_path / file, kind)
    code, out, err = run(capsys, path)
    assert (code, out) == (1, "")
    assert str(path) in err and message in err


def test_command_lists_weights_that_do_not_fit(tmp_path, capsys):
    config, tensors = load("source_recovery")
    renamed = {key.replace("blocks.0.q.", "blocks.0.query."): array for key, array in tensors.items()}
    code, _, err = run(capsys, save(tmp_path / "source_recovery.safetensors", config, renamed))
    assert code == 1
    assert "blocks.0.query.weight (48, 48): no rule" in err and "blocks_0/q/kernel (48, 48): not among" in err


def test_an_output_that_is_not_a_number_fails(tmp_path, capsys):
    config, tensors = load("lfq")
    path = save(tmp_path / "lfq.safetensors", config, tensors | {"in/x": tensors["in/x"] * np.float32("nan")})
    code, out, _ = run(capsys, path)
    assert code == 1 and "nan relative error   FAILED" in out


def test_a_changed_export_is_an_error(monkeypatch):
    export = golden_tools.export_weights
    monkeypatch.setattr(
        golden_tools, "export_weights", lambda *args: export(*args) | {"conv_in.bias": np.zeros(64, np.float32)}
    )
    with pytest.raises(ValueError, match=r"conv_in.bias: the export of the imported weights is not bit-equal"):
        check_golden.check(GOLDEN / "decoder.safetensors")


def test_script_from_a_shell(tmp_path):
    files = [GOLDEN / "tome_step.safetensors", tmp_path / "decoder_none.safetensors"]
    script = [sys.executable, Path(check_golden.__file__), *files]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "tome_step                x" in done.stdout
    assert "decoder_none.safetensors: no such file" in done.stderr and "Traceback" not in done.stderr
