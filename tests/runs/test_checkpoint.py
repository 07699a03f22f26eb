"""Checkpoints: bit-equal on any mesh, half-written ones passed over, other models refused, one order of origins."""

import logging
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run

from runtime_jax import workdir
from runtime_jax.files.buckets import BucketError
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.sharding import param_shardings
from runtime_jax.training import checkpoint
from runtime_jax.training.checkpoint import Checkpointer, CheckpointError, DamagedCheckpointError
from runtime_jax.training.initial_state import initial_state
from runtime_jax.workdir import WorkdirError, output_folder

# A read that fails leaves futures in Orbax that nobody waits for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"width": 8, "sizes": [1, 2]}, "lr": 0.1}


def abstract_on(devices: int, width: int = 8):
    """Abstract state on a mesh (1, n/2, 2) or on one device."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=min(devices, 2)), jax.devices()[:devices])
    abstract = jax.eval_shape(lambda: toy_run.init(width))
    shardings = param_shardings(abstract, toy_run.RULES, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def placed(state, abstract):
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)


def assert_bit_equal(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


@pytest.fixture(scope="module")
def trained():
    """A state whose moments are not zero."""
    state, _ = toy_run.update(toy_run.init(), next(toy_run.batches(0)))
    return state


@pytest.fixture
def saved(tmp_path: Path, trained) -> Path:
    """A workdir with checkpoints of steps 10 and 20."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(10, trained.replace(step=jnp.int32(10)), CONFIG)
        checkpointer.save(20, trained.replace(step=jnp.int32(20)), CONFIG)
    return tmp_path


def start(workdir: Path, **changes):
    arguments = {"config": CONFIG, "init": toy_run.init, **changes}
    return initial_state(workdir, arguments.pop("abstract", abstract_on(1)), **arguments)


def test_restores_bit_equal_on_other_device_counts(tmp_path, trained):
    state = placed(trained, abstract_on(8))
    for step, devices in enumerate((1, 8, 4)):
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, state, CONFIG)
        abstract = abstract_on(devices)
        with Checkpointer(tmp_path, read_only=True) as checkpointer:
            state = checkpointer.restore(abstract, step)
        assert_bit_equal(state, trained)
        jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim) or pytest.fail(), state, abstract)


def test_bfloat16_nan_and_minus_zero_are_kept(tmp_path):
    state = {"a": jnp.array([1.5, jnp.nan, -0.0], jnp.bfloat16), "b": jnp.array([-0.0, jnp.inf])}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, {"means": {"loss": [float("nan"), 1.0]}})
        checkpointer.wait()
        got = checkpointer.restore(state, 1)
        assert np.isnan(checkpointer.loop(1)["means"]["loss"][0])
    for key in state:
        assert got[key].dtype == state[key].dtype
        assert np.asarray(got[key]).tobytes() == np.asarray(state[key]).tobytes()


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = bump({str(i): jnp.zeros((256, 256)) for i in range(8)})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        for _ in range(5):
            state = bump(state)
        checkpointer.wait()
        assert_bit_equal(checkpointer.restore(state, 1), {str(i): np.ones((256, 256)) for i in range(8)})


def test_keeps_the_newest(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in range(4):
            checkpointer.save(step, {"x": jnp.full(2, step)}, {"at": step}, {"mean": [float(step), 0.1]})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 3] and checkpointer.latest() == 3
        assert checkpointer.config(2) == {"at": 2} and checkpointer.loop(3) == {"mean": [3.0, 0.1]}


def test_half_written_checkpoint_is_passed_over(saved, trained, caplog):
    # What a kill in the middle of a save leaves: a temporary directory; and by hand, a final one that lacks files.
    shutil.copytree(saved / "checkpoints/20", saved / "checkpoints/30.orbax-checkpoint-tmp")
    (saved / "checkpoints/20/state/_METADATA").unlink()
    with caplog.at_level(logging.WARNING):
        state, step, origin = start(saved)
    assert (step, int(state.step)) == (10, 10) and origin == f"own checkpoint {saved / 'checkpoints/10'}"
    for name in ("20", "30.orbax-checkpoint-tmp"):
        assert f"passing over half-written checkpoint {saved / 'checkpoints' / name}" in caplog.text
    with Checkpointer(saved) as checkpointer:
        for again in (20, 30):
            checkpointer.save(again, trained, CONFIG)
        checkpointer.wait()
        assert checkpointer.steps() == [10, 20, 30]


