"""The GPU rows of all benchmarks in one run, as one JSON file. It has not run on a GPU yet.

make gpu-check                                                  # writes gpu_check.json
python benchmarks/gpu_check.py --toy --out /tmp/toy.json        # toy sizes on a CPU: does the script itself work?

A section that fails is recorded with its error and the others go on; one that would begin after `--minutes` is recorded
as skipped. Exit status 1: a section failed or was skipped.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attention
import flax
import jax
import jax.numpy as jnp
import mergear
import numpy as np
import tokenizer
from merged_attention import best

from mergevq_jax.tokenizer.config import PRESETS, TokenizerConfig
from mergevq_jax.tokenizer.train import DiscriminatorConfig
from runtime_jax.cost import count, peak_flops
from runtime_jax.files import write_json
from runtime_jax.nn.compute import Compute
from tokenverse_jax.commands.inspect import batch_shapes
from tokenverse_jax.concepts.concept_mod import ConceptModConfig
from tokenverse_jax.concepts.learn import LearnConfig
from tokenverse_jax.concepts.learner import Learner
from tokenverse_jax.flux import model as flux

TOY_TOKENIZER = TokenizerConfig(
    resolution=16,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=(0, 1),
    num_att_blocks=1,
    num_heads=8,
    z_channels=8,
    keep=36,
    dist_head=None,
)
TOY_FLUX = flux.FluxConfig(
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 2, 2),
)
Rows = list[dict[str, Any]]


def tokenizer_rows(toy: bool) -> Rows:
    """Encode, decode and train step of G+R-d64 in bfloat16."""
    config, batch, steps = (TOY_TOKENIZER, 2, 1) if toy else (PRESETS["gr-d64"], 64, 10)
    discriminator = DiscriminatorConfig(ndf=8, num_layers=2) if toy else DiscriminatorConfig()
    rows = []
    for program in tokenizer.programs(config, batch, Compute(dtype="bfloat16"), [], discriminator):
        found = tokenizer.measure(program, steps, repeats=2)
        rate = {"batch": batch, "images_per_second": batch / found.best}
        rows.append(found._asdict() | rate | mfu(found.flops, found.best))
    return rows


def attention_rows(toy: bool) -> Rows:
    """The platform's kernel against xla, at the sizes of FLUX at 1024 px."""
    shape = (1, 128, 2, 64) if toy else attention.SHAPE
    return [row._asdict() for row in attention.run(shape, "bfloat16", repeats=5)]


def mergear_rows(toy: bool) -> Rows:
    """MergeAR L and plain autoregression at 256 tokens; a compiled PyTorch Llama, where PyTorch has CUDA."""
    peer, note = torch_on_gpu()
    args = SimpleNamespace(
        preset=None if toy else "L",
        ratios=[0.56],
        cfg_scale=1.0,
        dtype="bfloat16",
        steps=8 if toy else 64,
        peer=peer and not toy,
        torch_compile=True,
    )
    length, batch = (16, 2) if toy else (256, 16)
    contenders = list(mergear.contenders(args, length, batch, Compute(dtype=args.dtype)))
    seconds = mergear.seconds_a_step(contenders, repeats=2 if toy else 3)
    return [{"peer": note}] + [
        {"name": row.name, "batch": row.batch, "seconds": of_step, "tokens_per_second": row.batch / of_step}
        for row, of_step in zip(contenders, seconds, strict=True)
    ]


def torch_on_gpu() -> tuple[bool, str]:
    """Whether there is a PyTorch that uses this GPU, in a word or two as well."""
    if importlib.util.find_spec("torch") is None:
        return False, "none: PyTorch is not installed"
    import torch

    return torch.cuda.is_available(), torch.__version__ if torch.cuda.is_available() else "none: PyTorch has no CUDA"


def personalisation_rows(toy: bool) -> Rows:
    """A step of learning a concept at 512 px on FLUX.1-dev's 12B parameters, random in bfloat16."""
    config, grid, steps = (TOY_FLUX, (2, 2), 1) if toy else (flux.PRESETS["dev"], (32, 32), 5)
    learn = LearnConfig(concept_mod=ConceptModConfig(hidden=8, block_hidden=8)) if toy else LearnConfig()
    compute = Compute(dtype="bfloat16", attention="auto", remat=True)
    weights = jax.tree.map(small, flux.param_shapes(config))
    transformer = SimpleNamespace(config=config, params=weights)
    learner = Learner(SimpleNamespace(transformer=transformer, compute=compute), learn)
    batch = {name: example(leaf) for name, leaf in batch_shapes(grid, config, learn).items()}
    variant, state = (2, False, grid), learner.init(0)

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = learner.program.step(state, batch, variant)
        if float(metrics["nonfinite"][0]):
            raise FloatingPointError("the update is not finite")

    with jax.set_mesh(learner.program.mesh):
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        seconds = best(run, repeats=2) / steps
    flops = learner.program.flops(variant)
    return [{"parameters": count(weights), "first": first, "seconds": seconds, "flops": flops} | mfu(flops, seconds)]


def small(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Random weights in bfloat16; biases and scales too, so that nothing is zero."""
    return 0.02 * jax.random.normal(jax.random.key(shape.size), shape.shape, jnp.bfloat16)


def example(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Random values in (0, 1), which a mask takes for True."""
    return jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, shape.shape).astype(shape.dtype))


def mfu(flops: float, seconds: float) -> dict[str, float]:
    """The share of the data sheet's peak, where that is known."""
    peak = peak_flops(jax.devices()[0].device_kind, "bfloat16")
    return {"mfu": flops / seconds / peak} if peak else {}


SECTIONS: Mapping[str, Callable[[bool], Rows]] = {
    "attention": attention_rows,
    "mergear": mergear_rows,
    "personalisation": personalisation_rows,
    "tokenizer": tokenizer_rows,  # compiles longest
}


def main() -> int:
    """Runs the sections, and writes the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=6, help="no section begins later (default: 6)")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not args.toy:
        parser.error("JAX finds no GPU here; --toy tries the script on a CPU")
    record: dict[str, Any] = {
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "sections": {},
    }
    begin = time.perf_counter()
    for name in args.only:
        start = time.perf_counter()
        if start - begin > 60 * args.minutes:
            found: dict[str, Any] = {"skipped": f"{args.minutes:g} minutes were over"}
        else:
            try:
                found = {"rows": SECTIONS[name](args.toy)}
            except Exception as error:  # the others are worth having
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
        record["sections"][name] = found | {"seconds": time.perf_counter() - start}
        write_json(args.out, record)
        print(f"{name}: {json.dumps(record['sections'][name])}", flush=True)
        jax.clear_caches()
    bad = [name for name, found in record["sections"].items() if "rows" not in found]
    print(f"{args.out}: " + (f"without {', '.join(bad)}" if bad else "complete"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
