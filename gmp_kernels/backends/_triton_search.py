"""What selection by Triton kernels does between their reads of the weights: per group, on the device, with torch.

A group is the layers that share a threshold. Keys are those of csrc/magnitude_key.h, in int64.
"""

from __future__ import annotations

import torch

__all__ = ["BIN_BITS", "DONE", "READ_LISTS", "READ_WEIGHTS", "Search", "bracket", "sample_places"]

BIN_BITS = 11  # 2048 bins: each pass narrows a key by so many bits
SAMPLED_EIGHTS = 2048  # per group, at most: 16384 keys
NOWHERE = (1 << 63) - 9
# What a group's next pass reads; as in _triton_kernels.py.
READ_WEIGHTS, READ_LISTS, DONE = range(3)


def sample_places(ends: torch.Tensor, sizes: torch.Tensor, largest_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where eights of weights are sampled: layers and places in them, a row to the group.

    All over each group, whose layers end at ``ends`` in it; of a group of one small layer all there are. Places behind
    the end of the group lie nowhere.
    """
    eights = min(SAMPLED_EIGHTS, -(-largest_size // 8))
    number = torch.arange(eights, dtype=torch.float64, device=ends.device)
    stride = (sizes.double()[:, None] / eights).clamp(min=8)
    jitter = number * 0.6180339887498949 % 1  # in step with no period of the weights
    place = (number * stride + jitter * (stride - 8)).long()
    exists = place < sizes[:, None]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    place = place + (ends[-len(sizes) :] - sizes)[:, None]
    layers = (torch.searchsorted(starts, place, right=True) - 1).clamp(max=len(starts) - 1)
    return layers, torch.where(exists, (place - starts[layers]) & ~7, NOWHERE)


def bracket(
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


class Search:
    """The brackets of all groups, on the device: a group is the layers that share a threshold.

    Keys are int64 here, ranks run through a group's unpruned keys from 0.
    """

    def __init__(
        self, lo: torch.Tensor, hi: torch.Tensor, wanted: torch.Tensor, sizes: torch.Tensor, largest: int
    ) -> None:
        self._wanted, self._sizes, self._largest = wanted, sizes, largest
        # frexp gives the length of the span in bits, or one more where float64 rounds it up.
        shift = (torch.frexp((hi - lo).clamp(min=0).double()).exponent - BIN_BITS).clamp(min=0)
        self.state = torch.stack([lo, hi, shift.to(torch.int64), torch.full_like(lo, READ_WEIGHTS)])
        self._below = torch.zeros_like(lo)
        self._pruned = torch.zeros_like(lo)
        self.answers = torch.zeros(4, lo.numel(), dtype=torch.int64, device=lo.device)  # key, below, ties, ties kept

    def narrow(self, bins: torch.Tensor, counters: torch.Tensor, capacity: int) -> set[int]:
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

        listed = (mode == READ_LISTS) | (reads & (lo < hi) & (counters[:, 2] <= capacity))
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
