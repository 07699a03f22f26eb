"""A teacher's training: steps without labels, a resumed run, and a folder that the tokenizer's training reads."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from run_tools import assert_close, logged

from mergevq_jax import cli
from mergevq_jax.teacher import losses, run
from mergevq_jax.teacher import train as distillation
from mergevq_jax.teacher.run import TrainConfig
from mergevq_jax.tokenizer.run import TrainConfig as TokenizerTrainConfig
from mergevq_jax.tokenizer.run import load_frozen
from runtime_jax import sharding
from runtime_jax.config import build, load
from runtime_jax.data.folder import FolderSource
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config, load_dinov2, read_dinov2_config, standardize
from runtime_jax.sharding import shard_batch
from runtime_jax.training.checkpoint import Checkpointer
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer
from runtime_jax.weights import read_safetensors

MODEL = DINOv2Config(width=16, num_layers=2, num_heads=2, patch_size=4, image_size=16)
STEPS = 4
SGD = Optimizer(optax.sgd(1.0), optax.constant_schedule(1.0))  # a parameter changes by its gradient


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(12):
        path = root / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.kron(rng.integers(0, 255, (5, 6, 3)), np.ones((4, 4, 1))).astype(np.uint8)).save(path)
    return root


def config_of(pictures, **changes) -> TrainConfig:
    views = [{"name": "whole", "image_size": 16, "resized_crop": {}}, {"name": "part", "image_size": 8, "flip": True}]
    fields = {
        "task": "teacher",
        "model": vars(MODEL),
        "head": {"hidden": 16, "bottleneck": 8, "prototypes": 12},
        "optimizer": {"learning_rate": 1e-3},
        "data": {
            "image_size": 16,
            "batch_size": 8,
            "sources": [{"kind": "folder", "path": str(pictures)}],
            "resized_crop": {},
            "views": views,
        },
        "loop": {"duration": {"steps": STEPS}, "log_every": 1, "checkpoint_every": 2, "min_free_bytes": 0},
    }
    return build(TrainConfig, fields | changes)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    return workdir, run.train(config_of(pictures), workdir)


def test_the_folder_is_the_averaged_backbone(trained):
    workdir, result = trained
    config, params = load_dinov2(workdir / "teacher")
    assert config == MODEL == read_dinov2_config(workdir / "teacher")
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(result.state.ema["backbone"]))
    fields = json.loads((workdir / "teacher" / "config.json").read_text())
    assert fields["architectures"] == ["Dinov2Model"] and fields["hidden_size"] == 16
    assert "embeddings.mask_token" in read_safetensors(workdir / "teacher" / "model.safetensors")[0]


def test_it_learns_and_does_not_collapse(trained):
    workdir, result = trained
    lines = logged(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["teacher/entropy_of_mean"] > line["teacher/entropy"] + 0.05 for line in lines)
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3), minval=-1.0, maxval=1.0)
    params = result.state.ema["backbone"]
    features = DINOv2(MODEL).apply({"params": params}, standardize(images)).pooled
    assert float(jnp.std(features, axis=0).mean()) > 0.05
    fresh = result.state.params["backbone"]["norm"]["scale"]
    assert float(jnp.abs(fresh - 1.0).max()) > 1e-4  # it started at 1


@pytest.fixture(scope="module")
def step():
    """A step's parts, in which the teacher differs from the student and colours stay."""
    colour = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grey": 0.0}
    config = config_of("pictures", colour=colour).step_config()
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 256, (8, 16, 16, 3), np.uint8) for name in ("image", "whole")}
    batch |= {"part": rng.integers(0, 256, (8, 8, 8, 3), np.uint8), "example": np.arange(8)}
    state = jax.jit(functools.partial(distillation.init_state, config, SGD))()
    other = jax.jit(functools.partial(distillation.init_state, dataclasses.replace(config, seed=1), SGD))()
    return config, jax.device_get(state.replace(ema=other.params)), batch


