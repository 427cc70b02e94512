"""Triton kernels: the GPU path where no CUDA compiler was at hand, and for AMD.

A step is one table of rows in device memory and one launch per phase on torch's current stream, for every dtype there
is; what is done once per layer and not per weight is torch's. With ``TRITON_INTERPRET=1`` in the environment the same
kernels run on the host, for the tests: milliseconds for 16384 weights.
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gmp_kernels.backends import (
    Backend,
    Compaction,
    Gradient,
    Layer,
    Selection,
    StateMove,
    Tally,
    Threshold,
    UpdateTensor,
    Written,
    register,
)
from gmp_kernels.backends._rows import INTEGERS, address, by_dtype, fingerprint, on_device, parts

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Weights per program: as many as registers hold; under the interpreter a program takes milliseconds of whatever size,
# and the tests' sizes lie around this one.
BLOCK = 16384 if INTERPRETED else 4096
CAPACITY = BLOCK // 32  # candidates kept per chunk: 3 % of the bytes of the weights
LISTS_PER_PROGRAM = 16
BIN_BITS = 11
SAMPLED_EIGHTS = 2048  # per group, at most: 16384 keys
NO_INDEX = (1 << 63) - 1
# What a group's next pass reads; as in _triton_kernels.py.
READ_WEIGHTS, READ_LISTS, DONE = range(3)
# Constants of an optimizer step in the order of _triton_kernels.py, and the values that change nothing.
CONSTANTS = {
    "grad_factor": 1.0,
    "decay": 1.0,
    "weight_decay": 0.0,
    "lr": 0.0,
    "momentum": 0.0,
    "one_minus_dampening": 1.0,
    "nesterov": 0.0,
    "first_step": 0.0,
    "one_minus_beta1": 0.0,
    "beta2": 0.0,
    "one_minus_beta2": 0.0,
    "bias_correction2_sqrt": 1.0,
    "eps": 0.0,
    "step_size": 0.0,
}


def _infinity(dtype: torch.dtype) -> int:
    """Key of +Inf; that of NaN is the next."""
    return int(torch.tensor(float("inf"), dtype=dtype).view(INTEGERS[dtype.itemsize]))


def _magnitudes(keys: torch.Tensor, dtype: torch.dtype) -> list[float]:
    return keys.to(INTEGERS[dtype.itemsize]).view(dtype).tolist()


def _keys(magnitudes: Sequence[float], dtype: torch.dtype) -> list[int]:
    """Their inverse, for magnitudes that are values of ``dtype``."""
    bits = torch.tensor(magnitudes, dtype=torch.float64).to(dtype).view(INTEGERS[dtype.itemsize])
    return bits.clamp(max=_infinity(dtype) + 1).tolist()


class _Table(NamedTuple):
    """Rows in device memory, and whose row each chunk is; chunks of all rows are numbered through."""

    rows: torch.Tensor
    owners: torch.Tensor
    num_chunks: int


class _Search:
    """The brackets of all groups, on the device: a group is the layers that share a threshold.

    Keys are int64 here, ranks run through a group's unpruned keys from 0.
    """

    def __init__(self, lo: torch.Tensor, hi: torch.Tensor, wanted: torch.Tensor, sizes: torch.Tensor, largest: int):
        self._wanted, self._sizes, self._largest = wanted, sizes, largest
        # frexp gives the length of the span in bits, or one more where float64 rounds it up.
        shift = (torch.frexp((hi - lo).clamp(min=0).double()).exponent - BIN_BITS).clamp(min=0)
        self.state = torch.stack([lo, hi, shift.to(torch.int64), torch.full_like(lo, READ_WEIGHTS)])
        self._below = torch.zeros_like(lo)
        self._pruned = torch.zeros_like(lo)
        self.answers = torch.zeros(4, lo.numel(), dtype=torch.int64, device=lo.device)  # key, below, ties, ties kept

    def narrow(self, bins: torch.Tensor, counters: torch.Tensor) -> set[int]:
        """Prove the brackets by what was counted, and shrink them to the bin with the wanted key; return all modes."""
        lo, hi, shift, mode = self.state
        reads = mode == READ_WEIGHTS
        below = torch.where(reads, counters[:, 0], self._below)
        self._pruned = torch.where(reads, self._sizes - counters[:, 1], self._pruned)
        rank = self._wanted - self._pruned - 1 - below
        running = bins.cumsum(1)
        inside = running[:, -1]
        bin = torch.searchsorted(running, rank[:, None], right=True).clamp(max=bins.shape[1] - 1)
        ties = bins.gather(1, bin)[:, 0]
        lower = below + running.gather(1, bin)[:, 0] - ties
        first = lo + (bin[:, 0] << shift)

        proven = (rank >= 0) & (rank < inside)
        exact = proven & (shift == 0)
        ties_kept = self._pruned + lower + ties - self._wanted
        nothing = self._wanted <= self._pruned
        # Of ties that stay one has to know in which chunks they lie: the bracket must hold nothing else.
        done = nothing | (exact & ((ties_kept == 0) | (lo == hi)))
        answers = torch.stack([first, self._pruned + lower, ties, ties_kept])
        nothing_more = torch.stack([torch.zeros_like(lo), self._pruned, torch.zeros_like(lo), torch.zeros_like(lo)])
        was_done = mode == DONE
        self.answers = torch.where(was_done, self.answers, torch.where(nothing, nothing_more, answers))

        listed = (mode == READ_LISTS) | (reads & (lo < hi) & (counters[:, 2] <= CAPACITY))
        too_high = rank < 0
        narrowed = torch.stack(
            [
                torch.where(proven, first, torch.where(too_high, 0, hi + 1)),
                torch.where(
                    proven, torch.minimum(first + (1 << shift) - 1, hi), torch.where(too_high, lo - 1, self._largest)
                ),
                torch.where(proven, (shift - BIN_BITS).clamp(min=0), self._largest.bit_length() - BIN_BITS),
                torch.where(done, DONE, torch.where(proven & listed, READ_LISTS, READ_WEIGHTS)),
            ]
        )
        self.state = torch.where(was_done, self.state, narrowed)
        self._below = lower
        return set(self.state[3].tolist())


class Triton:
    """Implementation by launches of _triton_kernels."""

    def __init__(self) -> None:
        # Not before somebody wants it: importing triton takes longer than importing all of this package.
        from gmp_kernels.backends import _triton_kernels

        if INTERPRETED:
            from gmp_kernels.backends import _interpreter

            _interpreter.put_right()
        self._kernels: Any = _triton_kernels

    def _launch(self, name: str, num_programs: int, *args: Any, **constants: Any) -> None:
        if num_programs == 0:
            return
        # Contraction would round once what csrc/update_rule.h rounds twice.
        getattr(self._kernels, name)[(num_programs,)](*args, **constants, num_warps=8, enable_fp_fusion=False)

    def _table(self, rows: list[list[int]], device: torch.device) -> _Table:
        k = self._kernels
        chunks, total = [], 0
        for row in rows:
            row.extend([0] * (k.FIELDS.value - len(row)))
            row[k.FIRST.value] = total
            chunks.append(-(-row[k.N.value] // BLOCK))
            total += chunks[-1]
        table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        counts = torch.tensor(chunks, dtype=torch.int64).to(device, non_blocking=True)
        return _Table(table, torch.repeat_interleave(counts, output_size=total), total)

    def _weights(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """What kernels that read the weights are compiled for."""
        dtype = layers[0].weight.dtype
        return {
            "BITS": self._kernels.INTEGERS[dtype.itemsize],
            "INFINITY": _infinity(dtype),
            "BLOCK": BLOCK,
            "ALIGNED": all(layer.weight.data_ptr() % 16 == 0 for layer in layers),
        }

    def select(
        self, layers: Sequence[Layer], num_prune: Sequence[int], hints: Sequence[Threshold | None]
    ) -> list[Selection]:
        found: dict[int, Selection] = {}
        for _, positions, groups in parts(layers, num_prune):
            members = [layers[i] for i in positions]
            with on_device(members[0].weight.device, "select"):
                selections = self._select(members, [num_prune[g] for g in groups])
            found.update(zip(groups, selections, strict=True))
        return [found[g] for g in range(len(num_prune))]

    def _select(self, layers: Sequence[Layer], num_prune: Sequence[int]) -> list[Selection]:
        """Bracket each group's threshold by a sample, and count until the bracket has shrunk to one key."""
        k = self._kernels
        device, dtype = layers[0].weight.device, layers[0].weight.dtype
        is_global = len(num_prune) != len(layers)
        group_of = [0] * len(layers) if is_global else list(range(len(layers)))
        numels = [layer.weight.numel() for layer in layers]
        rows = [
            [layer.weight.data_ptr(), address(layer.mask), 0, n, 0, group]
            for layer, n, group in zip(layers, numels, group_of, strict=True)
        ]
        table = self._table(rows, device)
        weights = self._weights(layers)
        ends = torch.tensor(numels, device=device).cumsum(0)
        sizes = ends[-1:] if is_global else torch.tensor(numels, device=device)
        wanted = torch.tensor(num_prune, device=device)
        sampled = self._sample(table, ends, sizes, sum(numels) if is_global else max(numels), weights)
        largest = weights["INFINITY"] + 1
        search = _Search(*_bracket(sampled, wanted, sizes, largest), wanted, sizes, largest)

        nonfinite = torch.full((len(layers),), NO_INDEX, device=device)
        lists = torch.empty(table.num_chunks, CAPACITY, dtype=INTEGERS[dtype.itemsize], device=device)
        list_sizes, matches = (torch.empty(table.num_chunks, dtype=torch.int32, device=device) for _ in range(2))
        modes = {READ_WEIGHTS}
        while modes != {DONE}:
            bins = torch.zeros(len(num_prune), 1 << BIN_BITS, dtype=torch.int64, device=device)
            counters = torch.zeros(len(num_prune), 3, dtype=torch.int64, device=device)
            counted = (search.state, len(num_prune), bins)
            listed = (lists, list_sizes, matches)
            shape = {"CAPACITY": CAPACITY, "BINS": 1 << BIN_BITS}
            if READ_WEIGHTS in modes:
                arguments = (table.rows, table.owners, *counted, counters, nonfinite, *listed)
                self._launch("count", table.num_chunks, *arguments, **weights, **shape)
            if READ_LISTS in modes:
                arguments = (table.rows, table.owners, table.num_chunks, *counted, *listed)
                shape["ROWS"] = LISTS_PER_PROGRAM
                self._launch("recount", -(-table.num_chunks // LISTS_PER_PROGRAM), *arguments, **shape)
            modes = search.narrow(bins, counters)

        _, num_below, num_ties, num_ties_kept = search.answers.tolist()
        cuts = [0] * len(layers)
        for layer, group in enumerate(group_of):
            if num_ties[group] == 0:
                cuts[layer] = numels[layer]
        if any(num_ties_kept):
            firsts = table.rows[:1, k.FIRST.value] if is_global else table.rows[:, k.FIRST.value]
            for last, cut in self._cuts(table, matches, firsts, search.answers, weights):
                if cut >= 0:
                    cuts[last] = cut
                    first = 0 if is_global else last
                    cuts[first:last] = numels[first:last]
        values = _magnitudes(search.answers[0], dtype)
        first_nonfinite = [-1 if index == NO_INDEX else index for index in nonfinite.tolist()]
        selections = []
        for group in range(len(num_prune)):
            members = slice(None) if is_global else slice(group, group + 1)
            value = values[group] if num_ties[group] else 0.0
            threshold = Threshold(value, num_below[group], num_ties[group], num_ties_kept[group])
            selections.append(Selection(threshold, tuple(cuts[members]), tuple(first_nonfinite[members])))
        return selections

    def _sample(
        self, table: _Table, ends: torch.Tensor, sizes: torch.Tensor, largest_size: int, weights: dict[str, Any]
    ) -> torch.Tensor:
        """Keys of eights all over each group, a row to the group; of a group of one small layer, all of them."""
        eights = min(SAMPLED_EIGHTS, -(-largest_size // 8))
        number = torch.arange(eights, dtype=torch.float64, device=ends.device)
        stride = (sizes.double()[:, None] / eights).clamp(min=8)
        jitter = number * 0.6180339887498949 % 1  # in step with no period of the weights
        place = (number * stride + jitter * (stride - 8)).long()
        exists = place < sizes[:, None]
        starts = ends - torch.diff(ends, prepend=ends.new_zeros(1))
        place = place + (ends[-len(sizes) :] - sizes)[:, None]
        owners = (torch.searchsorted(starts, place, right=True) - 1).clamp(max=len(starts) - 1)
        place = torch.where(exists, (place - starts[owners]) & ~7, NO_INDEX - 8)
        dtype = torch.int64 if weights["INFINITY"] >> 32 else torch.int32
        keys = torch.empty(len(sizes), eights * 8, dtype=dtype, device=ends.device)
        constants = {name: weights[name] for name in ("BITS", "INFINITY", "BLOCK")}
        programs = -(-place.numel() * 8 // BLOCK)
        self._launch("sample", programs, table.rows, owners, place, place.numel(), keys, **constants)
        return keys

    def _cuts(
        self, table: _Table, matches: torch.Tensor, firsts: torch.Tensor, answers: torch.Tensor, weights: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """For each group the layer in which the ties that stay end, and the index there; -1 where none stay."""
        key, _, _, kept = answers
        ends = matches.cumsum(0, dtype=torch.int64)
        target = (ends - matches)[firsts] + kept
        chunks = torch.searchsorted(ends, target, right=True).clamp(max=table.num_chunks - 1)
        ranks = torch.where(kept > 0, target - (ends - matches)[chunks], -1)
        cuts = torch.full_like(ranks, -1)
        constants = {name: weights[name] for name in ("BITS", "INFINITY", "BLOCK")}
        self._launch("place_cut", len(cuts), table.rows, table.owners, chunks, ranks, key, cuts, **constants)
        return list(zip(table.owners[chunks].tolist(), cuts.tolist(), strict=True))

    def _apply(
        self, layers: Sequence[Layer], cuts: Sequence[tuple[float, int]], out: Sequence[torch.Tensor | None]
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Launch apply for each dtype; return its layers and, on the device, their (kept before, kept)."""
        counts = []
        for positions in by_dtype(layers).values():
            members = [layers[i] for i in positions]
            keys = _keys([cuts[i][0] for i in positions], members[0].weight.dtype)
            rows = [
                [
                    *(layers[i].weight.data_ptr(), address(layers[i].mask), address(out[i])),
                    *(layers[i].weight.numel(), 0, 0, key, cuts[i][1]),
                ]
                for key, i in zip(keys, positions, strict=True)
            ]
            device = members[0].weight.device
            with on_device(device, "prune"):
                table = self._table(rows, device)
                kept = torch.zeros(len(rows), 2, dtype=torch.int64, device=device)
                self._launch("apply", table.num_chunks, table.rows, table.owners, kept, **self._weights(members))
            counts.append((positions, kept))
        return counts

    def prune(
        self, layers: Sequence[Layer], selections: Sequence[Selection], out: Sequence[torch.Tensor]
    ) -> list[Written]:
        cuts = [(selection.threshold.value, cut) for selection in selections for cut in selection.cuts]
        written: dict[int, Written] = {}
        for positions, counts in self._apply(layers, cuts, out):
            for i, (before, after) in zip(positions, counts.tolist(), strict=True):
                written[i] = Written(layers[i].weight.numel() - after, before - after)
        return [written[i] for i in range(len(layers))]

    def apply(self, layers: Sequence[Layer]) -> None:
        self._apply(layers, [(0.0, layer.weight.numel()) for layer in layers], [None] * len(layers))

    def update(
        self,
        rule: str,
        tensors: Sequence[UpdateTensor],
        gradients: Sequence[Gradient],
        constants: Sequence[dict[str, float]],
        tally: Tally | None = None,
    ) -> list[Selection | None]:
        k = self._kernels
        rows: dict[_Kind, list[list[int]]] = defaultdict(list)
        for t, gradient in zip(tensors, gradients, strict=True):
            row = t.row if isinstance(t.row, _Row) else _prepared(t)
            grad = gradient.tensor.data_ptr()
            kind = row.kind._replace(aligned=row.kind.aligned and grad % 16 == 0)
            rows[kind].append([*row.before, grad, *row.after, gradient.constants])
        if rows:
            device = tensors[0].weight.device
            with on_device(device, "update"):
                given = [[c.get(name, otherwise) for name, otherwise in CONSTANTS.items()] for c in constants]
                values = torch.tensor(given, dtype=torch.float64).to(device, non_blocking=True)
                for kind, kind_rows in rows.items():
                    table = self._table(kind_rows, device)
                    self._launch(
                        "update",
                        table.num_chunks,
                        table.rows,
                        table.owners,
                        values,
                        RULE=rule,
                        STATES=kind.num_states,
                        COMPACT=kind.is_compact,
                        HAS_MASTER=kind.has_master,
                        dtype=k.FLOATS[kind.dtype],
                        BITS=k.INTEGERS[kind.dtype.itemsize],
                        T=k.FLOATS[torch.float64 if kind.dtype == torch.float64 else torch.float32],
                        BLOCK=BLOCK,
                        ALIGNED=kind.aligned,
                    )
        # Reading thresholds back would make the step wait for the device.
        return [] if tally is None else [None] * len(tally.num_prune)

    def fingerprints(self, layers: Sequence[Layer]) -> list[int]:
        return [fingerprint(layer.weight) for layer in layers]

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        device = gradients[0].weight.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with on_device(device, "sum_squares"):
            for positions in by_dtype(gradients).values():
                members = [gradients[i] for i in positions]
                rows = [[g.weight.data_ptr(), address(g.mask), 0, g.weight.numel()] for g in members]
                table = self._table(rows, device)
                sums = torch.empty(table.num_chunks, dtype=torch.float64, device=device)
                weights = self._weights(members)
                del weights["INFINITY"]
                dtype = self._kernels.FLOATS[members[0].weight.dtype]
                self._launch("sum_squares", table.num_chunks, table.rows, table.owners, sums, dtype=dtype, **weights)
                total += sums.sum()
            return float(total)

    def compaction(self, mask: torch.Tensor, numel: int) -> Compaction:
        with on_device(mask.device, "compaction"):
            kept = torch.zeros(-(-numel // BLOCK) + 1, dtype=torch.int64, device=mask.device)
            self._launch("count_kept", len(kept) - 1, mask, numel, kept, BLOCK=BLOCK)
            ranks = kept.cumsum(0) - kept
            return Compaction(mask, ranks, int(ranks[-1]))

    def move_state(self, moves: Sequence[StateMove]) -> None:
        rows: dict[int, list[list[int]]] = defaultdict(list)
        for move in moves:
            source, target = (
                (0, 0) if layout is None else (layout.mask.data_ptr(), layout.ranks.data_ptr())
                for layout in (move.source_layout, move.target_layout)
            )
            row = [move.source.data_ptr(), *source, move.numel, 0, move.target.data_ptr(), *target]
            rows[move.source.element_size()].append(row)
        for size, size_rows in rows.items():
            device = moves[0].source.device
            with on_device(device, "move_state"):
                table = self._table(size_rows, device)
                constants = {"BITS": self._kernels.INTEGERS[size], "BLOCK": BLOCK}
                self._launch("repack", table.num_chunks, table.rows, table.owners, **constants)


def _bracket(
    keys: torch.Tensor, wanted: torch.Tensor, sizes: torch.Tensor, largest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that the wanted one very probably lies between; itself, where the sample is the group.

    Source: Floyd and Rivest, CACM 18(3), 1975.
    """
    ordered = keys.sort(1).values.long()
    valid = (ordered <= largest).sum(1)
    share = wanted.double() / sizes
    rank = share * valid
    half = torch.where(valid == sizes, 0.0, 2 + 4 * (rank * (1 - share)).sqrt())  # fails once in 10^4 selections
    rank = torch.where(valid == sizes, wanted, rank) - 1
    low, high = (rank - half).floor().long(), (rank + half).ceil().long()
    at = torch.stack([low, high], 1).clamp(0, keys.shape[1] - 1)
    lo, hi = ordered.gather(1, at).unbind(1)
    # Below the sample and above it anything may lie; pruned weights have keys below 0.
    return torch.where(low < 0, 0, lo.clamp(min=0)), torch.where(high >= valid, largest, hi)


class _Kind(NamedTuple):
    """Tensors that one launch of the update may serve together."""

    dtype: torch.dtype
    num_states: int
    is_compact: bool
    has_master: bool
    aligned: bool


class _Row(NamedTuple):
    """A tensor's row less what changes with every step: the gradient comes between, the constants after it."""

    kind: _Kind
    before: tuple[int, ...]
    after: tuple[int, ...]


def _prepared(t: UpdateTensor) -> _Row:
    """Make the tensor's row, once."""
    state = [s.data_ptr() for s in t.state]
    pointers = [t.weight.data_ptr(), address(t.master), *([] if t.compaction else state)]
    row = _Row(
        _Kind(
            t.weight.dtype,
            len(t.state),
            t.compaction is not None and bool(state),
            t.master is not None,
            all(pointer % 16 == 0 for pointer in pointers),
        ),
        (t.weight.data_ptr(), address(t.mask)),
        (
            *(t.weight.numel(), 0, address(t.master), *[*state, 0, 0, 0][:3]),
            0 if t.compaction is None else t.compaction.ranks.data_ptr(),
        ),
    )
    t.row = row
    return row


def _probe() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'gmp-kernels[triton]' (Linux only)"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no GPU; check nvidia-smi or rocm-smi, or set TRITON_INTERPRET=1 to run it on the host, for tests"


def _supports(device: torch.device) -> str | None:
    if device.type == "cuda" or (INTERPRETED and device.type == "cpu"):
        return None
    return f"it takes CUDA or ROCm tensors, got {device}; move them with .cuda()"


# Before cpu on a GPU; under the interpreter, which is for tests, nobody gets it without naming it.
register(Backend("triton", priority=-5 if INTERPRETED else 20, probe=_probe, supports=_supports, load=Triton))
