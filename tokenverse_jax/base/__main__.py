"""How well a tiny base follows captions: python -m tokenverse_jax.base evaluate."""

import argparse
import sys
from pathlib import Path

from runtime_jax.cli import CommandLine


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    line = CommandLine("python -m tokenverse_jax.base", __doc__)
    parser = line.command("evaluate", _evaluate, "Draw held-out captions, have the judge check the images, as a table.")
    parser.add_argument("--model", default="tiny", help="the pipeline's folder (default: the shipped one, tiny)")
    parser.add_argument("--num", type=int, default=256, help="captions")
    parser.add_argument("--cfg-scale", type=float, help="default: the model's own")
    parser.add_argument(
        "--reads", choices=["both", "clip", "t5"], default="both", help="encoders that get the captions"
    )
    parser.add_argument("--objects", type=int, choices=[1, 2], help="in each caption (default: either)")
    parser.add_argument("--out", type=Path, default=Path("runs/base_report"), help="for follows.md and follows.png")
    return line.main(argv)


def _evaluate(args: argparse.Namespace, _: list[str]) -> None:
    from dataclasses import replace

    from runtime_jax.workdir import check_output
    from tokenverse_jax.base.report import report
    from tokenverse_jax.flux.pipeline import Pipeline

    if args.num < 1:
        raise ValueError(f"--num {args.num}: at least 1")
    check_output(args.out)
    pipeline = Pipeline.from_pretrained(args.model)
    usual = pipeline.usual if args.cfg_scale is None else replace(pipeline.usual, cfg_scale=args.cfg_scale)
    settings = {"count": args.num, "sampling": usual, "reads": args.reads, "objects": args.objects}
    print(report(pipeline, args.out, **settings), end="")


if __name__ == "__main__":
    sys.exit(main())
