"""The command line: scenes, train, evaluate, compare, reconstruct, tokenize, sample, bench-input, inspect, convert."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mergevq_jax.commands import evaluate
from mergevq_jax.commands.arguments import (
    ONE_OR_EACH,
    TINY,
    TINY_GENERATOR,
    compute_of,
    mesh_of,
    one_or_each,
    request_of,
    sampling_arguments,
    source_arguments,
    source_of,
)
from mini_scenes import command
from runtime_jax.cli import CommandLine, config_arguments, path, report_end


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can fix are one line and exit status 1."""
    return _command_line().main(argv)


def _command_line() -> CommandLine:
    line = CommandLine("mergevq", __doc__, advise=command.advise)
    command.add_command(line)

    sub = line.command(
        "train", _train, "Start or resume training; any config value can be set: --config.a.b=value.", several=True
    )
    config_arguments(sub)

    evaluate.add_commands(line)

    sub = line.command("compare", _compare, "Compare generated scenes with each other and with real ones.")
    sub.add_argument(
        "--row",
        nargs="+",
        action="append",
        required=True,
        metavar="X",
        help="a name, and folders written by mergevq sample",
    )
    sub.add_argument("--tokenizer", help="also measure its reconstructions of real scenes")
    sub.add_argument("--keep", type=int, nargs="+", default=[64, 144, 256], help="kept tokens K of the reconstructions")
    sub.add_argument("--judge", type=path, help="weights of another judge (default: the shipped one)")
    sub.add_argument("--data-dir", default="data")
    sub.add_argument("--single", action="store_true", help="real scenes of one object: mini_scenes/64_single")
    sub.add_argument("--out", type=path, default=Path("runs/compare"))

    sub = line.command("reconstruct", _reconstruct, "Encode and decode pictures, with the merged groups outlined.")
    sub.add_argument("images", nargs="+", type=path, help="pictures, and folders of them")
    sub.add_argument("--tokenizer", default=TINY, help="folder or hub id (default: the shipped tiny one)")
    sub.add_argument("--keep", type=int, nargs="+", help="kept tokens K (default: 1/4, the model's share, all)")
    sub.add_argument("--size", type=int, help="pixels of the shorter side (default: the training size; 0: no resizing)")
    sub.add_argument("--out", type=path, default=Path("runs/reconstruct"))

    sub = line.command(
        "tokenize", _tokenize, "Write codes and source maps of a dataset or folder to disk; resumable.", several=True
    )
    sub.add_argument("--tokenizer", default=TINY)
    source_arguments(sub)
    sub.add_argument("--keep", type=int, help="kept tokens K")
    sub.add_argument("--batch-size", type=int, default=32)
    sub.add_argument("--shard-size", type=int, default=4096, help="images per file")
    sub.add_argument(
        "--views",
        default="one",
        choices=["one", "flip", "ten-crop"],
        help="write codes of the centre crop, also of its mirror image, or of ten crops",
    )
    sub.add_argument("--out", type=path, required=True)

    _sample_command(line)
    _bench_input_command(line)

    sub = line.command("inspect", _inspect, "Parameters, FLOPs and memory of a config or preset, without weights.")
    sub.add_argument("--config", help="NAME:ARGUMENT of a shipped config, or a path FILE.py:ARGUMENT")
    sub.add_argument("--preset", help="a preset's name instead of a config")
    sub.add_argument("--batch-size", type=int, help="for a preset (default 1); a config has its own")
    sub.add_argument("--compile", action="store_true", help="also compile and ask the compiler for its memory (slow)")

    sub = line.command("convert", _convert, "Turn a released checkpoint into a tokenizer's or generator's folder.")
    sub.add_argument("checkpoint", type=path)
    sub.add_argument("--stage", type=int, choices=(1, 2), default=1, help="1: tokenizer (default), 2: generator")
    sub.add_argument("--tokenizer", default=TINY, help="stage 2: the converted tokenizer whose codes it generates")
    sub.add_argument("--preset", required=True, help="the architecture it was trained with")
    sub.add_argument("--last-weights", action="store_true", help="take the last weights instead of the moving averages")
    sub.add_argument("--out", type=path, required=True)
    return line


def _sample_command(line: CommandLine) -> None:
    sub = line.command("sample", _sample, "Draw images of classes with a trained generator.", several=True)
    sub.add_argument("--model", default=TINY_GENERATOR, help="shipped name, folder or hub id of a generator")
    sub.add_argument("--num", type=int, default=64)
    sub.add_argument("--cfg-scale", type=float, default=[1.0], help="classifier-free guidance; 1: off", **ONE_OR_EACH)
    sampling_arguments(sub)
    sub.add_argument("--show-cache", action="store_true", help="also draw what the KV cache kept and how full it was")
    sub.add_argument("--out", type=path, default=Path("runs/sample"))


def _bench_input_command(line: CommandLine) -> None:
    help = "Images per second that a core reads, beside decoding alone, and the cores that a training needs."
    sub = line.command("bench-input", _bench_input, help)
    sub.add_argument("--config", help="a training, whose data are read (default: 256 px crops of synthetic JPEGs)")
    source_arguments(sub)
    sub.add_argument("--synthetic", action="store_true", help="with --config: synthetic JPEGs instead of its sources")
    sub.add_argument("--steps-per-second", type=float, help="rate of the training, to say how many cores feed it")
    sub.add_argument("--hosts", type=int, default=1, help="hosts that share each batch")
    sub.add_argument("--seconds", type=float, default=20.0, help="how long to measure")


