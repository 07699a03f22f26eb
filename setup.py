"""Adds configs/ to the wheel; pyproject.toml says the rest. A checkout (also when installed -e) uses the folder."""

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDER = "tokenverse_mergevq_configs"  # as in runtime_jax/config.py: a package called configs could be anybody's


class BuildWithConfigs(build_py):
    """Packages what pyproject.toml finds, and configs/ under another name."""

    def finalize_options(self):
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [*self.packages, FOLDER]
            self.package_dir = {**self.package_dir, FOLDER: "configs"}


setup(cmdclass={"build_py": BuildWithConfigs})
