"""Builds gmp_kernels._C. Everything else is in pyproject.toml.

The one thing setuptools cannot express is that each instruction set's file has flags of its own.
"""

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mpopcnt", "-mf16c"],
    "isa_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi2"),
        *("-mavx2", "-mfma", "-mpopcnt", "-mprefer-vector-width=512"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12 warns about its own headers
    ],
}
COMMON_FLAGS = ["-O3", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
# Every instruction set must round alike: no fused multiply-add but where the code says so; and no errno, so that sqrt
# is one instruction.
COMMON_FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
SANITIZE = os.environ.get("GMP_KERNELS_SANITIZE")  # e.g. "address,undefined": used by the test suite
if SANITIZE:
    COMMON_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildExtension(build_ext):
    """Compiles each file with the common flags and those of its instruction set."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, extension, cc_args, extra_postargs, pp_opts):
            flags = ISA_FLAGS.get(Path(src).name, []) if X86_64 else []
            compile_one(obj, src, extension, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extension(ext)


setup(
    ext_modules=[
        Pybind11Extension(
            "gmp_kernels._C",
            sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
            cxx_std=17,
            extra_compile_args=COMMON_FLAGS,
            extra_link_args=["-fopenmp", *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])],
            optional=not SANITIZE,  # without a compiler the reference backend still serves, and `info` says so
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
