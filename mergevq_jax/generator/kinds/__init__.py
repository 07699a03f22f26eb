"""The kinds of generators, by the names that configs give them: MergeAR, plain autoregression, RandAR.

`kind.Kind` says what a kind is. Nothing else asks which one a generator is of.
"""

from runtime_jax import lazy

__getattr__, __dir__, __all__ = lazy.attributes(__name__, {"mergevq_jax.generator.kinds.table": ("KINDS", "KindName")})
