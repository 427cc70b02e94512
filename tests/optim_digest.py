"""Prints one hash of every weight and state the optimizers write, for each number of threads.

A program and not a test: the instruction set is chosen once per process. ``python optim_digest.py SHARE THREADS...``;
of the combinations it takes every SHARE-th.; the
backend is that of ``GMP_KERNELS_BACKEND``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from typing import Any

import torch
from optim_cases import CASES, masked, parameters, random_gradients, random_masks, set_gradients

from gmp_kernels.optim import clip_grad_norm_, ema_update_
from gmp_kernels.tools.testing import DTYPES, device_of

SHAPES = [(3 * 16384 + 5,), (129, 17), (1,), (0,)]
DEVICE = device_of(os.environ.get("GMP_KERNELS_BACKEND", "cpu"))


def digest(share: int) -> str:
    """All rules, dtypes and layouts, over a few steps on enough weights for every thread; clipping and averages."""
    sha = hashlib.sha256()
    half: dict[str, Any] = {"state_dtype": torch.bfloat16}
    compact = {"compact_state": True}
    layouts = ({}, half, compact, {**compact, **half}, {**compact, "master_weights": True})
    for case, dtype, options in list(itertools.product(CASES, DTYPES, layouts))[::share]:
        params = parameters(SHAPES, dtype, device=DEVICE)
        averages = [p.detach().clone() for p in params[:3]]
        optimizer = masked(case, params, **options)
        for step in range(2):
            # The 129 x 17 has no mask, and the rest another one every time.
            masks = random_masks([params[0], params[2]], 0.5 + 0.4 * step, step)
            optimizer.set_masks(masks)
            set_gradients(params, random_gradients(params, step), masks)
            given = [masks.get(p) for p in params]
            norm = clip_grad_norm_(params, 1.0, masks=given)
            optimizer.step()
            ema_update_(averages, params[:3], 0.9, masks=given[:3])
            sha.update(norm.cpu().numpy().tobytes())
        state = optimizer.state_dict()["state"]
        for tensor in (*params, *averages, *(t for i in sorted(state) for t in state[i].values())):
            sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    share, *counts = map(int, sys.argv[1:])
    for threads in counts:
        torch.set_num_threads(threads)
        print(digest(share))
