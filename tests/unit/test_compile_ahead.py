"""What `launch.compile_ahead` reads off a program, on devices that are there; and what it refuses."""

import jax
import pytest

from launch import programs
from launch.compile_ahead import CHIPS, compile_program, known_before, main, render, too_large
from launch.hlo import count_collectives, largest_arrays
from launch.programs import Request

GENERATOR = ("mergear_tiny:merge", ["mesh.fsdp=4", "data.batch_size=8"])


def test_a_step_is_compiled_from_shapes_alone():
    report = compile_program(*programs.read(*GENERATOR), "v5e", jax.devices(), Request(keep=144, codes=True))
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and report["fits"]
    assert 1e6 < report["numbers"]["parameters"] < 1.1e6 and report["flops"] > 1e10
    assert report["bytes held on one device"]["parameters"] < 4 * report["numbers"]["parameters"] / 3  # split over fsdp
    assert report["collectives"]["all-reduce"]["count"] > 0 and report["collectives"]["all-gather"]["bytes"] > 1e5
    text = render({**report, "config": "tiny", "topology": "v5e:2x4"})
    assert "| tiny, step, K = 144, batch 8 | fits |" in text and "| slice, mesh | v5e:2x4, data=2 fsdp=4 |" in text


@pytest.mark.parametrize("kind", ["merge", "random"])
def test_the_sampler_of_a_generator(kind):
    config, task = programs.read(f"mergear_tiny:{kind}", ["mesh.tensor=2"])
    subject = programs.trace(config, task, jax.devices(), Request(sample=True, keep=144, batch_size=8))
    assert subject.name == "sample, K = 144, batch 8" and jax.tree.leaves(subject.traced.out_info)[0].shape[0] == 8


def test_learning_and_drawing_concepts():
    config, task = programs.read("tokenverse_tiny:star", ["mesh.tensor=2", "mesh.data=4", "learn.batch_size=4"])
    step = programs.trace(config, task, jax.devices())
    assert task == "concepts" and step.name == "step at 64 px, batch 4, with the isolation pair"
    assert set(step.held) == {"parameters", "state", "frozen"}
    sampler = programs.trace(config, task, jax.devices(), Request(sample=True))
    assert sampler.traced.out_info[0].shape == (4, 64, 64, 3)


def test_a_teachers_step():
    config, task = programs.read("mergevq_teacher", [])
    step = programs.trace(config, task, jax.devices())
    assert (task, step.name) == ("teacher", "step, 6 views, batch 32") and set(step.held) == {"parameters", "state"}
    for request, message in ((Request(sample=True), "a teacher has no sampler"), (Request(keep=9), "--keep is for")):
        with pytest.raises(ValueError, match=message):
            programs.trace(config, task, jax.devices(), request)


def test_from_images_the_tokenizer_is_frozen_and_whole():
    subject = programs.trace(*programs.read(*GENERATOR), jax.devices())
    assert subject.name == "step, K = 256, batch 8"
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(subject.held["frozen"]))


def test_the_alignment_loss_has_its_published_teacher():
    model = ["model.dist_head=layer2", "losses.alignment_weight=1.0", "losses.alignment_size=56"]
    config, task = programs.read("mergevq_tiny", [*model, "teacher=facebook/dinov2-base"])
    subject = programs.trace(config, task, jax.devices()[:1])
    assert subject.held["frozen"].teacher["patch_embed"]["kernel"].shape == (14, 14, 3, 768)


PROGRAM = """HloModule jit_f
%fused (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  %again = f32[16]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %gathered = f32[16]{0} all-gather(%x), channel_id=7, dimensions={0}
  %end = f32[16]{0} fusion(%x), kind=kCustom, calls=%fused
}

%condition (arg: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[2,4], b: bf16[8]) -> f32[4] {
  %all-reduce.1 = (f32[2,4]{1,0}, bf16[8]{0}) all-reduce(%a, %b), replica_groups={}
  %loop = (s32[], f32[4]{0}) while(%tuple), condition=%condition, body=%body
  %start = (f32[4]{0}, f32[4]{0}) collective-permute-start(%d), source_target_pairs={{0,1}}
  %done = f32[4]{0} collective-permute-done(%start)
  %large = bf16[64,64]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/jvp(Net)/while/body/mul"}
}
"""


