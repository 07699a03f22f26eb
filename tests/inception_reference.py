"""InceptionV3 by torch-fidelity, on weights and images of ours; needs the extra `parity`."""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision_tools  # noqa: F401 (first)
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


@torch.no_grad()
def reference_features(weights: dict[str, np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """`InceptionOutput` by its names, of uint8 images [B, H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        bias = {"fc.bias": torch.ones(1008)}  # which logits must not contain
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()} | bias, path)
        network = FeatureExtractorInceptionV3("ours", ["2048", "logits_unbiased"], str(path))
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output[:, :7]))
    pooled, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    (maps,) = spatial
    return {
        "pooled": pooled.numpy(),
        "spatial": maps.permute(0, 2, 3, 1).reshape(len(images), -1).numpy(),
        "logits": logits.numpy(),
    }
