"""`scenes`, the command of every program that trains or measures on mini_scenes."""

import argparse

from runtime_jax.cli import CommandLine


def add_command(line: CommandLine) -> None:
    """Adds the command, which writes the dataset."""
    parser = line.command("scenes", _scenes, "Write the procedural dataset mini_scenes.")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--single", action="store_true", help="one object in every scene: mini_scenes/64_single")


def advise(error: Exception, prog: str) -> str:
    """How the dataset that an error misses is written by `prog`."""
    from runtime_jax.data import MissingDatasetError

    if not isinstance(error, MissingDatasetError) or not error.name.startswith("mini_scenes"):
        return ""
    size, single, _ = error.name.partition("/")[2].partition("_single")
    options = f"--data-dir {error.data_dir} --size {size or 64}" + (" --single" if single else "")
    return f"; or run: {prog} scenes {options}"


def _scenes(args: argparse.Namespace, _: list[str]) -> None:
    from mini_scenes import prepare

    print(f"{prepare(args.data_dir, args.size, single=args.single)} is under {args.data_dir}")
