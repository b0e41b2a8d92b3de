"""Maps the folders engine/, kernels/, training/ and benchmarks/ into the namespace `protnest` and builds csrc/."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

FOLDERS = ("engine", "kernels", "kernels/gpu", "training", "benchmarks")

extension = Pybind11Extension(
    "protnest.kernels._C",
    ["csrc/module.cpp", "csrc/kd_loss.cpp", "csrc/plan_batches.cpp", "csrc/tokenise.cpp"],
    depends=["csrc/kd_loss.hpp", "csrc/plan_batches.hpp", "csrc/tokenise.hpp"],
    cxx_std=17,
    # simd: the pragmas that let sums be taken in parallel lanes, without OpenMP's runtime.
    extra_compile_args=["-O3", "-fopenmp-simd"],
    # Without a compiler the installation goes on: the Python twins in kernels/ take over and `protnest info` says so.
    optional=True,
)

setup(
    packages=[f"protnest.{folder.replace('/', '.')}" for folder in FOLDERS],
    package_dir={f"protnest.{folder.replace('/', '.')}": folder for folder in FOLDERS},
    package_data={
        "protnest.engine": ["py.typed", "bundled/*/*"],
        "protnest.kernels": ["py.typed"],
        "protnest.training": ["py.typed"],
        "protnest.benchmarks": ["py.typed"],
    },
    ext_modules=[extension],
)
