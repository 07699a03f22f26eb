"""The command line: tokenverse generate | direction | learn | concepts | inspect | bench | evaluate | train-base |
scenes."""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mini_scenes import command
from runtime_jax.cli import CommandLine, config_arguments, path, report_end
from runtime_jax.files import is_file

TINY = "tiny"  # names the shipped model for a CPU
PIXELS_AT_ONCE = 256**2  # default total of the images that are sampled together
CONCEPTS = """\
A concept is given as TARGET=FILE[:WORD][@STRENGTH]:
  --concept doll=bank/doll.safetensors           the file's "doll", or its only word, on the prompt's "doll"
  --concept dawn=bank/street.safetensors:light   the file's "light" on the prompt's "dawn"
  --concept "circle#2=bank/a.safetensors@0.8"    on the prompt's second "circle", weakened
  --concept "a star=tiny-star"                   a shipped file
"""
EVALUATE = """\
For example:
  tokenverse evaluate runs/example --make-example
  tokenverse evaluate runs/example --out runs/evaluate
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one line and exit status 1."""
    # transformers misses torch, but its tokenizers, all that is used here, do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return _command_line().main(argv)


def _command_line() -> CommandLine:
    line = CommandLine("tokenverse", __doc__, advise=command.advise)
    command.add_command(line)

    sub = line.command("generate", _generate, "Images of a prompt with concepts on its words.", epilog=CONCEPTS)
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--concept", action="append", default=[], help="may be given several times; see below")
    sub.add_argument(
        "--mode",
        choices=("stored", "recomputed"),
        default="stored",
        help="directions from the files, or recomputed from the prompt (default: stored)",
    )
    sub.add_argument(
        "--compare",
        nargs="?",
        choices=("base", "each"),
        const="base",
        help="also draw the same images without concepts; each: and with each concept alone",
    )
    sub.add_argument("--num", type=int, default=4, help="images (default: 4)")
    _sampling_arguments(sub)
    sub.add_argument("--out", type=path, default=Path("runs/generate"))

    sub = line.command(
        "direction",
        _direction,
        "Change an attribute without training, on the whole image (M) or on one word (M+).",
        epilog='For example: --prompt "a dog and a cat" --word dog --attribute "a poodle dog" --neutral "a dog"',
    )
    sub.add_argument("--prompt", required=True, help="what to draw; need not name the attribute")
    sub.add_argument("--word", required=True, help="of the prompt; dog#2 is its second dog")
    sub.add_argument("--attribute", required=True, help="a prompt with the attribute")
    sub.add_argument("--neutral", required=True, help="the same prompt without it")
    sub.add_argument("--strength", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0])
    _sampling_arguments(sub)
    sub.add_argument("--out", type=path, default=Path("runs/direction"))

    sub = line.command(
        "learn", _learn, "Learn an image's concepts, or resume; any config value: --config.a.b=value.", several=True
    )
    config_arguments(sub)

    sub = line.command("concepts", _concepts, "List concept files.")
    sub.add_argument("action", choices=("inspect",), help="a table, and a warning where two words would blend")
    sub.add_argument("files", nargs="+", type=path, help="or names of shipped ones")
    _model_arguments(
        sub, default=None, help="base model, to compare attention keys (default: the one named in the files)"
    )

    sub = line.command("inspect", _inspect, "Sizes of a model and of learning on it, without weights.")
    sub.add_argument("--model", default="dev", help="dev, schnell, or a folder (default: dev)")
    sub.add_argument("--size", type=int, nargs="+", default=[512, 1024], help="image sides in pixels")
    sub.add_argument("--batch-size", type=int, default=1, help="of learning")

    sub = line.command("bench", _bench, "Learn, draw and measure concepts on mini_scenes, or resume.")
    config_arguments(sub)

    sub = line.command(
        "evaluate",
        _evaluate,
        "Learn, draw and score concepts on a folder in DreamBench++'s layout, or resume.",
        epilog=EVALUATE,
        several=True,
    )
    sub.add_argument("benchmark", help="folder with images/ and captions/")
    sub.add_argument("--out", type=path, default=Path("runs/evaluate"))
    sub.add_argument(
        "--config",
        default="tokenverse_tiny",
        help="of `learn`: base model, size, sampling, and how concepts are learned (default: tokenverse_tiny)",
    )
    sub.add_argument("--concepts", help="folder of concept files, such as OUT/concepts of another run; learns nothing")
    sub.add_argument("--mode", choices=("stored", "recomputed"), default="stored", help="see generate")
    sub.add_argument("--strength", type=float, default=1.0, help="of all concepts; 0 draws the prompts alone")
    sub.add_argument("--num", type=int, default=1, help="images of each prompt (default: 1)")
    sub.add_argument("--batch-size", type=int, help="images at once (default: 16 of 64 px, 1 of 256 px or more)")
    sub.add_argument("--clip", help="weights for CLIP-I and CLIP-T: folder or hub id in transformers' layout")
    sub.add_argument("--dino", help="the same for DINO or DINOv2")
    sub.add_argument("--no-scores", action="store_true", help="no figures, not even mini_scenes' judge's")
    sub.add_argument("--answers", nargs="+", default=[], help="JSONL files of an outside judge's answers")
    sub.add_argument("--make-example", action="store_true", help="only write a small benchmark of mini_scenes there")

    sub = line.command(
        "train-base", _train_base, "Train the tiny FLUX pipeline on mini_scenes, or resume.", several=True
    )
    config_arguments(sub)
    return line


