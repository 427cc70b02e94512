"""Builds the extensions of gmp_kernels. Everything else is in pyproject.toml.

setuptools cannot express that the file of each instruction set has its own flags, and that nvcc compiles .cu files.
"""

import copy
import os
import platform
import shutil
import sys
from functools import partial
from pathlib import Path

import setuptools
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import cuda_toolkit

X86_64 = platform.machine().lower() in ("x86_64", "amd64")
AVX2_FLAGS = ["-mavx2", "-mfma", "-mpopcnt", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12 warns about its own headers
]
ISA_FLAGS = {
    "isa_avx2.cpp": AVX2_FLAGS,
    "isa_avx512.cpp": AVX512_FLAGS,
    "isa_avx512_vbmi2.cpp": [*AVX512_FLAGS, "-mavx512vbmi2"],
}
COMMON_FLAGS = ["-O3", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
# Every instruction set must round alike, so multiply-adds are fused only where the code says so. Without errno, sqrt is
# one instruction.
COMMON_FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
COMMON_FLAGS += ["-Wno-unknown-pragmas"]  # for pragmas of nvcc
NVCC = shutil.which("nvcc")
SANITIZE = os.environ.get("GMP_KERNELS_SANITIZE")  # e.g. "address,undefined": used by the test suite
if SANITIZE:
    COMMON_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildExtension(build_ext):
    """Compiles each file with the common flags and those of its instruction set; .cu files with nvcc.

    Every extension has its own compiler and its own folder for objects, because ``--parallel`` builds several at once
    and two of them compile the same file with different macros.
    """

    def build_extension(self, ext):
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        own.compiler = copy.copy(self.compiler)
        own.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        own.compiler._compile = partial(self.compile_file, self.compiler._compile)
        super(BuildExtension, own).build_extension(ext)

    def compile_file(self, compile_one, obj, src, extension, cc_args, extra_postargs, pp_opts):
        if Path(src).suffix == ".cu":
            include = [flag for flag in pp_opts if flag.startswith("-I")]
            return self.spawn([NVCC, *nvcc_flags, *include, "-c", src, "-o", obj])
        flags = ISA_FLAGS.get(Path(src).name, []) if X86_64 else []
        compile_one(obj, src, extension, cc_args, [*extra_postargs, *flags], pp_opts)


class Distribution(setuptools.Distribution):
    """Lets setuptools before 77 build the extensions: it ignores pyproject.toml, whose license these versions reject.

    GPU machines without network often have such a version. Wheels are built in isolation with a newer setuptools, which
    pyproject.toml requires.
    """

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        too_old = int(setuptools.__version__.partition(".")[0]) < 77
        only_extensions = "build_ext" in sys.argv
        super().parse_config_files([] if too_old and only_extensions else filenames, ignore_option_errors)


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
        # Without a compiler the package falls back to the reference backend, and `info` says so.
        optional=not (SANITIZE or required),
    )


extensions = [extension("_C", ["*.cpp", "cpu/*.cpp"])]
# GMP_KERNELS_BUILD_CUDA: 1 requires nvcc, 0 builds without CUDA, unset builds with CUDA if nvcc is found.
BUILD_CUDA = os.environ.get("GMP_KERNELS_BUILD_CUDA", "")
if BUILD_CUDA == "1" and not NVCC:
    raise SystemExit("GMP_KERNELS_BUILD_CUDA=1, but nvcc is not on the PATH: install the CUDA toolkit, or unset it")
if BUILD_CUDA != "0" and NVCC and not SANITIZE:
    try:
        architectures = cuda_toolkit.gencode(NVCC, os.environ.get("GMP_KERNELS_CUDA_ARCHS", ""))
        cudart = str(cuda_toolkit.runtime_library(NVCC))
    except RuntimeError as error:
        raise SystemExit(f"setup.py: {error}; GMP_KERNELS_BUILD_CUDA=0 builds without CUDA") from None
    # --threads=0 compiles as many architectures at a time as there are cores.
    nvcc_flags = [*cuda_toolkit.FLAGS, *architectures, "--threads=0"]
    extensions.append(
        extension(
            "_cuda",
            ["cuda/*.cpp", "cuda/*.cu"],
            macros=[("GMP_MODULE", "_cuda")],
            libraries=[cudart, "-ldl", "-lrt", "-lpthread"],
            required=BUILD_CUDA == "1",
        )
    )
# This extension runs the CUDA kernels on the host, for the tests. Its fibers are written for x86-64.
if os.environ.get("GMP_KERNELS_BUILD_SIMT") == "1" and X86_64:
    extensions.append(
        extension(
            "_simt",
            ["simt/*.cpp", "cuda/*.cpp"],
            macros=[("GMP_SIMT", None), ("GMP_MODULE", "_simt")],
            required=True,
        )
    )

ParallelCompile().install()  # compiles as many files of an extension at a time as there are cores
setuptools.setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension}, distclass=Distribution)
