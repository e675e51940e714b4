"""The packages: all below nvit_jax/, and configs/ as nvit_jax.configs. The rest of the build is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nvit_jax", "nvit_jax.*"]), "nvit_jax.configs"],
    package_dir={"nvit_jax.configs": "configs"},
)
