"""The paper's variants in miniature, and each without one part of the method: 64 px, 12 bits.

Scenes of one object take ImageNet's place: tokenizers train on the split of them that probes train on, without labels.

    mergevq scenes --probe
    mergevq train --config mergevq_ablation:gr --config.teacher=runs/teacher/teacher --workdir runs/gr
    python benchmarks/ablation.py --teacher runs/teacher/teacher          # trains and measures all, with several seeds

The argument is g, gr or r, or one of these and what it lacks: gr-unaligned, for example.
"""

from ml_collections import ConfigDict

from runtime_jax.config import load

# Kept shares are those of the paper's table 1: 1/4 of 256 raw tokens, 9/16 and 9/64 of 64.
G = {"levels": 3, "keeps": (64, 81, 100, 144), "isotropic": None, "alignment": 0.1, "source": 0.5}
GR = {"levels": 4, "keeps": (36, 25, 49, 64), "isotropic": None, "alignment": 1.0, "source": 0.5}
R = {"levels": 4, "keeps": (9, 16, 25, 36), "isotropic": 64, "alignment": 1.0, "source": 1.0}
SIZES = {"g": G, "gr": GR, "r": R}
LACKS = {
    "unaligned": {"losses.alignment_weight": 0.0},
    "fixed": {},  # one K in training, the first of `keeps`
    "unmerged": {},  # K = L, all raw tokens
    "unplaced": {"model.recovery.positions": "none", "model.recovery.num_layers": 2},  # the released source recovery
}
STEPS = 1500
SCENES = "mini_scenes/64_probe"


def get_config(arg: str = "gr") -> ConfigDict:
    """`arg`: a size, or a size and what it lacks, joined by a hyphen."""
    size, _, lack = arg.partition("-")
    if size not in SIZES or (lack and lack not in LACKS):
        known = f"{', '.join(SIZES)}, each alone or with -{', -'.join(LACKS)}"
        raise ValueError(f"no variant {arg!r}; there are {known}")
    values = SIZES[size]
    levels, keeps = values["levels"], values["keeps"]
    if lack == "fixed":
        keeps = keeps[:1]
    config = load("mergevq_tiny")
    raw = (config.model.resolution // 2 ** (levels - 1)) ** 2
    if lack == "unmerged":
        keeps = (raw,)
    config.model.update(
        {
            "ch_mult": (1,) * levels,
            "num_res_blocks": (0,) * (levels - 1) + (1,),
            "num_att_blocks": 4,
            "isotropic": values["isotropic"],
            "keep": keeps[0],
            "dist_head": "layer3",
            "num_classes": 64,  # the teacher's width
        }
    )
    config.losses.update(
        {
            "alignment_weight": values["alignment"],
            "alignment_size": config.model.resolution,
            "source_weight": values["source"],
            "discriminator_start": 3 * STEPS // 4,
        }
    )
    config.teacher = None
    config.merge_ratio = {"keeps": keeps, "weights": tuple(1.0 / len(keeps) for _ in keeps)}
    config.optimizer.warmup.steps = STEPS // 30
    config.data.batch_size = 16
    config.data.sources = [{"kind": "tfds", "name": SCENES, "split": "train"}]
    config.evaluation.data.sources = [{"kind": "tfds", "name": SCENES, "split": "test"}]
    crop = {"area": [0.4, 1.0]}
    config.data.views = [
        {"name": "teacher", "image_size": 64, "resized_crop": crop, "flip": True},
        {"name": "student", "image_size": 64, "resized_crop": crop, "flip": True},
    ]
    config.evaluation.keeps = tuple(sorted({*keeps, raw} if lack == "unmerged" else {*values["keeps"], raw}))
    config.loop.update({"duration": {"steps": STEPS}, "eval_every": STEPS, "preview_every": STEPS})
    config.update_from_flattened_dict(LACKS.get(lack, {}))
    return config
