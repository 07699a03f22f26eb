"""What `launch.compile_ahead` reads off a program, on devices that are there; and what it refuses."""

import jax
import pytest

from launch.compile_ahead import abstract_program, compile_step, count_collectives, main, render
from mergevq_jax.cli import training

FIELDS = ("mergear_tiny:merge", ["mesh.fsdp=4", "data.batch_size=8"])


def test_a_step_is_compiled_from_shapes_alone():
    trained = training(*FIELDS)
    report = compile_step(*trained, "v5e", jax.devices(), keep=144, codes=True)
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and report["variant"] == 144 and report["fits"]
    assert 1e6 < report["parameters"] < 1.1e6 and report["flops"]["jaxpr"] > 1e10
    assert report["collectives"]["all-reduce"]["count"] > 0 and report["collectives"]["all-gather"]["bytes"] > 1e5
    text = render({**report, "config": "tiny", "topology": "v5e:2x4"})
    assert "| tiny, K = 144 | fits |" in text and "of 16 |" in text


def test_from_images_the_tokenizer_is_frozen_and_whole():
    program, batch, keep = abstract_program(*training(*FIELDS), jax.devices(), keep=None, codes=False)
    assert batch["image"].shape == (8, 64, 64, 3) and keep == 256
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(program.frozen))


def test_collectives_of_a_program():
    text = """
  %all-reduce.1 = (f32[2,4]{1,0}, bf16[8]{0}) all-reduce(%a, %b), replica_groups={}
  %ag = f32[16]{0} all-gather(%c), dimensions={0}
  %start = (f32[4]{0}, f32[4]{0}) collective-permute-start(%d), source_target_pairs={{0,1}}
  %done = f32[4]{0} collective-permute-done(%start)
"""
    assert count_collectives(text) == {
        "all-reduce": {"count": 1, "bytes": 48},
        "all-gather": {"count": 1, "bytes": 64},
        "collective-permute": {"count": 1, "bytes": 16},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v9:4x4"], "no TPU 'v9:4x4'; expected something like v5e:4x4"),
        (["--topology", "v5e:4x5"], "no slice 'v5e:4x5'; there are v5e:1x1"),
        (["--topology", "v5e:4x4", "--slices", "0"], "--slices 0: at least 1"),
    ],
)
def test_what_is_refused(options, message, capsys):
    assert main(["--config", FIELDS[0], *options]) == 1 and message in capsys.readouterr().err


def test_collectives_between_slices_are_counted_apart():
    """As libtpu writes them, for two slices."""
    text = """
  %ar = f32[4]{0} all-reduce(%a), replica_groups={{0,1}}
  %send = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%b, %c), frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%c), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
"""  # noqa: E501
    assert count_collectives(text) == {
        "all-reduce": {"count": 1, "bytes": 16},
        "between slices, all-reduce": {"count": 1, "bytes": 2**20},
    }


def test_a_batch_that_does_not_divide():
    trained = training(FIELDS[0], ["data.batch_size=6"])
    with pytest.raises(ValueError, match=r"data\.batch_size=6 is not a multiple of data=8 x fsdp=1 x accumulate=1: 8"):
        abstract_program(*trained, jax.devices(), keep=None, codes=True)