def loss_of(params, config, state, batch):
    """The loss, from its definition."""

    def cosines(params, name):
        images = jnp.asarray(batch[name]).astype(jnp.float32) / 127.5 - 1.0
        return config.network.apply({"params": params}, images)

    names = ("image", "whole", "part")
    teacher = jax.tree.map(jnp.asarray, state.ema)
    goals = losses.targets(jnp.stack([cosines(teacher, name) for name in names[:2]]), 0.05)
    student = [jax.nn.log_softmax(cosines(params, name) / 0.1) for name in names]
    others = [(goals[goal], student[view]) for goal in range(2) for view in range(3) if goal != view]
    return sum(-jnp.mean(jnp.sum(goal * view, axis=-1)) for goal, view in others) / len(others)


@pytest.fixture(scope="module")
def reference(step):
    config, state, batch = step
    loss = functools.partial(loss_of, config=config, state=state, batch=batch)
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(state.params))


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_a_step_descends_the_students_loss_on_any_mesh(shape, step, reference, monkeypatch):
    monkeypatch.setattr(sharding, "LARGE", 100)
    config, state, batch = step
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]), jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        program = run.make_program(config, SGD, mesh)
        placed = jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), state, program.abstract_state)
        new, metrics = jax.device_get(program.step(placed, shard_batch(batch, mesh), None))
    loss, gradients = reference
    total, count = metrics["loss"]
    assert float(total) / float(count) == pytest.approx(float(loss), rel=1e-5)
    assert_close(jax.tree.map(lambda old, new: old - new, state.params, new.params), gradients, 2e-4)
    decay = 0.1  # of the first update
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, new.params)
    assert_close(new.ema, expected, 1e-5)


def test_a_resumed_run_is_bit_equal(pictures, trained, tmp_path):
    """Its last checkpoint is lost: it goes on from the one before."""
    workdir, _ = trained
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    shutil.rmtree(again / "teacher")
    with Checkpointer(again, read_only=True) as checkpointer:
        assert checkpointer.latest() == 2
    run.train(config_of(pictures), again)
    assert logged(again) == logged(workdir)
    ours, theirs = (read_safetensors(path / "teacher" / "model.safetensors")[0] for path in (again, workdir))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_labels_reach_no_step(pictures, trained, tmp_path, monkeypatch):
    """Neither as an array of a batch nor in any other way: other labels change nothing."""
    seen, step, read = [], Program.step, FolderSource.__getitem__

    def watched(self, state, batch, variant):
        seen.append(set(batch))
        return step(self, state, batch, variant)

    monkeypatch.setattr(Program, "step", watched)
    monkeypatch.setattr(FolderSource, "__getitem__", lambda self, index: read(self, index) | {"label": 7})
    run.train(config_of(pictures), tmp_path / "run")
    assert seen == STEPS * [{"image", "whole", "part", "example"}]
    assert logged(tmp_path / "run") == logged(trained[0])


def test_the_tokenizers_training_takes_the_folder(trained, pictures):
    workdir, _ = trained
    overrides = [f"teacher={workdir / 'teacher'}", "losses.alignment_weight=1.0", "model.dist_head=layer3"]
    overrides += ["losses.alignment_size=64"]
    narrow = build(
        TokenizerTrainConfig, load("configs/mergevq_tiny.py", [*overrides, "model.num_classes=16"], new_keys=True)
    )
    step_config, frozen = load_frozen(narrow)
    assert step_config.teacher == MODEL and frozen.teacher is not None
    wide = build(TokenizerTrainConfig, load("configs/mergevq_tiny.py", overrides, new_keys=True))
    with pytest.raises(ValueError, match=r"model.num_classes=768 must be the teacher's width, 16"):
        load_frozen(wide)
    with pytest.raises(ValueError, match=r"alignment_size=64 must be a multiple of the teacher's patches of 5 pixels"):
        dataclasses.replace(step_config, teacher=dataclasses.replace(MODEL, patch_size=5))


def test_the_command_says_where_the_teacher_is(monkeypatch, capsys):
    from runtime_jax.training.loop import Result

    monkeypatch.setattr(run, "train", lambda config, workdir: Result(None, 3, None))
    assert cli.main(["train", "--config", "mergevq_teacher:demo", "--workdir", "x"]) == 0
    assert capsys.readouterr().out.endswith("x/teacher\n")


def test_inspect_needs_no_data(capsys):
    assert cli.main(["inspect", "--config", "mergevq_teacher"]) == 0
    out = capsys.readouterr().out
    assert "64 px, patches of 8, 6 views" in out and "| backbone |" in out and "| train step |" in out
