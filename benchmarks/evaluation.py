"""What `mergevq evaluate reconstruction` costs beyond the networks: reading, PSNR, SSIM, digests, parts on disk.

python benchmarks/evaluation.py                          # CPU: G+R-d64, 256 px, random weights
python benchmarks/evaluation.py --batch-size 64 --images 2048 --features judge inception    # GPU, TPU

Times the same compiled programs twice in one run: alone, on a batch that is on the device, and under the command's
engine, which reads 500 x 375 JPEGs from a folder. On a shared CPU, trust the ratio in processor time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mergevq_jax.commands.evaluate.reconstruction_task import Networks, task_of
from mergevq_jax.evaluate.features import FeatureNetwork, Features, load_feature_network
from mergevq_jax.evaluate.images import SourceImages
from mergevq_jax.evaluate.parts import measure
from mergevq_jax.tokenizer.config import PRESETS
from mergevq_jax.tokenizer.model import Tokenizer, param_shapes
from runtime_jax.cost import table
from runtime_jax.data import SourceConfig
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks import inception
from runtime_jax.prng import key_shape
from runtime_jax.sharding import replicate
from runtime_jax.training.stop import Stop


def random_like(shapes: Any) -> Any:
    """Small random float32 leaves; variances are one."""
    rng = np.random.default_rng(0)

    def leaf_of(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.tree_util.keystr(path[-1:], simple=True) == "var":
            return jnp.ones(leaf.shape)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(leaf_of, shapes)


def network_of(name: str) -> FeatureNetwork:
    """The judge, or Inception with random weights."""
    if name == "judge":
        return load_feature_network(name)
    model = inception.InceptionV3()
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    params = random_like(jax.eval_shape(model.init, key_shape(), images)["params"])

    def compute(params, images):
        return Features(*model.apply({"params": params}, inception.resize(images)))

    return FeatureNetwork(name, "random", "bilinear to 299 x 299", params, compute)


def write_pictures(folder: Path, count: int) -> None:
    """Smooth JPEGs of ImageNet's typical size."""
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=90)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="gr-d64")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--features", nargs="+", default=["judge"], choices=["judge", "inception"])
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the best counts")
    args = parser.parse_args()
    config, mesh = PRESETS[args.preset], make_mesh(MeshConfig(), jax.local_devices())
    tokenizer = Tokenizer(config, replicate(random_like(param_shapes(config)), mesh))
    networks = Networks([network_of(name) for name in args.features], None)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh), Stop() as stop:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        write_pictures(pictures, args.images)
        images = SourceImages(SourceConfig(kind="folder", path=str(pictures)), config.resolution)
        task = task_of("task", tokenizer, images, (config.keep,), networks, args.batch_size, mesh)
        rows = range(task.batch_size)
        batch = images.read(rows)
        jax.block_until_ready(task.start(rows, batch))  # compiles

        def alone() -> None:
            for _ in range(0, args.images, task.batch_size):
                jax.block_until_ready(task.start(rows, batch))

        def whole(number: int) -> None:
            measure(task, Path(folder) / str(number), stop)

        runs = [(timed(alone), timed(lambda number=number: whole(number))) for number in range(args.repeats)]
    device = jax.devices()[0]
    print(f"\n{args.preset}, {config.resolution} px, {args.images} images in batches of {task.batch_size}, ", end="")
    print(f"features of {' and '.join(args.features)}, {device.device_kind} ({device.platform})\n")
    lines = []
    for clock, name in enumerate(("wall-clock", "processor")):
        networks_alone, evaluated = (min(run[what][clock] for run in runs) / args.images for what in (0, 1))
        lines.append((name, f"{networks_alone:.3f}", f"{evaluated:.3f}", f"{evaluated / networks_alone - 1:.1%}"))
    print("\n".join(table(("clock", "networks alone, s / image", "evaluation, s / image", "overhead"), lines)))


if __name__ == "__main__":
    main()
