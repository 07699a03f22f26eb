"""The weight-conversion table: templates, stacked targets, complete error lists, files."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_jax.weights import (
    CONV,
    LINEAR,
    Rule,
    WeightError,
    export_weights,
    import_weights,
    joined,
    prefixed,
    read_safetensors,
    table,
    write_safetensors,
)

TABLE = (
    Rule("stem.weight", "stem/kernel", CONV),
    Rule("layers.{i}.{part}.weight", "layers[i]/{part}/kernel", LINEAR),
    Rule("layers.{i}.{part}.bias", "layers[i]/{part}/bias"),
    Rule("heads.{i}.fc.{j}.weight", "head_{i}/fc_{j}/kernel", LINEAR),
    Rule("scale", "scale"),
)
SHAPES = {
    "stem": {"kernel": (3, 2, 4, 5)},
    "layers": {"one": {"kernel": (3, 4, 6), "bias": (3, 6)}, "two": {"kernel": (3, 6, 4), "bias": (3, 4)}},
    "head_0": {"fc_0": {"kernel": (4, 2)}, "fc_1": {"kernel": (2, 2)}},
    "head_1": {"fc_0": {"kernel": (4, 3)}},
    "scale": (),
}
TREE = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple)
)


def state_dict():
    rng = np.random.default_rng(0)
    sizes = {"stem.weight": (5, 4, 3, 2), "scale": ()}
    for i in range(3):
        sizes |= {f"layers.{i}.one.weight": (6, 4), f"layers.{i}.one.bias": (6,)}
        sizes |= {f"layers.{i}.two.weight": (4, 6), f"layers.{i}.two.bias": (4,)}
    sizes |= {"heads.0.fc.0.weight": (2, 4), "heads.0.fc.1.weight": (2, 2), "heads.1.fc.0.weight": (3, 4)}
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in sizes.items()}


def test_import_places_and_transforms():
    source = state_dict()
    params = import_weights(TABLE, source, TREE)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == SHAPES
    np.testing.assert_array_equal(params["stem"]["kernel"], source["stem.weight"].transpose(2, 3, 1, 0))
    for i in range(3):
        np.testing.assert_array_equal(params["layers"]["two"]["kernel"][i], source[f"layers.{i}.two.weight"].T)
        np.testing.assert_array_equal(params["layers"]["one"]["bias"][i], source[f"layers.{i}.one.bias"])
    np.testing.assert_array_equal(params["head_1"]["fc_0"]["kernel"], source["heads.1.fc.0.weight"].T)


def test_the_order_of_names_does_not_matter():
    source = state_dict()
    turned = dict(reversed(source.items()))
    jax.tree.map(
        np.testing.assert_array_equal, import_weights(TABLE, source, TREE), import_weights(TABLE, turned, TREE)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.int32])
def test_round_trip_is_bit_equal(dtype):
    source = {name: (100 * array).astype(dtype) for name, array in state_dict().items()}
    exported = export_weights(TABLE, import_weights(TABLE, source, TREE))
    assert exported.keys() == source.keys()
    for name, array in exported.items():
        assert array.dtype == dtype and array.shape == source[name].shape and array.flags.c_contiguous
        assert array.tobytes() == source[name].tobytes()


def test_device_arrays_are_exported():
    source = state_dict()
    params = jax.tree.map(jnp.asarray, import_weights(TABLE, source, TREE))
    for name, array in export_weights(TABLE, params).items():
        np.testing.assert_array_equal(array, source[name], strict=True)


def test_more_than_ten_stacked_layers_keep_their_order():
    rule = Rule("blocks.{i}.bias", "blocks[i]/bias")
    source = {f"blocks.{i}.bias": np.full(2, i, np.float32) for i in sorted(range(12), key=str)}
    shapes = {"blocks": {"bias": jax.ShapeDtypeStruct((12, 2), jnp.float32)}}
    params = import_weights([rule], source, shapes)
    np.testing.assert_array_equal(params["blocks"]["bias"][:, 0], np.arange(12))
    assert export_weights([rule], params).keys() == source.keys()


def test_prefixes():
    table = prefixed(TABLE, "model.", "net/")
    source = {f"model.{name}": array for name, array in state_dict().items()}
    params = import_weights(table, source, {"net": TREE})
    assert params["net"]["layers"]["one"]["bias"].shape == (3, 6)
    assert export_weights(table, params).keys() == source.keys()


# Several source tensors in one parameter.

FUSED = (
    *joined(("b.{i}.q.w", "b.{i}.k.w", "b.{i}.up.w"), "b[i]/linear1/kernel", LINEAR, shares=(1, 1, 4)),
    *joined(("b.{i}.q.b", "b.{i}.k.b", "b.{i}.up.b"), "b[i]/linear1/bias", shares=(1, 1, 4)),
    *joined(("q", "k"), "qk"),
)
FUSED_SHAPES = {
    "b": {
        "linear1": {
            "kernel": jax.ShapeDtypeStruct((2, 5, 18), "float32"),
            "bias": jax.ShapeDtypeStruct((2, 18), "float32"),
        }
    },
    "qk": jax.ShapeDtypeStruct((4,), "float32"),
}


def fused_state_dict(dtype=np.float32):
    rng = np.random.default_rng(0)
    sizes = {"q": (2,), "k": (2,)}
    for i in range(2):
        sizes |= {f"b.{i}.{part}.w": (n, 5) for part, n in (("q", 3), ("k", 3), ("up", 12))}
        sizes |= {f"b.{i}.{part}.b": (n,) for part, n in (("q", 3), ("k", 3), ("up", 12))}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in sizes.items()}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("prefix", [("", ""), ("model.", "net/")])
def test_parts_lie_side_by_side_and_come_back_bit_equal(dtype, prefix):
    source = {prefix[0] + name: array for name, array in fused_state_dict(dtype).items()}
    table = prefixed(FUSED, *prefix)
    params = import_weights(table, dict(reversed(source.items())), {"net": FUSED_SHAPES} if prefix[0] else FUSED_SHAPES)
    exported = export_weights(table, params)
    assert exported.keys() == source.keys()
    for name, array in exported.items():
        assert array.dtype == dtype and array.flags.c_contiguous and array.tobytes() == source[name].tobytes()
    params = params["net"] if prefix[0] else params
    for i in range(2):
        whole = np.concatenate([source[f"{prefix[0]}b.{i}.{part}.w"] for part in ("q", "k", "up")])
        np.testing.assert_array_equal(params["b"]["linear1"]["kernel"][i], whole.T)
    np.testing.assert_array_equal(params["qk"], [*source[f"{prefix[0]}q"], *source[f"{prefix[0]}k"]])


def test_all_errors_of_parts_are_listed():
    source = fused_state_dict()
    del source["b.1.k.w"], source["k"]
    source["b.0.up.b"] = source["b.0.up.b"][:7]
    source["b.1.q.b"] = source["b.1.q.b"].astype(np.float16)
    table = (*FUSED, Rule("other", "qk"))
    assert import_errors(source | {"other": np.zeros(4, np.float32)}, table, FUSED_SHAPES) == [
        "b.0.up.b: shape (7,) after conversion, but b/linear1/bias has (12,)",
        "b.1.q.b: float16, but the rest of b/linear1/bias is float32",
        "other: qk is filled twice",
        "b/linear1/kernel: its part b.1.k.w is not among the weights",
    ]
    assert "qk: its part k is not among the weights" in import_errors(source, FUSED, FUSED_SHAPES)
    odd = {"qk": jax.ShapeDtypeStruct((3,), "float32")}
    source = {"q": np.zeros(1, np.float32), "k": np.zeros(2, np.float32)}
    (line, _) = import_errors(source, joined(("q", "k"), "qk"), odd)
    assert line == "q (1,): cannot become qk (3,) (3 cannot be cut in the ratio 1:1)"


@pytest.mark.parametrize("table", [FUSED[:-1], (*FUSED, FUSED[-1]), (*FUSED, Rule("other", "qk"))])
def test_a_parameter_is_exported_by_all_of_its_parts_or_not_at_all(table):
    params = {"qk": np.zeros(4)}
    with pytest.raises(WeightError, match="qk: several rules for this parameter"):
        export_weights(table, params)


# Templates.


@pytest.mark.parametrize(
    ("rule", "name", "target"),
    [
        (Rule("a.{i}.w", "a_{i}/w"), "a.12.w", ("a_12/w", None)),
        (Rule("a.{i}.w", "a[i]/w"), "a.12.w", ("a/w", 12)),
        (Rule("a.{i}.b.{j}.w", "a[j]/b_{i}/w"), "a.1.b.2.w", ("a/b_1/w", 2)),
        (Rule("{part}.w", "x/{part}/w"), "q_proj.w", ("x/q_proj/w", None)),
        (Rule("a.{i}.w", "a_{i}/w"), "a.x.w", None),  # one letter is a number
        (Rule("a.{i}.w", "a_{i}/w"), "b.a.1.w", None),  # the whole name
        (Rule("a.{i}.w", "a_{i}/w"), "a.1.w.2", None),
        (Rule("{part}.w", "x/{part}/w"), "a.b.w", None),  # one component
        (Rule("a.w", "a/w"), "axw", None),  # a dot is a dot
        (Rule("{part}.{part}.w", "{part}/w"), "a.a.w", ("a/w", None)),  # one name, one text
        (Rule("{part}.{part}.w", "{part}/w"), "a.b.w", None),
    ],
)
def test_templates(rule, name, target):
    assert rule.to_target(name) == target
    if target is not None:
        assert rule.to_source(*target) == name
        assert rule.is_stacked(target[0]) == (target[1] is not None)


def test_a_stacked_rule_and_a_plain_one_do_not_mix():
    stacked, plain = Rule("a.{i}.w", "a[i]/w"), Rule("a.w", "a/w")
    assert stacked.to_source("a/w", None) is None and plain.to_source("a/w", 3) is None
    assert stacked.to_source("b/w", 3) is None


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.text("abcxyz_0189", min_size=2, max_size=8))
def test_templates_invert(number, part):
    for rule in (Rule("m.{i}.{part}.w", "m[i]/{part}/w"), Rule("m.{i}.{part}.w", "m_{i}/{part}/w")):
        name = f"m.{number}.{part}.w"
        assert rule.to_source(*rule.to_target(name)) == name


# Errors: everything that is wrong, in one message.


def import_errors(source, table=TABLE, shapes=TREE, **options) -> list[str]:
    with pytest.raises(WeightError) as error:
        import_weights(table, source, shapes, **options)
    first, *lines = str(error.value).splitlines()
    assert first == "the weights do not fit the model:"
    return [line.strip() for line in lines]


def test_all_errors_of_an_import_are_listed():
    source = state_dict()
    source["stem.weight"] = source["stem.weight"][:, :3]
    source["layers.0.one.weight"] = source["layers.0.one.weight"].T
    source["unknown.weight"] = np.zeros((2, 2), np.float32)
    source["heads.2.fc.0.weight"] = np.zeros((3, 4), np.float32)
    source["layers.3.one.bias"] = np.zeros(6, np.float32)
    del source["scale"], source["layers.1.two.bias"], source["heads.0.fc.1.weight"]
    assert sorted(import_errors(source)) == sorted(
        [
            "stem.weight: shape (3, 2, 3, 5) after conversion, but stem/kernel has (3, 2, 4, 5)",
            "layers.0.one.weight: shape (6, 4) after conversion, but layers/one/kernel has (4, 6)",
            "unknown.weight (2, 2): no rule for this name",
            "heads.2.fc.0.weight (3, 4): the model has no parameter head_2/fc_0/kernel",
            "layers/one/bias: positions [0, 1, 2, 3] are there, but 0 to 2 are needed",
            "scale (): not among the weights",
            "layers/two/bias: positions [0, 2] are there, but 0 to 2 are needed",
            "head_0/fc_1/kernel (2, 2): not among the weights",
        ]
    )


def test_a_name_of_two_rules_and_a_leaf_that_is_filled_twice():
    double = (*TABLE, Rule("sca{rest}", "scale"))
    assert "scale (): several rules for this name" in import_errors(state_dict(), double)
    twice = (*TABLE, Rule("again", "scale"), Rule("biases", "layers/one/bias"))
    source = state_dict() | {"again": np.zeros((), np.float32), "biases": np.zeros((3, 6), np.float32)}
    for order in (source, dict(reversed(source.items()))):  # one layer at a time and all at once, either first
        lines = import_errors(order, twice)
        assert len([line for line in lines if line.endswith("scale is filled twice")]) == 1
        assert [line for line in lines if line.endswith("layers/one/bias is filled twice")]


def test_a_transform_that_does_not_take_the_array():
    source = state_dict()
    source["stem.weight"] = source["stem.weight"][0]
    (line,) = import_errors(source)
    assert line == "stem.weight (4, 3, 2): cannot become stem/kernel (3, 2, 4, 5) (axes don't match array)"


def test_ignored_names_are_full_regular_expressions():
    source = state_dict() | {"position_ids": np.zeros(3), "position_ids_2": np.zeros(3)}
    assert import_errors(source, ignore=["position_ids"]) == ["position_ids_2 (3,): no rule for this name"]
    assert "scale" in import_weights(TABLE, source, TREE, ignore=[r"position_ids.*"])


def test_all_errors_of_an_export_are_listed():
    params = {"stem": {"kernel": np.zeros((1, 1, 1, 1)), "bias": np.zeros(1)}, "scale": np.zeros(()), "x": np.zeros(2)}
    with pytest.raises(WeightError) as error:
        export_weights((*TABLE, Rule("scale2", "scale")), params)
    assert str(error.value).splitlines() == [
        "the parameters cannot be exported:",
        "  stem/bias: no rule for this parameter",
        "  scale: several rules for this parameter",
        "  x: no rule for this parameter",
    ]


# Files.


def test_files_round_trip(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "scalar": np.float32(3),
        "half": np.ones(3, jnp.bfloat16),
        "count": np.arange(3),
        "empty": np.zeros((0, 2), np.float32),
    }
    path = tmp_path / "new" / "folder" / "w.safetensors"
    write_safetensors(path, tensors, {"format": "pt"})
    again, metadata = read_safetensors(str(path))
    assert metadata == {"format": "pt"} and again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, strict=name != "scalar")
    assert again["scalar"].shape == ()
    assert [entry.name for entry in path.parent.iterdir()] == ["w.safetensors"]


def test_equal_contents_give_equal_bytes(tmp_path):
    path, metadata = tmp_path / "w.safetensors", {f"key {i}": f'ä "{i}"\n\x1f' for i in range(9)}
    tensors = {"b": np.arange(3), "a": np.ones((2, 2), np.float32)}
    written = set()
    for _ in range(5):  # a random order would be the same five times once in 9!^4
        write_safetensors(path, tensors, metadata)
        written.add(path.read_bytes())
        again, found = read_safetensors(path)
        assert found == metadata
        np.testing.assert_array_equal(again["b"], tensors["b"], strict=True)
    assert len(written) == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(WeightError, match=r"none\.safetensors: no such file"):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(WeightError, match="no such file"):
        read_safetensors(tmp_path)
    for content in (b"", b"not a header", b"\xff" * 100):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(WeightError, match=r"bad\.safetensors: not a readable safetensors file"):
            read_safetensors(tmp_path / "bad.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": np.zeros(3, np.float32)}, {})
    before = path.read_bytes()

    def full_disk(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, {"a": np.ones(3, np.float32)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]
