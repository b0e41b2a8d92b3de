"""Maps the folders engine/, kernels/, training/ and benchmarks/ into the namespace `protnest` and builds csrc/."""

import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

FOLDERS = ("engine", "kernels", "kernels/gpu", "training", "benchmarks")
SOURCES = (
    *("cached_attention", "kd_loss", "level", "next_token", "plan_batches"),
    *("rotary_attention", "row_passes", "tokenise", "top_rows"),
)
# On Linux the runtime is the very libgomp that torch brings and has loaded: one pool of threads for both, where a
# second one would wait beside torch's, which spins. Elsewhere `simd` alone, which needs no runtime: one thread.
OPENMP = "-fopenmp" if sys.platform == "linux" else "-fopenmp-simd"

extension = Pybind11Extension(
    "protnest.kernels._C",
    [f"csrc/{name}.cpp" for name in ("module", *SOURCES)],
    depends=[f"csrc/{name}.hpp" for name in (*SOURCES, "lanes", "row_numbers")],
    cxx_std=17,
    # psabi: notes about vectors in calls that are all inlined.
    extra_compile_args=["-O3", "-Wno-psabi", OPENMP],
    extra_link_args=[OPENMP],
    # Without a compiler the installation goes on: the Python twins in kernels/ take over and `protnest info` says so.
    optional=True,
)

setup(
    packages=[f"protnest.{folder.replace('/', '.')}" for folder in FOLDERS],
    package_dir={f"protnest.{folder.replace('/', '.')}": folder for folder in FOLDERS},
    package_data={
        "protnest.engine": ["py.typed", "bundled/*", "bundled/*/*", "pages/*"],
        "protnest.kernels": ["py.typed"],
        "protnest.training": ["py.typed"],
        "protnest.benchmarks": ["py.typed"],
    },
    ext_modules=[extension],
)
