"""`mergevq evaluate reconstruction`: tokenizers on held-out scenes and photographs, as a table and pictures."""

import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from mergevq_jax.evaluate.held_out import BATCH_SIZE, held_out_photographs, held_out_scenes
from mergevq_jax.tokenizer import report
from mergevq_jax.tokenizer.model import load_tokenizer, read_tokenizer_config
from runtime_jax import hosts
from runtime_jax.files import AnyPath, is_file, path_of, write_text
from runtime_jax.pictures import image_grid, loss_curve, save_png
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import only_writer


def evaluate(
    tokenizers: Sequence[str],
    *,
    out: AnyPath,
    data_dir: str,
    keeps: Sequence[int],
    num_images: int,
    metrics: str | None = None,
) -> None:
    """Prints a table; writes it as summary.md, reconstructions.png, and loss.png where `metrics` is a metrics.jsonl.

    Several processes share the batches; process 0 writes.

    Raises:
      ValueError: no such tokenizer, dataset or `metrics` file, an impossible K, no images; before weights are loaded.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: features or pixels that are not finite.
      StoppedError: by a signal; nothing is written.
    """
    if num_images < 1:
        raise ValueError(f"--num-images {num_images}: at least 1")
    if metrics and not is_file(path_of(metrics)):
        raise ValueError(f"--metrics {metrics}: no such file")
    with only_writer(out), Stop() as stop:
        configs = {name: read_tokenizer_config(name) for name in tokenizers}
        for config in configs.values():
            for keep in keeps:
                config.merge_counts(config.raw_tokens, keep)
        held_out = {
            size: {
                "scenes": held_out_scenes(size, num_images, data_dir),
                "photographs": held_out_photographs(size, max(1, num_images // 4)),
            }
            for size in sorted({config.resolution for config in configs.values()})
        }
        pixels = [images.tobytes() for kinds in held_out.values() for images in kinds.values()]
        hosts.check_same("the held-out images", hashlib.sha256(b"".join(pixels)).hexdigest())
        texts, pictures = [], []
        for name, config in configs.items():
            tokenizer, images = load_tokenizer(name), held_out[config.resolution]
            hosts.check_same(f"tokenizer {name}", tokenizer.fingerprint())
            results = {
                # The crops of two photographs overlap, so an interval for independent images would be too narrow.
                kind: report.measure(
                    tokenizer, pixels, keeps, batch_size=BATCH_SIZE, independent=kind == "scenes", stop=stop
                )
                for kind, pixels in images.items()
            }
            texts.append(f"### {name}\n\n{report.table(results)}")
            shown = np.concatenate([images["scenes"][:5], images["photographs"][:3]])
            pictures.append(report.picture(tokenizer, shown, keeps, batch_size=BATCH_SIZE))
        text = "\n".join(texts)
        print(text)
        if jax.process_index() > 0:
            return
        write_text(out / "summary.md", text)
        save_png(out / "reconstructions.png", image_grid([[picture] for picture in pictures], row_labels=list(configs)))
        if metrics:
            loss_curve(metrics, out / "loss.png", names=("loss", "pixel"), title="training")
        print(f"summary.md and pictures are in {out}")
