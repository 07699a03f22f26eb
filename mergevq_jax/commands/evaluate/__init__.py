"""`mergevq evaluate`: measures tokenizers and generators."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mergevq_jax.commands.arguments import (
    SAMPLING,
    TINY,
    compute_of,
    given,
    mesh_of,
    request_of,
    sampling_arguments,
    source_arguments,
    source_of,
)
from mergevq_jax.commands.evaluate import representation_arguments
from runtime_jax.cli import CommandLine, Group, path


def add_commands(line: CommandLine) -> None:
    """Adds the commands that measure models."""
    group = line.group("evaluate", "Measure tokenizers and generators.")
    representation_arguments.add_command(group)
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

    _generation_command(group)


def _generation_command(group: Group) -> None:
    sub = group.command(
        "generation",
        _generation,
        "Measure samples, or a generator over guidance scales, against reference images; resumable.",
        several=True,
    )
    sub.add_argument(
        "--samples",
        nargs="+",
        type=path,
        default=[],
        help="folders of mergevq sample or of pictures, npz files with images arr_0",
    )
    sub.add_argument("--model", help="instead: shipped name, folder or hub id of a generator that draws")
    sub.add_argument("--cfg-scale", type=float, nargs="+", default=[1.0], help="guidance scales to compare; 1: off")
    sampling_arguments(sub)
    sub.set_defaults(sampling={name: sub.get_default(name) for name in ("cfg_scale", *SAMPLING)})
    sub.add_argument(
        "--num-images", type=int, help="of each set (default: all samples, or 50000 that the generator draws)"
    )
    sub.add_argument(
        "--reference",
        required=True,
        help="folder of images, TFDS dataset, or npz file: of --save-reference, or in ADM's layout",
    )
    sub.add_argument("--split", default="train", help="of a TFDS dataset (default: train)")
    sub.add_argument("--data-dir", default="data", help="folder of TFDS datasets (default: data)")
    sub.add_argument("--reference-images", type=int, help="evenly spaced ones (default: all)")
    sub.add_argument("--save-reference", type=path, metavar="FILE.npz", help="keep the reference's statistics")
    _features_argument(sub)
    sub.add_argument("--out", type=path, default=Path("runs/evaluate_generation"))


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


def _generation(args: Namespace, _: list[str]) -> None:
    from mergevq_jax.commands.evaluate.generation import Request, evaluate
    from mergevq_jax.commands.evaluate.generation_sets import Draws
    from mergevq_jax.evaluate.results import PUBLISHED_COUNT

    draws = None
    if args.model is None and (unused := given(args, args.sampling)):
        raise ValueError(f"{', '.join(unused)}: only with --model, which draws samples")
    if args.model is not None:
        num = PUBLISHED_COUNT if args.num_images is None else args.num_images
        draws = Draws(
            model=args.model,
            request=request_of(args, num, 1.0),
            cfg_scales=tuple(args.cfg_scale),
            tokenizer=args.tokenizer,
            compute=compute_of(args),
            mesh=mesh_of(args),
        )
    request = Request(
        samples=tuple(args.samples),
        draws=draws,
        reference=args.reference,
        split=args.split,
        data_dir=args.data_dir,
        num_reference=args.reference_images,
        save_reference=args.save_reference,
        features=tuple(args.features),
        num_images=args.num_images if draws is None else None,
        batch_size=args.batch_size,
    )
    evaluate(request, out=args.out)
