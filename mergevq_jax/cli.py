"""The command line: mergevq scenes | train | evaluate | reconstruct | tokenize | inspect | convert."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

TINY = "tiny"  # names the tokenizer that is shipped with the package


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one line and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    args, rest = _parser().parse_known_args(argv)
    try:
        overrides = _overrides(args, rest)
        return args.run(args, overrides) or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        from runtime_jax.checkpoint import CheckpointError  # here, for it takes a second

        if args.traceback or not isinstance(error, (ValueError, OSError, FloatingPointError, CheckpointError)):
            raise
        print(f"mergevq {args.command}: {error}{_advice(error)}", file=sys.stderr)
        return 1


def _advice(error: Exception) -> str:
    from runtime_jax.data import MissingDatasetError

    if not isinstance(error, MissingDatasetError) or not error.name.startswith("mini_scenes"):
        return ""
    _, _, size = error.name.partition("/")
    return f"; or run: mergevq scenes --data-dir {error.data_dir} --size {size or 64}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mergevq", description=__doc__)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command("scenes", _scenes, "Write the procedural dataset mini_scenes.")
    sub.add_argument("--data-dir", default="data")
    sub.add_argument("--size", type=int, default=64, help="side of the images in pixels")

    sub = command("train", _train, "Train, or go on training; any config value: --config.a.b=value.")
    sub.add_argument("--config", required=True, help="configs/FILE.py or configs/FILE.py:ARGUMENT")
    sub.add_argument("--workdir", required=True, help="checkpoints, metrics, pictures and the trained model go here")

    sub = command(
        "evaluate", _evaluate, "Measure tokenizers on held-out scenes and photographs, and draw what they do."
    )
    sub.add_argument(
        "--tokenizer", action="append", help="folder or hub id; several may be given (default: the shipped one)"
    )
    sub.add_argument("--data-dir", default="data")
    sub.add_argument(
        "--keep", type=int, nargs="+", default=[64, 144, 256], help="kept tokens K of a training-size image"
    )
    sub.add_argument("--num-images", type=int, default=256)
    sub.add_argument("--metrics", help="a metrics.jsonl of a training run, for the loss curve")
    sub.add_argument("--out", default="runs/evaluate")

    sub = command(
        "reconstruct", _reconstruct, "Tokenize pictures and draw them again, with the merged groups outlined."
    )
    sub.add_argument("images", nargs="+", type=Path)
    sub.add_argument("--tokenizer", default=TINY, help="folder or hub id (default: the shipped tiny one)")
    sub.add_argument("--keep", type=int, nargs="+", help="kept tokens K (default: the model's share of the raw tokens)")
    sub.add_argument(
        "--size", type=int, help="pixels of the shorter side (default: the training size; 0: as the picture is)"
    )
    sub.add_argument("--out", type=Path, default=Path("runs/reconstruct"))

    sub = command("tokenize", _tokenize, "Write codes and source maps of a dataset or folder to disk; resumable.")
    sub.add_argument("--tokenizer", default=TINY)
    sub.add_argument("--folder", help="image folder; sub-folders are classes")
    sub.add_argument("--tfds", help="a prepared TFDS dataset, such as mini_scenes/64")
    sub.add_argument("--split", default="train")
    sub.add_argument("--data-dir", default="data")
    sub.add_argument("--keep", type=int, help="kept tokens K")
    sub.add_argument("--batch-size", type=int, default=32)
    sub.add_argument("--shard-size", type=int, default=4096, help="images in one file")
    sub.add_argument("--out", type=Path, required=True)

    sub = command("inspect", _inspect, "Parameters, FLOPs and memory of a config or preset, without weights.")
    sub.add_argument("--config", help="configs/FILE.py:ARGUMENT")
    sub.add_argument("--preset", help="a preset's name instead of a config")
    sub.add_argument("--batch-size", type=int, help="for a preset (default 1); a config has its own")
    sub.add_argument("--compile", action="store_true", help="also compile and ask the compiler for its memory (slow)")

    sub = command(
        "convert", _convert, "Turn a released stage-1 checkpoint (as .safetensors) into a tokenizer's folder."
    )
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("--preset", required=True, help="the architecture it was trained with")
    sub.add_argument("--last-weights", action="store_true", help="take the last weights instead of the moving averages")
    sub.add_argument("--out", type=Path, required=True)
    return parser


def _overrides(args: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """`--config.a.b=value` arguments as `a.b=value`; anything else that argparse left is an error."""
    overrides, rest = [], list(rest)
    while rest:
        item = rest.pop(0)
        if not item.startswith("--config.") or not getattr(args, "config", None):
            raise ValueError(f"unknown argument {item!r}; see mergevq {args.command} --help")
        if "=" not in item:
            if not rest:
                raise ValueError(f"{item}: a value is missing (--config.key=value)")
            item = f"{item}={rest.pop(0)}"
        overrides.append(item.removeprefix("--config."))
    return overrides


def _scenes(args, _) -> None:
    from runtime_jax.data import mini_scenes

    print(f"{mini_scenes.prepare(args.data_dir, args.size)} is under {args.data_dir}")


def _load(args, overrides):
    from mergevq_jax.tokenizer.run import TrainConfig
    from runtime_jax import config as config_lib

    return config_lib.build(TrainConfig, config_lib.load(args.config, overrides, new_keys=True))


def _train(args, overrides) -> int:
    config = _load(args, overrides)
    from mergevq_jax.tokenizer.run import train

    trained = train(config, args.workdir)
    if trained.stopped_by is None:
        print(f"the tokenizer is in {trained.folder}")
        return 0
    print(f"stopped by {trained.stopped_by} after step {trained.step}; the same command goes on from there")
    return 128 + signal.Signals[trained.stopped_by]


def _evaluate(args, _) -> None:
    from mergevq_jax.evaluate.held_out import evaluate

    evaluate(
        args.tokenizer or [TINY],
        out=Path(args.out),
        data_dir=args.data_dir,
        keeps=args.keep,
        num_images=args.num_images,
        metrics=args.metrics,
    )


def _reconstruct(args, _) -> None:
    from mergevq_jax.reconstruct import reconstruct

    reconstruct(args.images, args.tokenizer, keeps=args.keep, size=args.size, out=args.out)


def _tokenize(args, _) -> None:
    from mergevq_jax.tokenize import tokenize
    from runtime_jax.data import SourceConfig

    if bool(args.folder) == bool(args.tfds):
        raise ValueError("give exactly one of --folder and --tfds")
    if args.folder:
        source = SourceConfig(kind="folder", path=args.folder)
    else:
        source = SourceConfig(kind="tfds", name=args.tfds, split=args.split, data_dir=args.data_dir)
    print(
        tokenize(
            source, args.tokenizer, args.out, keep=args.keep, batch_size=args.batch_size, shard_size=args.shard_size
        )
    )


def _inspect(args, overrides) -> None:
    from mergevq_jax.inspect import inspect_config, inspect_model
    from mergevq_jax.tokenizer.config import preset

    if bool(args.config) == bool(args.preset):
        raise ValueError("give exactly one of --config and --preset")
    if args.config:
        print(inspect_config(_load(args, overrides), compile=args.compile))
    else:
        print(inspect_model(preset(args.preset), args.batch_size or 1, compile=args.compile))


def _convert(args, _) -> None:
    from mergevq_jax.convert import from_released, tokenizer_table
    from mergevq_jax.tokenizer.config import preset
    from mergevq_jax.tokenizer.model import Tokenizer, param_shapes
    from runtime_jax.hub import read_tensors
    from runtime_jax.weights import import_weights

    config = preset(args.preset)
    tensors = from_released(read_tensors(args.checkpoint), ema=not args.last_weights)
    if not any(name.startswith("recovery.") for name in tensors):
        from dataclasses import replace

        config = replace(config, recovery=None)  # the released checkpoints never trained one
    Tokenizer(config, import_weights(tokenizer_table(config), tensors, param_shapes(config))).save_pretrained(args.out)
    print(f"the tokenizer is in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
