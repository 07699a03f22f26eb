"""`mergevq evaluate`: measures tokenizers and generators."""

from argparse import Namespace
from pathlib import Path

from mergevq_jax.commands.arguments import TINY
from runtime_jax.cli import CommandLine, path


def add_commands(line: CommandLine) -> None:
    """Adds the commands that measure models."""
    group = line.group("evaluate", "Measure tokenizers and generators.")
    sub = group.command(
        "reconstruction",
        _reconstruction,
        "Measure tokenizers on held-out scenes and photographs, with pictures.",
        several=True,
    )
    sub.add_argument(
        "--tokenizer", action="append", help="folder or hub id; several may be given (default: the shipped one)"
    )
    sub.add_argument("--data-dir", default="data")
    sub.add_argument(
        "--keep", type=int, nargs="+", default=[64, 144, 256], help="kept tokens K of a training-size image"
    )
    sub.add_argument("--num-images", type=int, default=256)
    sub.add_argument("--metrics", help="metrics.jsonl of a training run, to plot the loss")
    sub.add_argument("--out", type=path, default=Path("runs/evaluate"))


def _reconstruction(args: Namespace, _: list[str]) -> None:
    from mergevq_jax.commands.evaluate.reconstruction import evaluate

    evaluate(
        args.tokenizer or [TINY],
        out=args.out,
        data_dir=args.data_dir,
        keeps=args.keep,
        num_images=args.num_images,
        metrics=args.metrics,
    )
