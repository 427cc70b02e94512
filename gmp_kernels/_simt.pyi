# The same launches on the host, for the tests: blocks and threads run in any order that a seed gives.
from gmp_kernels._cuda import *  # noqa: F403

# 0 runs blocks and threads in order.
def set_seed(seed: int) -> None: ...

# Kernel, launches, bytes loaded and bytes stored, since the last call.
def take_traffic() -> list[tuple[str, int, int, int]]: ...
