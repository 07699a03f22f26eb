"""`mergevq evaluate`: measures tokenizers and generators."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mergevq_jax.commands.arguments import TINY, source_arguments, source_of
from runtime_jax.cli import CommandLine, path


def add_commands(line: CommandLine) -> None:
    """Adds the commands that measure models."""
    group = line.group("evaluate", "Measure tokenizers and generators.")
    sub = group.command(
        "reconstruction",
        _reconstruction,
        "Measure tokenizers: distance of reconstructions from images, and use of codes; resumable.",
        several=True,
    )
    sub.add_argument(
        "--tokenizer", action="append", help="folder or hub id; several may be given (default: the shipped one)"
    )
    source_arguments(sub, split="validation", default="held-out scenes of mini_scenes and parts of photographs")
    sub.add_argument(
        "--keep", type=int, nargs="+", default=[64, 144, 256], help="kept tokens K of a training-size image"
    )
    sub.add_argument("--num-images", type=int, help="the first ones (default: all, or 256 scenes)")
    sub.add_argument("--batch-size", type=int, default=32)
    _features_argument(sub)
    sub.add_argument(
        "--lpips", nargs="+", default=[], metavar="FILE", help="weights of VGG16 and of LPIPS' linear layers"
    )
    sub.add_argument("--metrics", help="metrics.jsonl of a training run, to plot the loss")
    sub.add_argument("--out", type=path, default=Path("runs/evaluate"))


def _features_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        nargs="+",
        default=["judge"],
        metavar="NETWORK",
        help="judge (shipped; the default), inception:PATH or dinov2:PATH, a file, folder or hub id of weights",
    )


def _reconstruction(args: Namespace, _: list[str]) -> None:
    from mergevq_jax.commands.evaluate.reconstruction import Request, evaluate

    request = Request(
        tokenizers=tuple(args.tokenizer or [TINY]),
        keeps=tuple(args.keep),
        source=source_of(args),
        data_dir=args.data_dir,
        num_images=args.num_images,
        batch_size=args.batch_size,
        features=tuple(args.features),
        lpips=tuple(args.lpips),
    )
    evaluate(request, out=args.out, metrics=args.metrics)