def training(path: str, overrides: Sequence[str]):
    """What a config trains, as the TrainConfig of its task, and the task's name."""
    from runtime_jax import config as config_lib

    fields = config_lib.load(path, overrides, new_keys=True)
    task = fields.get("task", "tokenizer")
    if task == "tokenizer":
        from mergevq_jax.tokenizer.run import TrainConfig
    elif task == "generator":
        from mergevq_jax.generator.run import TrainConfig
    elif task == "teacher":
        from mergevq_jax.teacher.run import TrainConfig
    else:
        raise ValueError(f"{path}: task={task!r}, allowed are 'tokenizer', 'generator' and 'teacher'")
    return config_lib.build(TrainConfig, fields, what=f"mergevq train (task={task!r})"), task


def _train(args, overrides) -> None:
    from runtime_jax.workdir import absolute

    config, task = training(args.config, overrides)
    if task == "tokenizer":
        from mergevq_jax.tokenizer.run import train
    elif task == "generator":
        from mergevq_jax.generator.run import train
    else:
        from mergevq_jax.teacher.run import train
    result = train(config, args.workdir)
    report_end(f"the {task} is in {absolute(args.workdir) / task}", result.stopped_by, result.step)


def _compare(args, _) -> None:
    from mergevq_jax.commands.compare import compare
    from mini_scenes.judge import Judge
    from runtime_jax.workdir import check_output

    if short := [row[0] for row in args.row if len(row) < 2]:
        raise ValueError(f"--row {short[0]}: a name and at least one folder are needed")
    rows = [(name, [path(folder) for folder in folders]) for name, *folders in args.row]
    check_output(args.out)
    judge = Judge.load(args.judge) if args.judge else Judge.load()
    scenes = {"data_dir": args.data_dir, "single": args.single}
    compare(rows, out=args.out, **scenes, judge=judge, tokenizer=args.tokenizer, keeps=args.keep)


def _reconstruct(args, _) -> None:
    from mergevq_jax.commands.reconstruct import reconstruct

    reconstruct(args.images, args.tokenizer, keeps=args.keep, size=args.size, out=args.out)


def _tokenize(args, _) -> None:
    from mergevq_jax.commands.tokenize import tokenize

    source = source_of(args)
    if source is None:
        raise ValueError("give exactly one of --folder and --tfds")
    print(
        tokenize(
            source,
            args.tokenizer,
            args.out,
            keep=args.keep,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            views=args.views,
        )
    )


def _bench_input(args, overrides) -> None:
    from mergevq_jax.commands.bench_input import bench_input

    data = None
    if args.config:
        config, task = training(args.config, overrides)
        data = config.needed_data() if task == "tokenizer" else config.data
    rate = {"steps_per_second": args.steps_per_second, "hosts": args.hosts}
    print(bench_input(data, source_of(args), synthetic=args.synthetic, seconds=args.seconds, **rate))


def _sample(args, _) -> None:
    from mergevq_jax.commands.sample import sample

    request = request_of(args, args.num, one_or_each(args.cfg_scale))
    settings = {"tokenizer": args.tokenizer, "show_cache": args.show_cache}
    print(sample(args.model, request, out=args.out, compute=compute_of(args), mesh=mesh_of(args), **settings))


def _inspect(args, overrides) -> None:
    if bool(args.config) == bool(args.preset):
        raise ValueError("give exactly one of --config and --preset")
    if args.preset:
        from mergevq_jax.tokenizer.config import preset
        from mergevq_jax.tokenizer.inspect import inspect_model

        print(inspect_model(preset(args.preset), args.batch_size or 1, compile=args.compile))
        return
    config, task = training(args.config, overrides)
    if task == "tokenizer":
        from mergevq_jax.tokenizer.inspect import inspect_config as inspect
    elif task == "generator":
        from mergevq_jax.generator.inspect import inspect_generator as inspect
    else:
        from mergevq_jax.teacher.inspect import inspect_teacher as inspect
    print(inspect(config, compile=args.compile))


def _convert(args, _) -> None:
    if args.stage == 2:
        return _convert_generator(args)
    from mergevq_jax.tokenizer.config import preset
    from mergevq_jax.tokenizer.convert import from_released, tokenizer_table
    from mergevq_jax.tokenizer.model import Tokenizer, param_shapes
    from runtime_jax.weights import import_weights
    from runtime_jax.weights.hub import read_tensors
    from runtime_jax.workdir import check_output

    config = preset(args.preset)
    check_output(args.out)
    tensors = from_released(read_tensors(args.checkpoint), ema=not args.last_weights)
    if not any(name.startswith("recovery.") for name in tensors):
        from dataclasses import replace

        config = replace(config, recovery=None)  # the released checkpoints never trained one
    Tokenizer(config, import_weights(tokenizer_table(config), tensors, param_shapes(config))).save_pretrained(args.out)
    print(f"the tokenizer is in {args.out}")


def _convert_generator(args) -> None:
    from mergevq_jax.generator.config import preset
    from mergevq_jax.generator.model import import_released
    from runtime_jax.weights.hub import read_tensors
    from runtime_jax.workdir import check_output

    config = preset(args.preset, merge_instruction=False, zero_class_rope=True)
    check_output(args.out)
    import_released(config, read_tensors(args.checkpoint), args.tokenizer).save_pretrained(args.out)
    print(f"the generator is in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
