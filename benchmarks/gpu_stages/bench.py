"""Stage ``bench``: the rows of the speed table, reported one by one.

The cases and the way they are measured are those of ``gmp-kernels bench --device cuda``, which needs more packages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from gmp_kernels.tools.bench.gpu import gpu_cases
from gmp_kernels.tools.bench.measurement import Failure, measure_all
from gpu_stages.facts import tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all rows. If one fails, the others are still measured, but the stage has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs=2, default=("cuda", "triton"), metavar=("CUDA", "TRITON"))
    parser.add_argument("--only", default="", help="rows with this in their names")
    parser.add_argument("--without", help="no rows with this in their names")
    parser.add_argument("--shrink", type=int, default=1, help="divides the number of weights")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = [
        case
        for case in gpu_cases(device, *options.backends)
        if options.only in case.name and not (options.without and options.without in case.name)
    ]
    failed = 0
    for outcome in measure_all(cases, shrink=options.shrink, seconds=options.seconds, device=device):
        cells = outcome.cells()
        name, ours, baseline, theirs, ratio, must, aim, verdict, rate = cells
        bounds = f"must {must}, aim {aim}" if aim else f"must {must}"
        text = f"{verdict:6} {ratio:>6} ({bounds})  {name}: {ours}; {baseline}: {theirs}"
        text += f"; {rate} GB/s" if rate else ""
        if isinstance(outcome, Failure):
            failed += 1
            text += f"  {outcome.error}"
        tell(text, case=outcome.to_dict(), cells=cells)
    return int(failed > 0 or not cases)


if __name__ == "__main__":
    sys.exit(main())
