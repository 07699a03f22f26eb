"""These tests compare with the reference implementations: they are collected where the extra `parity` is installed."""

import importlib.util

REFERENCES = ("diffusers", "lpips", "skimage", "torch_fidelity")
if all(map(importlib.util.find_spec, REFERENCES)):
    import torchvision_tools  # noqa: F401 (before what imports torchvision)
else:
    collect_ignore_glob = ["test_*.py"]