def data_files(step: Path) -> list[Path]:
    return [path for path in step.glob("state/**/d/*") if path.is_file()]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_data_is_passed_over(saved, trained, caplog, damage):
    for path in data_files(saved / "checkpoints/20"):
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        state, step, _ = start(saved)
    assert (step, int(state.step)) == (10, 10)
    assert f"passing over damaged checkpoint {saved / 'checkpoints/20'}" in caplog.text
    with Checkpointer(saved) as checkpointer:
        checkpointer.save(20, trained, CONFIG)
    assert start(saved).step == 20


def test_no_truncated_file_goes_unnoticed(saved, trained):
    step = saved / "checkpoints/20"
    abstract, found = abstract_on(1), set()
    for path in [path for path in step.rglob("*") if path.is_file() and path.stat().st_size]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            with Checkpointer(saved, read_only=True) as checkpointer:
                state = checkpointer.restore(abstract, 20)
                assert checkpointer.config(20) == CONFIG and checkpointer.loop(20) == {}
            assert_bit_equal(state, trained.replace(step=jnp.int32(20)))
        except DamagedCheckpointError:
            found.add(path.relative_to(step).parts[0])
        path.write_bytes(whole)
    assert found == {"state", "config", "loop"}


def test_a_run_of_which_nothing_can_be_read_is_not_started_over(saved):
    for step in ("10", "20"):
        for path in data_files(saved / "checkpoints" / step):
            path.unlink()
    with pytest.raises(DamagedCheckpointError, match="none of 2 checkpoints can be read"):
        start(saved)
    assert (saved / "checkpoints/20").is_dir()


def test_other_architecture_lists_the_leaves(saved):
    abstract = abstract_on(1, width=6)
    del abstract.params["second"]["bias"]
    abstract.params["third"] = {"bias": abstract.params["first"]["bias"]}
    with pytest.raises(ValueError) as info:
        start(saved, abstract=abstract)
    lines = str(info.value).splitlines()
    assert lines[0] == f"{saved / 'checkpoints/20'} is a checkpoint of another architecture; 14 leaves differ:"
    assert "  params/first/kernel: float32[4, 8] in the checkpoint, float32[4, 6] in the model" in lines
    assert "  params/second/bias: float32[2] in the checkpoint is not in the model" in lines
    assert "  params/third/bias: float32[6] is missing in the checkpoint" in lines
    assert lines[-1] == "  and 4 more" and len(lines) == 12  # averages and moments of the same


def test_other_dtype_is_another_architecture(saved):
    abstract = abstract_on(1)
    bias = abstract.params["first"]["bias"]
    abstract.params["first"]["bias"] = jax.ShapeDtypeStruct(bias.shape, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"first/bias: float32\[8\] in the checkpoint, bfloat16\[8\] in the model"):
        start(saved, abstract=abstract)


def test_changed_config_is_told_and_model_keys_are_barred(saved, caplog):
    assert start(saved, config={"model": {"width": 8, "sizes": (1, 2)}, "lr": 0.1}).step == 20
    assert not caplog.messages, "a tuple and the list that JSON made of it are the same"
    with caplog.at_level(logging.WARNING):
        start(saved, config={**CONFIG, "lr": 0.2, "new": 1, "newer": None}, must_match=("model",))
    assert "lr: 0.1 -> 0.2\n  new: 'absent' -> 1" in caplog.text
    with pytest.raises(ValueError, match=r"keys that must not change:\n  model.width: 8 -> 9"):
        start(saved, config={**CONFIG, "model": {"width": 9, "sizes": [1, 2]}}, must_match=("model",))


