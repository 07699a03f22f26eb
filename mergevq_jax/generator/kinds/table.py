"""Names of the kinds."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from mergevq_jax.generator.kinds.kind import Kind
from mergevq_jax.generator.kinds.merge import MergeAR
from mergevq_jax.generator.kinds.plain import Plain
from mergevq_jax.generator.kinds.random import RandAR

KindName = Literal["merge", "plain", "random"]
KINDS: Mapping[str, Kind] = MappingProxyType({"merge": MergeAR(), "plain": Plain(), "random": RandAR()})
