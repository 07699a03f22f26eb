"""Arguments that several commands have."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when a command runs
    from mergevq_jax.commands.sample import Request
    from runtime_jax.data import SourceConfig
    from runtime_jax.mesh import MeshConfig
    from runtime_jax.nn.compute import Compute

TINY, TINY_GENERATOR = "tiny", "tiny-mergear"  # names of what is shipped with the package
SAMPLING = (  # what `sampling_arguments` adds, but for the size of batches
    "tokenizer",
    "classes",
    "keep",
    "cfg_schedule",
    "cfg_interval",
    "cfg_power",
    "temperature",
    "top_k",
    "top_p",
    "greedy",
    "window",
    "capacity",
    "policy",
    "steps",
    "seed",
    "dtype",
    "tensor",
)
ONE_OR_EACH: dict[str, Any] = {"nargs": "+", "metavar": "VALUE"}  # one value, or one for each sub-token


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


def sampling_arguments(parser: ArgumentParser) -> None:
    """How a generator draws, without --cfg-scale; `SAMPLING` names them."""
    parser.add_argument("--tokenizer", help="the generator's tokenizer, if that has moved since training")
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        help="a class by name, or by number unless the names are numbers; several take turns (default: all)",
    )
    parser.add_argument(
        "--keep", "--merge-number", type=int, help="distinct tokens K (default: the middle one it knows)"
    )
    parser.add_argument("--cfg-schedule", default="constant", help="constant, linear, interval or power-cosine")
    parser.add_argument(
        "--cfg-interval", type=float, nargs=2, default=[0.0, 1.0], help="part of the sequence, for interval"
    )
    parser.add_argument("--cfg-power", type=float, default=1.0, help="for power-cosine: the higher, the later it rises")
    parser.add_argument("--temperature", type=float, default=[1.0], **ONE_OR_EACH)
    parser.add_argument("--top-k", type=int, default=[0], help="0: off", **ONE_OR_EACH)
    parser.add_argument("--top-p", type=float, default=[1.0], help="1: off", **ONE_OR_EACH)
    parser.add_argument("--greedy", action="store_true", help="always the likeliest code")
    parser.add_argument("--window", type=int, help="recent tokens that are always seen (default: as in training)")
    parser.add_argument("--capacity", type=int, help="older tokens that the KV cache keeps (default: K)")
    parser.add_argument("--policy", default="evict-oldest", help="what a full KV cache evicts: evict-oldest or full")
    parser.add_argument("--steps", type=int, help="calls of the network, for RandAR (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch; no result depends on it")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="devices that share each weight (default: 1); the rest split batches",
    )


def given(args: Namespace, defaults: Mapping[str, Any]) -> list[str]:
    """The arguments among `defaults` that have another value."""
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]


def one_or_each(values: Sequence[Any]) -> Any:
    """The value of an `ONE_OR_EACH` argument: a number, or a tuple with one for each sub-token."""
    return values[0] if len(values) == 1 else tuple(values)


def request_of(args: Namespace, num: int, cfg_scale: float | tuple[float, ...]) -> "Request":
    """What `sampling_arguments` ask for."""
    from mergevq_jax.commands.sample import Request
    from mergevq_jax.generator.sampling.plan import SamplingConfig

    sampling = SamplingConfig(
        cfg_scale=cfg_scale,
        cfg_schedule=args.cfg_schedule,
        cfg_interval=tuple(args.cfg_interval),
        cfg_power=args.cfg_power,
        **{name: one_or_each(getattr(args, name)) for name in ("temperature", "top_k", "top_p")},
        greedy=args.greedy,
        window=args.window,
        capacity=args.capacity,
        policy=args.policy,
    )
    return Request(
        num=num,
        classes=tuple(args.classes or ()),
        keep=args.keep,
        sampling=sampling,
        steps=args.steps,
        seed=args.seed,
        batch_size=min(args.batch_size, max(1, num)),
    )


def compute_of(args: Namespace) -> "Compute":
    """--dtype."""
    from runtime_jax.nn.compute import Compute

    return Compute(dtype=args.dtype)


def mesh_of(args: Namespace) -> "MeshConfig":
    """--tensor."""
    from runtime_jax.mesh import MeshConfig

    return MeshConfig(tensor=args.tensor)
