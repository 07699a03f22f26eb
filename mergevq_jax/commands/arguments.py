"""Arguments that several commands have."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime_jax.data import SourceConfig

TINY, TINY_GENERATOR = "tiny", "tiny-mergear"  # names of what is shipped with the package


def source_arguments(parser: ArgumentParser, *, split: str = "train", default: str | None = None) -> None:
    """--folder, --tfds, --split and --data-dir: where images come from; `default`: without the first two."""
    otherwise = "" if default is None else f" (default: {default})"
    parser.add_argument("--folder", help=f"image folder; sub-folders are classes{otherwise}")
    parser.add_argument("--tfds", help="a prepared TFDS dataset, such as mini_scenes/64")
    parser.add_argument("--split", default=split, help=f"of --tfds (default: {split})")
    parser.add_argument("--data-dir", default="data", help="folder of TFDS datasets (default: data)")


def source_of(args: Namespace) -> "SourceConfig | None":
    """The source that --folder or --tfds names; None without either."""
    from runtime_jax.data import SourceConfig

    if args.folder and args.tfds:
        raise ValueError("give exactly one of --folder and --tfds")
    if args.folder:
        return SourceConfig(kind="folder", path=args.folder)
    if args.tfds:
        return SourceConfig(kind="tfds", name=args.tfds, split=args.split, data_dir=args.data_dir)
    return None