def test_exceptions_from_what_must_match(tmp_path, caplog):
    def config(**changes):
        sources = [{"name": "a", "data_dir": "old"}, {"name": "b", "data_dir": "old"}]
        return {"data": {"seed": 1, "num_workers": 0, "sources": sources, **changes}}

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, toy_run.init(), config())
    rules = {"must_match": ("data",), "may_differ": ("data.num_workers", "data.sources.*.data_dir")}
    moved = [{"name": "a", "data_dir": "new"}, {"name": "b", "data_dir": "old"}]
    with caplog.at_level(logging.WARNING):
        assert start(tmp_path, config=config(num_workers=4, sources=moved), **rules).step == 5
    assert "data.num_workers: 0 -> 4\n  data.sources.0.data_dir: 'old' -> 'new'" in caplog.text
    for changes, line in (
        ({"seed": 2}, "data.seed: 1 -> 2"),
        ({"sources": [moved[0], {"name": "c", "data_dir": "old"}]}, "data.sources.1.name: 'b' -> 'c'"),
        ({"sources": moved[:1]}, "data.sources.1.name: 'b' -> 'absent'"),
    ):
        with pytest.raises(ValueError) as info:
            start(tmp_path, config=config(num_workers=4, **changes), **rules)
        assert str(info.value).splitlines()[1:] == [f"  {line}"]


def test_order_of_origins(saved, tmp_path_factory):
    def weights(state):
        return state.replace(params=jax.tree.map(jnp.ones_like, state.params))

    def no_init():
        pytest.fail("a state was made that is not needed")

    new = tmp_path_factory.mktemp("new")
    assert start(new)[1:] == (0, "scratch")
    state, step, origin = start(new, init_from=weights)
    assert (step, origin) == (0, "init_from weights") and float(state.params["first"]["bias"][0]) == 1.0
    for folder, want in (("", 20), ("checkpoints", 20), ("checkpoints/10", 10)):
        got = start(new, resume_from=saved / folder, init_from=weights, init=no_init)
        assert got[1:] == (want, f"resumed from {saved / 'checkpoints' / str(want)}") and int(got.state.step) == want
    got = start(saved, resume_from="/nowhere", init_from=weights, init=no_init)
    assert got[1:] == (20, f"own checkpoint {saved / 'checkpoints/20'}")


def test_resume_from_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/checkpoints: no such directory"):
        start(tmp_path, resume_from=tmp_path / "nowhere")
    with Checkpointer(tmp_path / "empty"):
        pass
    with pytest.raises(FileNotFoundError, match="no complete checkpoint there"):
        start(tmp_path, resume_from=tmp_path / "empty")


def test_resuming_changes_nothing_in_the_other_run(saved, tmp_path_factory, caplog):
    shutil.copytree(saved / "checkpoints/20", saved / "checkpoints/30.orbax-checkpoint-tmp")
    before = sorted(str(path) for path in saved.rglob("*"))
    assert start(tmp_path_factory.mktemp("new"), resume_from=saved).step == 20
    assert sorted(str(path) for path in saved.rglob("*")) == before
    assert "30.orbax-checkpoint-tmp" in caplog.text


def test_workdir_that_is_a_url(tmp_path):
    with pytest.raises(BucketError, match="ftp://host/run: ftp:// is not supported"):
        start("ftp://host/run")
    with pytest.raises(CheckpointError, match="s3://bucket/run/checkpoints: checkpoints can be on a disk or"):
        start(tmp_path, resume_from="s3://bucket/run")


def full_disk(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")(2**30, 2**30 - free, free)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage)


def test_full_disk_is_told_before_and_while_saving(tmp_path, monkeypatch, trained):
    full_disk(monkeypatch, 2**20)
    with pytest.raises(WorkdirError, match=rf"{tmp_path}: disk full: a run needs 2.0 MiB, 1.0 MiB are free"):
        output_folder(tmp_path, 2**21)
    with Checkpointer(tmp_path) as checkpointer:
        full_disk(monkeypatch, 10)
        with pytest.raises(WorkdirError, match=r"checkpoints: disk full: checkpoint 5 needs 0.0 MiB"):
            checkpointer.save(5, trained, CONFIG)


def test_error_of_the_writing_thread_comes_with_the_path(tmp_path, monkeypatch, trained):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.JsonCheckpointHandler, "async_save", broken)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(WorkdirError, match=rf"{tmp_path}/checkpoints.*: disk full while a checkpoint was written"):
        checkpointer.save(5, trained, CONFIG)
        checkpointer.wait()


def test_config_that_json_does_not_know(tmp_path, trained):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"could not be written: .*TypeError"):
        checkpointer.save(5, trained, {"x": object()})
        checkpointer.wait()
