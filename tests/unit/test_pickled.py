"""PyTorch's files without PyTorch: what it wrote, what it wrote long ago, and what must not be run."""

import pickle
import tarfile
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from runtime_jax.weights import WeightError, write_safetensors
from runtime_jax.weights.hub import read_tensors
from runtime_jax.weights.pickled import LEGACY_MAGIC, read_pickled

# Opcodes by name, to write pickles that no Python object would give.
PROTO, STOP, MARK, TUPLE, REDUCE, NEWOBJ, BUILD, PERSID = b"\x80\x02", b".", b"(", b"t", b"R", b"\x81", b"b", b"Q"


def call(name: str) -> bytes:
    """The opcode that names a function or class."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def value(thing) -> bytes:
    """Opcodes of a plain value."""
    return pickle.dumps(thing, protocol=2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")


def tensor(
    key="0", count=6, offset=0, shape=(2, 3), strides=(3, 1), rebuild="torch._utils._rebuild_tensor_v2"
) -> bytes:
    """Opcodes of a float tensor."""
    storage = MARK + value("storage") + call("torch.FloatStorage") + value("0") + value("cpu") + value(count) + TUPLE
    arguments = storage + PERSID + value(offset) + value(shape) + value(strides)
    return call(rebuild) + MARK + arguments + TUPLE + REDUCE


def state_dict(*tensors: bytes) -> bytes:
    pairs = b"".join(value(f"t{number}") + opcodes for number, opcodes in enumerate(tensors))
    return PROTO + b"}" + MARK + pairs + b"u" + STOP


def write_zip(path, pickled: bytes, **contents: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in contents.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", content)
    return path


PICKLED = Path(__file__).parents[1] / "pickled"
VALUES = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_what_pytorch_wrote(name):
    """Both formats, with a parameter, all kinds of strides, a scalar and an empty tensor (tests/make_pickled.py)."""
    got = read_pickled(PICKLED / f"{name}.pth")
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert [(k, v.dtype, v.shape) for k, v in got.items() if k in ("weight", "half", "bf16", "steps")] == [
        ("weight", np.float32, (2, 3)),
        ("half", np.float16, (3,)),
        ("bf16", jnp.bfloat16, (4,)),
        ("steps", np.int64, ()),
    ]
    np.testing.assert_array_equal(got["transposed"], base.T)
    np.testing.assert_array_equal(got["part"], base[1:3, 2:5])
    assert got["flags"].tolist() == [True, False] and got["steps"] == 7 and got["empty"].shape == (0, 3)
    np.testing.assert_allclose(got["weight"][0], [1.541, -0.2934, -2.1788], atol=1e-4)
    np.testing.assert_allclose(got["half"], [0.4033, 0.8379, -0.7192], atol=1e-4)
    np.testing.assert_allclose(got["bf16"].astype(np.float32), [-0.4043, -0.5977, 0.1816, -0.8555], atol=1e-4)


def test_parameters_as_the_first_versions_wrote_them(tmp_path):
    """A class called with a tensor, then a state: whether it needs a gradient."""
    old = call("torch.nn.parameter.Parameter") + tensor(rebuild="torch._utils._rebuild_tensor") + b"\x85" + NEWOBJ
    old += value((True, False)) + BUILD
    got = read_pickled(write_zip(tmp_path / "old.pth", state_dict(old), _0=VALUES.tobytes()))
    np.testing.assert_array_equal(got["t0"], VALUES.reshape(2, 3))


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.nn.modules.linear.Linear", "numpy.dtype"])
def test_nothing_else_is_called(tmp_path, name):
    pickled = PROTO + call(name) + value((f"touch {tmp_path / 'called'}",)) + REDUCE + STOP
    paths = [write_zip(tmp_path / "bad.pth", pickled), tmp_path / "bad.pt"]
    paths[1].write_bytes(pickled)
    for path in paths:
        with pytest.raises(WeightError, match=f"bad.pth?: holds more than tensors: {name}; save"):
            read_pickled(path)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "outside",
    [{"offset": 1}, {"shape": (3, 3)}, {"offset": -1}, {"strides": (-3, 1)}, {"shape": (-1, -1)}, {"strides": (3, 2)}],
)
def test_a_tensor_outside_of_its_storage(tmp_path, outside):
    path = write_zip(tmp_path / "bad.pth", state_dict(tensor(**outside)), _0=VALUES.tobytes())
    with pytest.raises(WeightError, match=r"bad\.pth: a tensor of shape .* lies outside of its storage"):
        read_pickled(path)


def test_what_is_built_cannot_be_changed_by_the_pickle(tmp_path):
    """A pickle may set the state of any object it has: of tensors it is ignored."""
    changed = tensor() + value({"array": 3}) + BUILD
    got = read_pickled(write_zip(tmp_path / "a.pth", state_dict(changed), _0=VALUES.tobytes()))
    np.testing.assert_array_equal(got["t0"], VALUES.reshape(2, 3))


def test_damaged_files(tmp_path):
    whole = (PICKLED / "legacy.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-30])
    with pytest.raises(WeightError, match=r"cut\.pth: its storage \d+ has 0 of \d+ bytes: the file is cut short"):
        read_pickled(tmp_path / "cut.pth")
    short = write_zip(tmp_path / "short.pth", state_dict(tensor()), _0=VALUES.tobytes()[:-4])
    with pytest.raises(WeightError, match=r"short\.pth: its storage 0 has 20 of 24 bytes"):
        read_pickled(short)
    large = write_zip(tmp_path / "large.pth", state_dict(tensor(count=2**50)), _0=VALUES.tobytes())
    with pytest.raises(WeightError, match="would be larger than the file"):
        read_pickled(large)
    for content in (b"", b"no pickle", whole[:60], (PICKLED / "zip.pth").read_bytes()[:-30]):
        (tmp_path / "other.pth").write_bytes(content)
        with pytest.raises(WeightError, match=r"other\.pth: not a readable PyTorch file"):
            read_pickled(tmp_path / "other.pth")
    (tmp_path / "other.pth").write_bytes(pickle.dumps(LEGACY_MAGIC + 1, protocol=2))
    with pytest.raises(WeightError, match="a pickle, but not PyTorch's"):
        read_pickled(tmp_path / "other.pth")


def test_more_than_tensors(tmp_path):
    content = state_dict(tensor(), value(3), value({"lr": 1}))
    with pytest.raises(WeightError, match=r"holds more than tensors by name: t1, t2; .*save_file.*more\.safetensors"):
        read_pickled(write_zip(tmp_path / "more.pth", content, _0=VALUES.tobytes()))
    with pytest.raises(WeightError, match="holds no state dict, but a list"):
        read_pickled(write_zip(tmp_path / "list.pth", PROTO + value([1]) + STOP))
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(WeightError, match="a zip archive, but not PyTorch's"):
        read_pickled(tmp_path / "other.pth")
    with tarfile.open(tmp_path / "first.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(WeightError, match="in PyTorch's first format, a tar archive"):
        read_pickled(tmp_path / "first.pth")


def test_a_folder(tmp_path):
    """Of one with both kinds, safetensors are read: the other file holds the same weights."""
    write_zip(tmp_path / "model.bin", state_dict(tensor()), _0=VALUES.tobytes())
    np.testing.assert_array_equal(read_tensors(tmp_path)["t0"], VALUES.reshape(2, 3))
    write_safetensors(tmp_path / "model.safetensors", {"s": VALUES}, {})
    assert list(read_tensors(tmp_path)) == ["s"]
