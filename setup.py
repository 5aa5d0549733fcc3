"""Puts the bundles, which lie beside the package, into it when a wheel is built; pyproject.toml says all else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithBundles(build_py):
    """``build_py``, and the bundles as data of the package."""

    def run(self) -> None:
        """Copy the package, then the bundles."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "medclr" / "bundles"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("bundles", target, ignore=shutil.ignore_patterns("models", "__pycache__", ".*"))


setup(cmdclass={"build_py": BuildWithBundles})
