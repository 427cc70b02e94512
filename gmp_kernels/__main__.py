"""``python -m gmp_kernels``: the same as ``gmp-kernels``."""

from gmp_kernels.cli import main

main()
