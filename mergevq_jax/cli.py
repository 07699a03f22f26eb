"""The command line: mergevq scenes | train | evaluate | compare | reconstruct | tokenize | inspect | convert."""

import sys
from collections.abc import Sequence
from pathlib import Path

from runtime_jax.cli import CommandLine, config_arguments, report_end

TINY = "tiny"  # names the tokenizer that is shipped with the package


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one line and exit status 1."""
    return _command_line().main(argv)


def _command_line() -> CommandLine:
    line = CommandLine("mergevq", __doc__)
    line.scenes_command()

    sub = line.command("train", _train, "Train, or go on training; any config value: --config.a.b=value.")
    config_arguments(sub)

    sub = line.command(
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

    sub = line.command("compare", _compare, "Judge sets of generated scenes, side by side with real ones.")
    sub.add_argument(
        "--row", nargs="+", action="append", required=True, metavar="X", help="a name, and folders of mergevq sample"
    )
    sub.add_argument("--tokenizer", help="also judge its reconstructions of real scenes")
    sub.add_argument("--keep", type=int, nargs="+", default=[64, 144, 256], help="kept tokens K of them")
    sub.add_argument("--judge", type=Path, help="weights of another judge than the shipped one")
    sub.add_argument("--data-dir", default="data")
    sub.add_argument("--out", type=Path, default=Path("runs/compare"))

    sub = line.command(
        "reconstruct", _reconstruct, "Tokenize pictures and draw them again, with the merged groups outlined."
    )
    sub.add_argument("images", nargs="+", type=Path)
    sub.add_argument("--tokenizer", default=TINY, help="folder or hub id (default: the shipped tiny one)")
    sub.add_argument("--keep", type=int, nargs="+", help="kept tokens K (default: the model's share of the raw tokens)")
    sub.add_argument(
        "--size", type=int, help="pixels of the shorter side (default: the training size; 0: as the picture is)"
    )
    sub.add_argument("--out", type=Path, default=Path("runs/reconstruct"))

    sub = line.command("tokenize", _tokenize, "Write codes and source maps of a dataset or folder to disk; resumable.")
    sub.add_argument("--tokenizer", default=TINY)
    sub.add_argument("--folder", help="image folder; sub-folders are classes")
    sub.add_argument("--tfds", help="a prepared TFDS dataset, such as mini_scenes/64")
    sub.add_argument("--split", default="train")
    sub.add_argument("--data-dir", default="data")
    sub.add_argument("--keep", type=int, help="kept tokens K")
    sub.add_argument("--batch-size", type=int, default=32)
    sub.add_argument("--shard-size", type=int, default=4096, help="images in one file")
    sub.add_argument("--out", type=Path, required=True)

    sub = line.command("inspect", _inspect, "Parameters, FLOPs and memory of a config or preset, without weights.")
    sub.add_argument("--config", help="configs/FILE.py:ARGUMENT")
    sub.add_argument("--preset", help="a preset's name instead of a config")
    sub.add_argument("--batch-size", type=int, help="for a preset (default 1); a config has its own")
    sub.add_argument("--compile", action="store_true", help="also compile and ask the compiler for its memory (slow)")

    sub = line.command(
        "convert", _convert, "Turn a released stage-1 checkpoint (as .safetensors) into a tokenizer's folder."
    )
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("--preset", required=True, help="the architecture it was trained with")
    sub.add_argument("--last-weights", action="store_true", help="take the last weights instead of the moving averages")
    sub.add_argument("--out", type=Path, required=True)
    return line


def _train(args, overrides) -> int:
    from runtime_jax import config as config_lib

    fields = config_lib.load(args.config, overrides, new_keys=True)
    task = fields.get("task", "tokenizer")
    if task == "tokenizer":
        from mergevq_jax.tokenizer.run import TrainConfig, train
    elif task == "generator":
        from mergevq_jax.generator.run import TrainConfig, train
    else:
        raise ValueError(f"{args.config}: task={task!r}, allowed are 'tokenizer' and 'generator'")
    trained = train(config_lib.build(TrainConfig, fields), args.workdir)
    return report_end(f"the {task} is in {trained.folder}", trained.stopped_by, trained.step)


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


def _compare(args, _) -> None:
    from mergevq_jax.evaluate.compare import compare
    from runtime_jax.judge import Judge

    if short := [row[0] for row in args.row if len(row) < 2]:
        raise ValueError(f"--row {short[0]}: a name and at least one folder are needed")
    rows = [(name, [Path(folder) for folder in folders]) for name, *folders in args.row]
    judge = Judge.load(args.judge) if args.judge else Judge.load()
    compare(rows, out=args.out, data_dir=args.data_dir, judge=judge, tokenizer=args.tokenizer, keeps=args.keep)


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
    from mergevq_jax.tokenizer.run import TrainConfig
    from runtime_jax import config as config_lib

    if bool(args.config) == bool(args.preset):
        raise ValueError("give exactly one of --config and --preset")
    if args.config:
        config = config_lib.build(TrainConfig, config_lib.load(args.config, overrides, new_keys=True))
        print(inspect_config(config, compile=args.compile))
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
