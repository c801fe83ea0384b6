"""Packaging of Busway: four packages, the recipes, and C++ operators that are compiled where a compiler is."""

import runpy
from importlib.metadata import distributions
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
build = runpy.run_path(str(ROOT / "models/kernels/build.py"))


def mpi_headers() -> list[str]:
    """The folder of the mpich wheel's mpi.h. Ask the wheel: pip's isolated build puts it outside this environment."""
    files = (file for wheel in distributions(name="mpich") for file in wheel.files or () if file.name == "mpi.h")
    return [str(header.parent) for file in files if (header := file.locate().resolve()).exists()]


setup(
    name="busway",
    version="0.1.0",
    description="Training of large language models on Ascend supernodes with MindSpore",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["trainer*", "parallel*", "models*", "recipes*"]),
    package_data={"recipes": ["**/*.yaml"], "models.kernels": ["csrc/*"], "parallel.collectives": ["csrc/*"]},
    install_requires=[line for line in (ROOT / "requirements.txt").read_text().split("\n") if line],
    entry_points={"console_scripts": ["busway=trainer.__main__:main"]},
    ext_modules=[
        build["operators"]("models.kernels._native", "models/kernels/csrc"),
        build["operators"]("parallel.collectives._mpi_ops", "parallel/collectives/csrc", include_dirs=mpi_headers()),
    ],
    cmdclass={"build_ext": build["BuildOperators"]},
)
