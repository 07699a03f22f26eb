"""Makes torchvision for GPUs importable beside PyTorch for CPUs: import this before what imports torchvision."""

try:
    import torchvision
except RuntimeError:
    # Its own library cannot be loaded there, and declares these operators, which nothing here calls.
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
