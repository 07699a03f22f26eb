"""The judge's command line: python -m mini_scenes.judge train | evaluate."""

import argparse
import sys
from pathlib import Path

from runtime_jax.cli import CommandLine, config_arguments, report_end


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    line = CommandLine("python -m mini_scenes.judge", __doc__)
    config_arguments(line.command("train", _train, "Train a judge on scenes rendered on the fly."))
    parser = line.command("evaluate", _evaluate, "Measure a judge on held-out scenes, clean and degraded.")
    parser.add_argument("--weights", type=Path, help="file of a judge; default: the shipped one")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/judge_report"), help="for summary.md and judge.png")
    return line.main(argv)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from mini_scenes.judge.run import WEIGHTS, TrainConfig, train
    from runtime_jax import config
    from runtime_jax.workdir import absolute

    result = train(config.build(TrainConfig, config.load(args.config, overrides, new_keys=True)), args.workdir)
    report_end(f"the judge is in {absolute(args.workdir) / WEIGHTS}", result.stopped_by, result.step)


def _evaluate(args: argparse.Namespace, _: list[str]) -> None:
    from mini_scenes.judge.judge import SHIPPED, Judge
    from mini_scenes.judge.report import report
    from runtime_jax.workdir import check_output

    if args.num_images < 1:
        raise ValueError(f"--num-images is {args.num_images}, it must be at least 1")
    check_output(args.out)
    report(Judge.load(args.weights or SHIPPED), args.num_images, args.out)


if __name__ == "__main__":
    sys.exit(main())
