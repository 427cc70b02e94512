"""Compares a prune step of shards on several processes with one process that has the same weights and all cores.

    python benchmarks/distributed.py [--ranks 4] [--layers 160] [--rows 1024] [--columns 1024] [--output FILE.json]

It measures what rows of the speed table do, and shows the traffic too. Bytes are those of the collectives' results on
one rank. The program needs memory for twice the weights, and for the masks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gmp_kernels.tools.bench.sharded import DTYPES, PLACEMENTS, Setting, measure_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Setting()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    setting = Setting(**options)
    results = []
    print(
        f"{'dtype':<10}{'shards':<10}{'one process':>12}{'ranks':>10}{'ratio':>8}{'collectives':>13}{'bytes/layer':>13}"
    )
    for dtype in DTYPES:
        for placement in PLACEMENTS:
            row = measure_ranks(setting, dtype, placement)
            results.append(row)
            print(
                f"{dtype:<10}{placement:<10}"
                f"{row['one_process_seconds'] * 1e3:>9.1f} ms{row['ranks_seconds'] * 1e3:>7.1f} ms"
                f"{row['ratio']:>7.2f}x{row['collectives']:>13}{row['bytes_per_layer']:>13.0f}"
            )
    if output:
        output.write_text(json.dumps({"sizes": setting._asdict(), "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
