"""TPU slices: which there are, how many hosts they have, and what each tool calls them.

A slice has one name in this project, that of `launch.compile_ahead`: v5e:4x4. Google Cloud's and XPK's name for it is
v5litepod-16; GKE selects nodes by tpu-v5-lite-podslice and 4x4. `find` takes the first two.
"""

import math
from typing import NamedTuple

from launch.common import LaunchError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


class Generation(NamedTuple):
    """A kind of TPU. Its slices of more than one VM have four chips on each."""

    prefix: str  # of Google Cloud's accelerator type
    cores: int  # that the accelerator type counts for a chip
    gke: str  # value of the label cloud.google.com/gke-tpu-accelerator
    runtime: str  # software version of the TPU VM
    largest_vm: int  # chips
    topologies: tuple[str, ...]


GENERATIONS = {
    "v4": Generation("v4", 2, "tpu-v4-podslice", "tpu-ubuntu2204-base", 4, _CUBES),
    "v5e": Generation("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 8, _FLAT),
    "v5p": Generation("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", 4, _CUBES),
    "v6e": Generation("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", 8, _FLAT),
}


class Slice(NamedTuple):
    """A slice of TPUs, such as v5e:4x4."""

    name: str  # key of GENERATIONS
    topology: str

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.name]

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.topology.split("x"))

    @property
    def accelerator_type(self) -> str:
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"

    def hosts(self, chips_per_host: int | None = None) -> int:
        """Number of hosts. None: as TPU VMs have them, with eight chips of a v5e or v6e on one host if that is all.

        Raises:
          LaunchError: the slice has no hosts of that many chips.
        """
        whole = self.chips <= self.generation.largest_vm
        allowed = sorted({min(4, self.chips)} | ({self.chips} if whole else set()))
        chips_per_host = allowed[-1] if chips_per_host is None else chips_per_host
        if chips_per_host not in allowed:
            sizes = " or ".join(map(str, allowed))
            raise LaunchError(f"{self.name}:{self.topology} has hosts of {sizes} chips, not of {chips_per_host}")
        return self.chips // chips_per_host


def find(text: str) -> Slice:
    """The slice called `text`: v5e:4x4 or v5litepod-16.

    Raises:
      LaunchError: there is none; the message lists those of this kind of TPU.
    """
    name, _, topology = text.partition(":")
    if name in GENERATIONS:
        if topology in (known := GENERATIONS[name].topologies):
            return Slice(name, topology)
        raise LaunchError(f"no slice {text!r}; there are {', '.join(f'{name}:{each}' for each in known)}")
    prefix = text.rpartition("-")[0]
    for name, generation in GENERATIONS.items():
        if generation.prefix == prefix:
            types = {each.accelerator_type: each for each in (Slice(name, t) for t in generation.topologies)}
            if text in types:
                return types[text]
            raise LaunchError(f"no slice {text!r}; there are {', '.join(types)}")
    raise LaunchError(f"no TPU {text!r}; expected something like v5e:4x4 or v5litepod-16 ({', '.join(GENERATIONS)})")
