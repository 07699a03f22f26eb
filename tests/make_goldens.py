"""Makes golden files: random weights and inputs, and what reference implementations give for them.

    pip install -e '.[parity]'
    python tests/make_goldens.py --out FOLDER            # all of them
    python tests/make_goldens.py --out FOLDER dinov2     # by name
    python tests/check_golden.py FOLDER/*.safetensors

A file has the form that check_golden.py describes. No parameter keeps its initial value, so that one which is forgotten
or mixed up in the conversion shows in the outputs.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

Tensors = dict[str, torch.Tensor]


class Golden(NamedTuple):
    """What goes into one file: the reference constructor's arguments, its state dict, inputs and outputs."""

    config: dict[str, Any]
    params: Tensors
    inputs: Tensors
    outputs: Tensors


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    """Normal values, float32; NumPy's, because PyTorch's may differ between versions and machines."""
    return torch.from_numpy(mean + scale * rng.normal(size=shape)).float()


def randomise(model: torch.nn.Module, rng: np.random.Generator) -> Tensors:
    """Gives every parameter a random value of a size at which all layers matter; returns the state dict."""
    values = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if name.endswith("bias"):
            values[name] = normal(rng, *shape, scale=0.1)
        elif len(shape) == 1:  # scales of norms and LayerScale
            values[name] = normal(rng, *shape, scale=0.2, mean=1.0)
        elif name.endswith("weight"):
            values[name] = normal(rng, *shape, scale=float(np.prod(shape[1:])) ** -0.5)
        else:  # tokens and position embeddings
            values[name] = normal(rng, *shape, scale=0.5)
    model.load_state_dict(values, strict=False)  # without the buffers
    return model.state_dict()


def dinov2(rng: np.random.Generator) -> Golden:
    """Three layers, on images of another size than the position embeddings': these are interpolated."""
    from transformers import Dinov2Config, Dinov2Model

    config = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 4,
        "image_size": 28,
        "patch_size": 7,
        "num_channels": 3,
    }
    model = Dinov2Model(Dinov2Config(**config)).eval()
    params, images = randomise(model, rng), normal(rng, 2, 3, 42, 42)
    output = model(pixel_values=images)
    outputs = {"hidden": output.last_hidden_state, "pooled": output.pooler_output}
    return Golden(config, params, {"x": images}, outputs)


# By the name of the file, which tells check_golden.py the module.
MAKERS: dict[str, Callable[[np.random.Generator], Golden]] = {
    "dinov2": dinov2,
}


@torch.no_grad()
def make(name: str, folder: Path, seed: int) -> Path:
    """Writes `folder/<name>.safetensors`; the file depends on the name and the seed alone."""
    golden = MAKERS[name](np.random.default_rng(seed))
    kinds = {"param": golden.params, "in": golden.inputs, "out": golden.outputs}
    tensors = {
        f"{kind}/{key}": np.ascontiguousarray(tensor.numpy())
        for kind, part in kinds.items()
        for key, tensor in part.items()
    }
    path = folder / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"config": json.dumps(golden.config)})
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(sorted(MAKERS))} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - MAKERS.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(sorted(MAKERS))}")
    for name in args.names or MAKERS:
        print(make(name, args.out, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
