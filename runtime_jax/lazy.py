"""Packages that import a public name when it is first used."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attributes(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package (PEP 562) whose import loads no other module.

    >>> __getattr__, __dir__, __all__ = attributes(__name__, {"mergevq_jax.tokenizer.model": ("Tokenizer", "Tokens")})

    `homes` maps modules to the public names that each of them defines.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    return get, lambda: sorted(home), sorted(home)
