"""``python -m gmp_kernels``: the same as ``gmp-kernels``."""

from gmp_kernels.tools.cli.main import main

main()
