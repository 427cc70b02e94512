"""Builds gmp_kernels._C. Everything else is in pyproject.toml.

The one thing setuptools cannot express is that each instruction set's file has flags of its own.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mpopcnt", "-mf16c"],
    "isa_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi2"),
        *("-mavx2", "-mfma", "-mpopcnt", "-mf16c", "-mprefer-vector-width=512"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12 warns about its own headers
    ],
}
COMMON_FLAGS = ["-O3", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
# Every instruction set must round alike: no fused multiply-add but where the code says so; and no errno, so that sqrt
# is one instruction.
COMMON_FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
COMMON_FLAGS += ["-Wno-unknown-pragmas"]  # those are nvcc's
NVCC = shutil.which("nvcc")
# Real code for the GPUs most have, and PTX that newer ones compile for themselves. Registers and spills are reported.
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "--threads=0", "-Xptxas=-v"),
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    *("-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off", "-diag-suppress=128,177"),
]
SANITIZE = os.environ.get("GMP_KERNELS_SANITIZE")  # e.g. "address,undefined": used by the test suite
if SANITIZE:
    COMMON_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildExtension(build_ext):
    """Compiles each file with the common flags and those of its instruction set; .cu files with nvcc."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, extension, cc_args, extra_postargs, pp_opts):
            if Path(src).suffix == ".cu":
                include = [flag for flag in pp_opts if flag.startswith("-I")]
                return self.spawn([NVCC, *NVCC_FLAGS, *include, "-c", src, "-o", obj])
            flags = ISA_FLAGS.get(Path(src).name, []) if X86_64 else []
            compile_one(obj, src, extension, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


def extension(name, sources, *, macros=(), libraries=(), required=False):
    return Pybind11Extension(
        f"gmp_kernels.{name}",
        sorted(str(path) for pattern in sources for path in Path("csrc").glob(pattern)),
        include_dirs=["csrc"],
        define_macros=list(macros),
        depends=sorted(
            str(path) for pattern in ("**/*.h", "**/*.cuh", "**/*.cu") for path in Path("csrc").glob(pattern)
        ),
        cxx_std=17,
        extra_compile_args=COMMON_FLAGS,
        extra_link_args=["-fopenmp", *([f"-fsanitize={SANITIZE}"] if SANITIZE else []), *libraries],
        # Without a compiler the reference backend still serves, and `info` says so.
        optional=not (SANITIZE or required),
    )


extensions = [extension("_C", ["*.cpp", "cpu/*.cpp"])]
# GMP_KERNELS_BUILD_CUDA: 1 needs nvcc, 0 leaves it out, unset takes it where it is found.
BUILD_CUDA = os.environ.get("GMP_KERNELS_BUILD_CUDA", "")
if BUILD_CUDA == "1" and not NVCC:
    raise SystemExit("GMP_KERNELS_BUILD_CUDA=1, but nvcc is not on the PATH: install the CUDA toolkit, or unset it")
if BUILD_CUDA != "0" and NVCC and not SANITIZE:
    # Where nvcc's own libraries are, by its word: it may be a link or a script.
    dry_run = subprocess.run([NVCC, "-dryrun", "none.cu"], capture_output=True, text=True, check=True).stderr
    toolkit = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)[1]
    cudart = str(Path(toolkit) / "lib64/libcudart_static.a")
    extensions.append(
        extension(
            "_cuda",
            ["cuda/*.cpp", "cuda/*.cu"],
            macros=[("GMP_MODULE", "_cuda")],
            libraries=[cudart, "-ldl", "-lrt", "-lpthread"],
            required=BUILD_CUDA == "1",
        )
    )
# The CUDA kernels run on the host, for the tests. Its fibers are written for x86-64.
if os.environ.get("GMP_KERNELS_BUILD_SIMT") == "1" and X86_64:
    extensions.append(
        extension(
            "_simt",
            ["simt/*.cpp", "cuda/*.cpp"],
            macros=[("GMP_SIMT", None), ("GMP_MODULE", "_simt")],
            required=True,
        )
    )

ParallelCompile().install()  # as many files at a time as there are cores
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