def _model_arguments(parser: argparse.ArgumentParser, *, default: str | None, help: str) -> None:
    parser.add_argument("--model", default=default, help=help)
    parser.add_argument(
        "--transformer", type=Path, help="file of its weights in FLUX's own layout, instead of the folder's"
    )
    parser.add_argument("--vae", type=Path, help="the same for the autoencoder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPUs, bfloat16 on accelerators"
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "xla", "cudnn", "tpu_flash"),
        default="auto",
        help="default: auto, the platform's kernel for long sequences",
    )


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(
        parser,
        default=TINY,
        help="folder in diffusers' layout, hub id, or tiny, a shipped model for a CPU (default: tiny)",
    )
    parser.add_argument("--width", type=int, help="pixels (default: the model's own; 1024 for FLUX.1)")
    parser.add_argument("--height", type=int, help="as --width")
    parser.add_argument("--num-steps", type=int, help="default: the model's own; 28 for FLUX.1-dev, 4 for schnell")
    parser.add_argument("--guidance", type=float, help="for guidance-distilled models (default: 3.5)")
    parser.add_argument("--cfg-scale", type=float, help="true guidance; 1 is none (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, help="images at once (default: 16 of 64 px, 1 of 256 px or more)")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share each weight (default: 1)")


def _loader(args, model: str, mesh: Any = None) -> Any:
    import jax

    from runtime_jax.nn.compute import Compute
    from tokenverse_jax.flux.pipeline import Loader

    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    compute = Compute(dtype=dtype, attention=args.attention)
    return Loader(model, transformer=args.transformer, vae=args.vae, dtype=dtype, compute=compute, mesh=mesh)


