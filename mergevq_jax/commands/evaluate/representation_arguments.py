"""The arguments of `mergevq evaluate representation`."""

from argparse import Namespace
from pathlib import Path

from mergevq_jax.commands.arguments import TINY, given, source_arguments, source_of
from runtime_jax.cli import Group, path

TEST, KEEPS = "test", [64, 144, 256]  # defaults of --test-split and --keep


def add_command(group: Group) -> None:
    """Adds the command."""
    help = "Measure what features tell about an image's class: k-NN, linear probe, fine-tuning; resumable."
    sub = group.command("representation", _representation, help, several=True)
    sub.add_argument(
        "--tokenizer", action="append", help="folder or hub id; several may be given (default: the shipped one)"
    )
    sub.add_argument("--teacher", action="append", default=[], help="DINOv2's folder or hub id; several may be given")
    sub.add_argument(
        "--method", nargs="+", default=["knn", "linear"], choices=["knn", "linear", "finetune"], help="what is measured"
    )
    sub.add_argument("--config", default="representation", help="of the methods: NAME:ARGUMENT or FILE.py:ARGUMENT")
    source_arguments(sub, default="mini_scenes/64_probe")
    sub.add_argument("--test-split", default=TEST, help="split of the test images (default: test)")
    sub.add_argument("--test-folder", help="folder of the test images, with --folder")
    sub.add_argument("--keep", type=int, nargs="+", default=KEEPS, help="kept tokens K of a training-size image")
    sub.add_argument(
        "--tokens", nargs="+", default=["mean"], choices=["mean", "class"], help="mean of all tokens, or class token"
    )
    sub.add_argument("--size", type=int, help="of the images, if no tokenizer sets it (default: the teacher's)")
    sub.add_argument("--seeds", type=int, default=3, help="of probes, fine-tuning and random weights")
    sub.add_argument("--batch-size", type=int, default=32, help="images at once; no figure depends on it")
    sub.add_argument("--out", type=path, default=Path("runs/representation"))


def _representation(args: Namespace, overrides: list[str]) -> None:
    from dataclasses import replace

    from mergevq_jax.commands.evaluate.representation import Request, evaluate
    from mergevq_jax.evaluate.representation.rows import RepresentationConfig
    from mini_scenes import PROBE
    from runtime_jax import config as config_lib
    from runtime_jax.data import SourceConfig

    if bool(args.folder) != bool(args.test_folder):
        raise ValueError("--folder and --test-folder: give both, for training and test images")
    if args.folder and given(args, {"test_split": TEST}):
        raise ValueError("--test-split is of a dataset (--tfds): a folder has --test-folder")
    if args.teacher and not args.tokenizer and given(args, {"keep": KEEPS}):
        raise ValueError("--keep is of tokenizers, and there is none: --teacher alone was given")
    train = source_of(args)
    if train is None:
        train = SourceConfig(kind="tfds", name=f"mini_scenes/{PROBE}", split=args.split, data_dir=args.data_dir)
    other = {"path": args.test_folder} if args.folder else {"split": args.test_split}
    fields = config_lib.load(args.config, overrides, new_keys=True)
    request = Request(
        tokenizers=tuple(args.tokenizer or ([] if args.teacher else [TINY])),
        teachers=tuple(args.teacher),
        train=train,
        test=replace(train, **other),
        methods=tuple(args.method),
        keeps=tuple(args.keep),
        poolings=tuple(args.tokens),
        seeds=args.seeds,
        size=args.size,
        batch_size=args.batch_size,
        config=config_lib.build(RepresentationConfig, fields, what="mergevq evaluate representation"),
    )
    evaluate(request, out=args.out)