def test_collectives_of_a_program_count_each_turn_of_a_loop_and_each_channel_once():
    assert count_collectives(PROGRAM) == {
        "all-reduce": {"count": 1, "bytes": 48},
        "all-gather": {"count": 6, "bytes": 6 * 64},
        "collective-permute": {"count": 1, "bytes": 16},
    }


def test_the_largest_arrays_are_named_by_the_modules_that_make_them():
    assert largest_arrays(PROGRAM, 1) == [(8192, "bf16[64,64]", "f/Net/mul")]


def test_a_program_for_which_xla_finds_no_room():
    subject = programs.trace(*programs.read(*GENERATOR), jax.devices(), Request(keep=144, codes=True))
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.")
    report = too_large(known_before(subject), "v5e", error)
    assert not report["fits"] and report["bytes"] == {"total": 20.5 * 2**30, "chip": CHIPS["v5e"].memory}
    text = render({**report, "config": "tiny", "topology": "v5e:2x4"})
    assert "| DOES NOT FIT |" in text and "| total, GiB a chip | 20.50 of 16 |" in text and "Ran out of memory" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v9:4x4"], "no TPU 'v9:4x4'; expected something like v5e:4x4"),
        (["--topology", "v5e:4x5"], "no slice 'v5e:4x5'; there are v5e:1x1"),
        (["--topology", "v5e:4x4", "--slices", "0"], "--slices 0: at least 1"),
    ],
)
def test_what_is_refused(options, message, capsys):
    assert main(["--config", GENERATOR[0], *options]) == 1 and message in capsys.readouterr().err


def test_collectives_between_slices_are_counted_apart():
    """As libtpu writes them, for two slices."""
    text = """ENTRY %main (a: f32[4]) -> f32[4] {
  %ar = f32[4]{0} all-reduce(%a), replica_groups={{0,1}}
  %send = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%b, %c), frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%c), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501
    assert count_collectives(text) == {
        "all-reduce": {"count": 1, "bytes": 16},
        "between slices, all-reduce": {"count": 1, "bytes": 2**20},
    }


def test_a_batch_that_does_not_divide():
    config, task = programs.read(GENERATOR[0], ["data.batch_size=6"])
    with pytest.raises(ValueError, match=r"data\.batch_size=6 is not a multiple of data=8 x fsdp=1 x accumulate=1: 8"):
        programs.trace(config, task, jax.devices(), Request(codes=True))


@pytest.mark.parametrize(
    ("config", "request_", "message"),
    [
        ("mergevq_tiny", {"sample": True}, "a tokenizer has no sampler"),
        ("mergevq_tiny", {"codes": True}, "--codes is for a generator's step"),
        (GENERATOR[0], {"codes": True, "sample": True}, "--codes is for a generator's step"),
        (GENERATOR[0], {"batch_size": 8}, "--batch-size is for --sample"),
        ("tokenverse_tiny:star", {"keep": 144}, "--keep is for tokenizers and generators"),
    ],
)
def test_requests_that_a_config_cannot_meet(config, request_, message):
    with pytest.raises(ValueError, match=message):
        programs.trace(*programs.read(config, []), jax.devices(), Request(**request_))


def test_a_program_that_xla_cannot_print_has_no_collectives(monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
    report = compile_program(*programs.read(*GENERATOR), "v5e", jax.devices(), Request(keep=144, codes=True))
    assert report["collectives"] is None and "links" not in report["seconds at least"]
    text = render({**report, "config": "tiny", "topology": "v5e:2x4"})
    assert "| collectives | unknown: XLA cannot print the program |" in text
