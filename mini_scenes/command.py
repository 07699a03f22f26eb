"""The `scenes` command, shared by all programs that train or evaluate on mini_scenes."""

import argparse

from runtime_jax.cli import CommandLine


def add_command(line: CommandLine) -> None:
    """Adds the command that writes the dataset."""
    parser = line.command("scenes", _scenes, "Write the procedural mini_scenes dataset.")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--size", type=int, default=64, help="image side in pixels")
    parser.add_argument("--single", action="store_true", help="one object per scene; writes mini_scenes/64_single")
    parser.add_argument("--probe", action="store_true", help="scenes to probe features on; writes mini_scenes/64_probe")


def advise(error: Exception, prog: str) -> str:
    """The message of an error; where a mini_scenes dataset is missing, with the `prog` command that writes it."""
    from runtime_jax.data import MissingDatasetError

    if not isinstance(error, MissingDatasetError) or not error.name.startswith("mini_scenes"):
        return str(error)
    from mini_scenes import PROBE

    name, recipe = error.name.partition("/")[2], error.recipe
    size, single, _ = name.partition("_single")
    options = f"--data-dir {error.data_dir} --size {size or 64}" + (" --single" if single else "")
    if name == PROBE:
        options, recipe = f"--data-dir {error.data_dir} --probe", f"mini_scenes.prepare_probe({error.data_dir!r})"
    return f"{str(error).removesuffix(error.recipe)}{prog} scenes {options}; or in Python: {recipe}"


def _scenes(args: argparse.Namespace, _: list[str]) -> None:
    from mini_scenes import prepare, prepare_probe

    if args.probe and (args.single or args.size != 64):
        raise ValueError("--probe has a size and a number of objects of its own: leave out --size and --single")
    name = prepare_probe(args.data_dir) if args.probe else prepare(args.data_dir, args.size, single=args.single)
    print(f"{name} is under {args.data_dir}")
