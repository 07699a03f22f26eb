"""Compares trained generators: plain autoregression, MergeAR, RandAR, and MergeAR with other KV cache sizes.

python benchmarks/generators.py --plain runs/plain/generator --merge runs/mergear/generator \\
    --random runs/randar/generator --out runs/generators          # resumes where it was stopped

Draws a set of images for each row and seed, each in its own folder, as `mergevq sample` does. `mergevq compare` then
measures class accuracy, the Fréchet distance in the judge's features, KV cache bytes and seconds per image, and plots
quality against cache slots.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from mergevq_jax.commands.compare import compare, read_samples
from mergevq_jax.commands.sample import Request, sample
from mergevq_jax.generator.model import load_generator
from mergevq_jax.generator.sampling.plan import SamplingConfig
from mini_scenes.judge import Judge
from runtime_jax.config import to_dict

KEEPS = (144, 256)
# At the smaller K. Samples have more than K distinct codes; the largest capacity holds them all.
CAPACITIES = {"evict-oldest": (16, 32, 64, 208), "full": (16, 32, 64, 144)}
STEPS = (8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A generator and its sampling settings."""

    name: str
    model: str
    keep: int | None = None
    steps: int | None = None
    sampling: SamplingConfig

    @property
    def folder(self) -> str:
        """Name of the row's folder."""
        return self.name.replace(", ", "_").replace(" ", "").replace("=", "")


def make_rows(scale: float, temperature: float, *, plain_model: str, merge_model: str, random_model: str) -> list[Row]:
    """All rows. They share guidance (linear for RandAR) and temperature, except "plain", which uses the defaults."""
    plain = SamplingConfig(cfg_scale=scale, temperature=temperature)
    linear = replace(plain, cfg_scale=2 * scale - 1, cfg_schedule="linear")
    merged = [Row(name=f"MergeAR, K = {keep}", model=merge_model, keep=keep, sampling=plain) for keep in KEEPS]
    sized = [
        replace(
            merged[0],
            name=f"MergeAR, K = {KEEPS[0]}, capacity {capacity}, {policy}",
            sampling=replace(plain, capacity=capacity, policy=policy),
        )
        for policy, capacities in CAPACITIES.items()
        for capacity in capacities
    ]
    random = [
        Row(
            name=f"RandAR, K = {keep}, {steps} steps",
            model=random_model,
            keep=keep,
            steps=steps,
            sampling=linear,
        )
        for keep in KEEPS
        for steps in STEPS
    ]
    return [
        Row(name="plain", model=plain_model, sampling=SamplingConfig()),
        Row(name="plain, guided", model=plain_model, sampling=plain),
        *merged,
        *random,
        *sized,
    ]


def main() -> None:
    """Draws the missing sets, then compares all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("plain", "merge", "random"):
        parser.add_argument(f"--{kind}", required=True, help="shipped name, folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/generators"))
    parser.add_argument("--num", type=int, default=192, help="images per row and seed")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cfg-scale", type=float, default=3.5)
    parser.add_argument("--temperature", type=float, default=1.0, help="for all rows except the one without guidance")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    folders = {}
    models = {"plain_model": args.plain, "merge_model": args.merge, "random_model": args.random}
    for row in make_rows(args.cfg_scale, args.temperature, **models):
        folders[row.name] = [args.out / row.folder / str(seed) for seed in range(args.seeds)]
        for seed, folder in enumerate(folders[row.name]):
            if (folder / "protocol.json").exists():  # written last, except for the pictures
                model, there = load_generator(row.model), read_samples(folder).protocol
                wanted = {
                    "fingerprint": model.fingerprint(),
                    "num": args.num,
                    "keep": row.keep,
                    "sampling": to_dict(row.sampling if row.steps else model.info.sampling(row.sampling)),
                    "batch_size": args.batch_size,
                }
                if differing := [name for name, value in wanted.items() if there.get(name) != value]:
                    raise ValueError(f"{folder} was drawn with other {', '.join(differing)}; choose another --out")
                continue
            request = Request(
                num=args.num,
                keep=row.keep,
                sampling=row.sampling,
                steps=row.steps,
                seed=seed,
                batch_size=args.batch_size,
            )
            print(sample(row.model, request, out=folder))
    compare(
        list(folders.items()),
        out=args.out,
        data_dir=args.data_dir,
        judge=Judge.load(),
        tokenizer="tiny",
        keeps=KEEPS,
        single=True,
    )


if __name__ == "__main__":
    main()
