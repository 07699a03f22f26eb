"""How `mergevq evaluate representation` measures features.

mergevq evaluate representation --config representation              # a few thousand small images
mergevq evaluate representation --config representation:imagenet ... # the published protocol
"""

from ml_collections import ConfigDict


def get_config(arg: str = "small") -> ConfigDict:
    """`small`: 90 epochs in batches of 128 at 1e-2; `imagenet`: in batches of 1024 at 1e-3."""
    knn = {"k": 20, "temperature": 0.07}
    if arg == "small":
        linear = {"epochs": 90, "batch_size": 128, "learning_rate": 1e-2}
        tuning = {"epochs": 20, "batch_size": 128, "crop_area": [0.5, 1.0]}
    elif arg == "imagenet":
        linear = {"epochs": 90, "batch_size": 1024}
        tuning = {"epochs": 100, "batch_size": 1024}
    else:
        raise ValueError(f"no variant {arg!r}; there are small, imagenet")
    return ConfigDict({"knn": knn, "linear": linear, "finetune": tuning})
