"""Builds the C++ extension `fastalign._native`; everything else about the package stands in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("FASTALIGN_BUILD_JOBS", default=2).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "fastalign._native",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
