"""Writes the PyTorch files that tests/unit/test_pickled.py reads: one state dict in both formats.

.venv-parity/bin/python tests/make_pickled.py --out tests/pickled
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    out = parser.parse_args().out
    random = torch.Generator().manual_seed(0)
    base = torch.arange(24.0).reshape(4, 6)
    tensors = OrderedDict(
        weight=torch.nn.Parameter(torch.randn(2, 3, generator=random)),
        half=torch.randn(3, generator=random).half(),
        bf16=torch.randn(4, generator=random).bfloat16(),
        steps=torch.tensor(7),
        flags=torch.tensor([True, False]),
        transposed=base.t(),
        part=base[1:3, 2:5],
        empty=torch.zeros(0, 3),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, is_zip in (("zip", True), ("legacy", False)):
        torch.save(tensors, out / f"{name}.pth", _use_new_zipfile_serialization=is_zip)


if __name__ == "__main__":
    main()
