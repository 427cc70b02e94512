"""Stage ``profile``: the time of every kernel launch, and what the host does before the first one."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from gmp_kernels.measurement import Timed
from gpu_stages.facts import tell
from gpu_stages.work import Work

CALL = "the call that is profiled"
LONGEST_NAME = 60


def profiled(work: Timed, device: torch.device) -> tuple[dict[str, list[float]], float, float]:
    """Microseconds of every kernel by name; those until the device begins; and those of the whole call on the host."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):  # what is loaded or allocated at first use
        work.prepare()
        work.run()
    work.prepare()
    wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        with record_function(CALL):
            work.run()
        wait()
    kernels: dict[str, list[float]] = defaultdict(list)
    begins, call = [], (0.0, 0.0)
    for event in trace.events() or []:
        span = event.time_range
        if event.device_type == DeviceType.CUDA and event.name != CALL:
            kernels[event.name].append(span.end - span.start)
            begins.append(span.start)
        elif event.name == CALL and event.device_type == DeviceType.CPU:
            call = (span.start, span.end)
    return kernels, (min(begins) - call[0] if begins else 0.0), call[1] - call[0]


def short(name: str) -> str:
    """A kernel's name without namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]
    for namespace in ("gmp::cuda::kernels::", "gmp::cuda::", "gmp::"):
        name = name.replace(namespace, "")
    return name[:LONGEST_NAME]


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile everything; what fails is told, and the rest goes on."""
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
            kernels, begins, host = profiled(make(), device)
        except Exception as error:
            failed += 1
            tell(f"FAILED {name}: {type(error).__name__}: {error}", profiled=name)
            continue
        count, total = sum(map(len, kernels.values())), sum(map(sum, kernels.values()))
        text = f"{name}: host {host:.0f} us, device begins after {begins:.0f} us, {count} launches {total:.0f} us"
        if name in work.large:
            spans = [f"{short(kernel)} " + "+".join(f"{us:.0f}" for us in times) for kernel, times in kernels.items()]
            text += "".join(f"\n    {span}" for span in spans)
        tell(text, profiled=name, host_us=host, begins_us=begins, kernels_us=kernels)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
