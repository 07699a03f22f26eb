"""These tests compare with the reference implementations: they are collected where the extra `parity` is installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("diffusers") else ["test_*.py"]
