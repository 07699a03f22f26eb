"""Trained generators side by side: plain autoregression, MergeAR, RandAR, and MergeAR with stores of other sizes.

python benchmarks/generators.py --plain runs/plain/generator --merge runs/mergear/generator \\
    --random runs/randar/generator --out runs/generators          # goes on where it was stopped

Draws sets of images as `mergevq sample` does, a folder for each row and seed, and hands them to `mergevq compare`:
class accuracy, a Fréchet distance in the judge's features, bytes of the store, seconds an image, and a plot of quality
against the slots of the store.
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
# Of the smaller K; more distinct codes than K are drawn, and the largest holds them all.
CAPACITIES = {"evict-oldest": (16, 32, 64, 208), "full": (16, 32, 64, 144)}
STEPS = (8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A generator, and how it draws."""

    name: str
    model: str
    merge_number: int | None = None
    steps: int | None = None
    sampling: SamplingConfig

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return self.name.replace(", ", "_").replace(" ", "").replace("=", "")


def make_rows(scale: float, temperature: float, *, plain_model: str, merge_model: str, random_model: str) -> list[Row]:
    """All rows; every generator is guided alike, RandAR with its linear schedule, and drawn at the same temperature."""
    plain = SamplingConfig(cfg_scale=scale, temperature=temperature)
    linear = replace(plain, cfg_scale=2 * scale - 1, cfg_schedule="linear")
    merged = [Row(name=f"MergeAR, K = {keep}", model=merge_model, merge_number=keep, sampling=plain) for keep in KEEPS]
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
            merge_number=keep,
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
    """Draws what is missing, then compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("plain", "merge", "random"):
        parser.add_argument(f"--{kind}", required=True, help="shipped name, folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/generators"))
    parser.add_argument("--num", type=int, default=192, help="images of a row and seed")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cfg-scale", type=float, default=3.5)
    parser.add_argument("--temperature", type=float, default=1.0, help="of all but the row without guidance")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    folders = {}
    models = {"plain_model": args.plain, "merge_model": args.merge, "random_model": args.random}
    for row in make_rows(args.cfg_scale, args.temperature, **models):
        folders[row.name] = [args.out / row.folder / str(seed) for seed in range(args.seeds)]
        for seed, folder in enumerate(folders[row.name]):
            if (folder / "protocol.json").exists():  # written last but for the pictures
                model, there = load_generator(row.model), read_samples(folder).protocol
                wanted = {
                    "fingerprint": model.fingerprint(),
                    "num": args.num,
                    "merge_number": row.merge_number,
                    "sampling": to_dict(row.sampling if row.steps else model.info.sampling(row.sampling)),
                    "batch_size": args.batch_size,
                }
                if differing := [name for name, value in wanted.items() if there.get(name) != value]:
                    raise ValueError(f"{folder}: its {', '.join(differing)} differ; take another --out")
                continue
            request = Request(
                num=args.num,
                merge_number=row.merge_number,
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
