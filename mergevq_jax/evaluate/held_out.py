"""`mergevq evaluate`: tokenizers on held-out scenes and photographs, as a table and pictures on disk."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mergevq_jax.evaluate import report
from mergevq_jax.pretrained import load_tokenizer
from runtime_jax.data import DataConfig, SourceConfig, make_batches
from runtime_jax.pictures import image_grid, loss_curve, save_png


def held_out_images(size: int, data_dir: str, count: int) -> dict[str, np.ndarray]:
    """uint8 [count, size, size, 3] of scenes that no training run reads, and of regions of photographs held out of all.

    Raises:
      ValueError: mini_scenes of this size is not under data_dir.
    """
    sources = {
        "scenes": SourceConfig(kind="tfds", name=f"mini_scenes/{size}", split="test", data_dir=data_dir),
        "photographs": SourceConfig(kind="photos", split="held_out", crop_scale=(0.3, 1.0)),
    }
    images = {}
    for name, source in sources.items():
        number = count if name == "scenes" else max(1, count // 4)
        config = DataConfig(
            image_size=size,
            batch_size=min(32, number),
            sources=(source,),
            seed=1,
            shuffle=False,
            random_crop=name == "photographs",
        )
        batches = itertools.islice(make_batches(config, 0), -(-number // config.batch_size))
        images[name] = np.concatenate([batch["image"] for batch in batches])[:number]
    return images


def evaluate(
    tokenizers: Sequence[str],
    *,
    out: Path,
    data_dir: str,
    keeps: Sequence[int],
    num_images: int,
    metrics: str | None = None,
) -> None:
    """Writes summary.md, and reconstructions.png (and loss.png where `metrics` is a metrics.jsonl), and prints the table.

    Raises:
      ValueError: no such tokenizer, K not possible, dataset missing.
    """
    loaded = {name: load_tokenizer(name) for name in tokenizers}
    texts, pictures = [], []
    for name, tokenizer in loaded.items():
        for keep in keeps:
            tokenizer.config.merge_counts(tokenizer.config.raw_tokens, keep)
        images = held_out_images(tokenizer.config.resolution, data_dir, num_images)
        results = {kind: report.measure(tokenizer, pixels, keeps) for kind, pixels in images.items()}
        texts.append(f"### {name}\n\n{report.table(results)}")
        shown = np.concatenate([images["scenes"][:5], images["photographs"][:3]])
        pictures.append(report.picture(tokenizer, shown, keeps))
    text = "\n".join(texts)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.md").write_text(text)
    save_png(out / "reconstructions.png", image_grid([[picture] for picture in pictures], row_labels=list(loaded)))
    if metrics:
        loss_curve(metrics, out / "loss.png", names=("loss", "pixel"), title="training")
    print(f"summary.md and pictures are in {out}")