@contextlib.contextmanager
def _sampler(args) -> Iterator[tuple[Any, Any]]:
    """Loader and sampling, on a mesh of `--tensor` devices."""
    import jax

    from runtime_jax.mesh import MeshConfig, make_mesh
    from tokenverse_jax.concepts.draw import Sampling

    mesh = make_mesh(MeshConfig(data=1, tensor=args.tensor), devices=jax.devices()[: args.tensor])
    load = _loader(args, args.model, mesh)
    names = ("width", "height", "num_steps", "guidance", "cfg_scale", "batch_size", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    values = load().usual.arguments(**given)
    values.setdefault("batch_size", max(1, PIXELS_AT_ONCE // max(1, values["width"] * values["height"])))
    with jax.set_mesh(mesh):
        yield load, Sampling(**values)


def _generate(args, _) -> None:
    from runtime_jax.workdir import check_output
    from tokenverse_jax.commands.generate import generate
    from tokenverse_jax.concepts.compose import parse_request

    requests = [parse_request(text) for text in args.concept]
    for request in requests:
        if not is_file(path(request.path)):  # loading a model takes a while
            raise ValueError(f"{request.path}: no such concept file")
    check_output(args.out)
    settings = {"num": args.num, "mode": args.mode, "compare": args.compare, "out": args.out}
    with _sampler(args) as (load, sampling):
        generate(load, args.prompt, requests, sampling, **settings)
    print(f"the images are in {args.out}; all of them: {args.out / 'overview.png'}")


def _direction(args, _) -> None:
    from runtime_jax.workdir import check_output
    from tokenverse_jax.commands import direction as study

    check_output(args.out)
    prompts = {"attribute": args.attribute, "neutral": args.neutral}
    with _sampler(args) as (load, sampling):
        result = study.study(load, args.prompt, args.word, **prompts, strengths=args.strength, sampling=sampling)
    print("\n".join(study.write(result, args.word, args.strength, args.out)))
    print(f"the images are in {args.out}; all of them: {args.out / 'directions.png'}")


def _build(cls: type, args, overrides: list[str]):
    from runtime_jax import config as config_lib

    fields = config_lib.load(args.config, overrides, new_keys=True)
    return config_lib.build(cls, fields, what=f"tokenverse {args.command}")


def _learn(args, overrides) -> None:
    from runtime_jax.workdir import absolute
    from tokenverse_jax.commands.learn import LearnRunConfig, learn

    config = _build(LearnRunConfig, args, overrides)
    result = learn(config, args.workdir)
    files = ", ".join(str(absolute(args.workdir) / name) for name in config.files())
    report_end(f"the concepts are in {files}", result.stopped_by, result.step)


def _concepts(args, _) -> None:
    from tokenverse_jax.commands.concepts import inspect_bank
    from tokenverse_jax.concepts.pretrained import SHIPPED

    files = [SHIPPED.get(str(file), file) for file in args.files]
    print(inspect_bank(files, functools.partial(_loader, args), args.model))


def _inspect(args, _) -> None:
    from tokenverse_jax.commands.inspect import inspect
    from tokenverse_jax.concepts.isolation import IsolationConfig
    from tokenverse_jax.concepts.learn import LearnConfig

    learn = LearnConfig(isolation=IsolationConfig(captions=("a picture",)), batch_size=args.batch_size)
    print(inspect(args.model, args.size, learn))


def _bench(args, overrides) -> None:
    from tokenverse_jax.bench.run import BenchConfig, bench

    print(f"the report is in {bench(_build(BenchConfig, args, overrides), args.workdir)}")


def _evaluate(args, overrides) -> None:
    from tokenverse_jax.commands.evaluate import EvaluateConfig, evaluate
    from tokenverse_jax.commands.learn import LearnRunConfig
    from tokenverse_jax.evaluate.example import write_example

    if args.make_example:
        write_example(args.benchmark)
        print(f"the example is in {args.benchmark}")
        return
    names = ("benchmark", "concepts", "mode", "strength", "num", "batch_size", "clip", "dino")
    config = EvaluateConfig(
        **{name: getattr(args, name) for name in names}, scores=not args.no_scores, answers=tuple(args.answers)
    )
    if table := evaluate(config, _build(LearnRunConfig, args, overrides), args.out):
        print(table)
    print(f"table.md, results.json, images.png and requests.jsonl are in {args.out}")


def _train_base(args, overrides) -> None:
    from runtime_jax.workdir import absolute
    from tokenverse_jax.base.run import FOLDER, BaseConfig, train

    result = train(_build(BaseConfig, args, overrides), args.workdir)
    report_end(f"the model is in {absolute(args.workdir) / FOLDER}", result.stopped_by, result.step)


if __name__ == "__main__":
    sys.exit(main())
