"""The start of a run on a large folder of images: seconds and memory, without an index and with one.

    python benchmarks/folder.py --images 200000 --classes 1000

Makes the folder (each image is a file of its own, with a small JPEG of one of 64 noise patterns), opens it in a new
process for each row, and removes it.
"""

import argparse
import io
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from runtime_jax.data import SourceConfig, open_source
from runtime_jax.data.listing import INDEX_FOLDER, SETTLED


def make_folder(root: Path, images: int, classes: int) -> None:
    """Writes `images` JPEGs of 16 x 16 pixels into `classes` sub-folders."""
    rng, blobs = np.random.default_rng(0), []
    for _ in range(64):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "JPEG")
        blobs.append(buffer.getvalue())
    for number in range(images):
        folder = root / f"n{number % classes:08d}"
        if number < classes:
            folder.mkdir()
        (folder / f"{folder.name}_{number}.JPEG").write_bytes(blobs[number % len(blobs)])


def start(root: str) -> tuple[float, float]:
    """Opens the folder; returns seconds, and MB that the process has gained."""
    open_source(SourceConfig(kind="photos", split="train"))[0]  # imports what decoding needs
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    open_source(SourceConfig(kind="folder", path=root))
    seconds = time.perf_counter() - started
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="starts with an index")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        started = time.perf_counter()
        make_folder(root, args.images, args.classes)
        print(f"{args.images} images in {args.classes} folders, written in {time.perf_counter() - started:.0f} s\n")
        time.sleep(2 * SETTLED)
        context = multiprocessing.get_context("spawn")
        print("| start | s | MB |\n| --- | --- | --- |")
        names = ["first", *["with the index"] * args.repeats, "after a change"]
        for name in names:
            if name == "after a change":
                next(root.glob("*/*.JPEG")).unlink()
            with context.Pool(1) as pool:
                seconds, megabytes = pool.apply(start, (str(root),))
            print(f"| {name} | {seconds:.2f} | {megabytes:.0f} |", flush=True)
        index = root / INDEX_FOLDER / "index.safetensors"
        print(f"\nindex: {index.stat().st_size / 2**20:.1f} MB")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
