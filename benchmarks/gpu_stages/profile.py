"""Stage ``profile``: the time of every kernel launch, and the time of a call until it returns and until all is done.

A profiler that watches the host makes it several times slower. So calls are timed without a profiler first, and then
profiled on the device only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gmp_kernels.tools.bench.measurement import Timed
from gpu_stages.facts import tell
from gpu_stages.work import Work

CALLS = 7  # timed ones
LONGEST_NAME = 60


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; the CPU is done already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_the_host(work: Timed, device: torch.device) -> tuple[float, float]:
    """Return the median microseconds until a call returns, and until the device has done all of it."""
    returned, done = [], []
    for _ in range(CALLS):
        work.prepare()
        synchronize(device)
        start = time.perf_counter()
        work.run()
        returned.append(time.perf_counter() - start)
        synchronize(device)
        done.append(time.perf_counter() - start)
    return statistics.median(returned) * 1e6, statistics.median(done) * 1e6


def on_the_device(work: Timed, device: torch.device) -> dict[str, list[float]]:
    """Return the microseconds of every kernel and copy of one call, by name."""
    work.prepare()
    synchronize(device)
    # Without a GPU there would be nothing to watch.
    watched = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[watched]) as trace:
        work.run()
        synchronize(device)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in trace.events() or []:
        # torch's annotation of an optimizer step spans its kernels but is no kernel.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name].append(event.time_range.end - event.time_range.start)
    return kernels


def short(name: str) -> str:
    """Return a kernel's name without namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]
    for namespace in ("gmp::cuda::kernels::", "gmp::cuda::", "gmp::"):
        name = name.replace(namespace, "")
    return name[:LONGEST_NAME]


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile everything; report failures and go on with the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides the number of weights")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    failed = 0
    work = Work(device, options.backend, options.shrink)
    for name, make in work.all().items():
        try:
            call = make()
            for _ in range(2):  # the first calls load and allocate
                call.prepare()
                call.run()
            returned, done = on_the_host(call, device)
            kernels = on_the_device(call, device)
        except Exception as error:
            failed += 1
            tell(f"FAILED {name}: {type(error).__name__}: {error}", profiled=name)
            continue
        count, total = sum(map(len, kernels.values())), sum(map(sum, kernels.values()))
        text = f"{name}: returns after {returned:.0f} us, done after {done:.0f} us, {count} launches {total:.0f} us"
        if name in work.large:
            spans = [f"{short(kernel)} " + "+".join(f"{us:.0f}" for us in times) for kernel, times in kernels.items()]
            text += "".join(f"\n    {span}" for span in spans)
        tell(text, profiled=name, returns_us=returned, done_us=done, kernels_us=kernels)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
