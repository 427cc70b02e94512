"""The compiled extension refuses sizes that do not belong together, rather than walk past the end of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import HOST_BACKENDS

from gmp_kernels import BitMask
from gmp_kernels.backends import choose
from gmp_kernels.backends.keys import key_of
from gmp_kernels.backends.types import (
    Brackets,
    Compaction,
    Constants,
    Cutoffs,
    Layer,
    Selection,
    StateMove,
    UpdateBatch,
    UpdateTensor,
)
from gmp_kernels.optim import AdamW
from gmp_kernels.tools.testing import DTYPES, assert_bitwise_equal

N = 20_000  # more than a chunk
COMPILED = sorted({"cpu", "simt"} & set(HOST_BACKENDS))
ONCE = Constants([({"lr": 0.1, "step_size": 0.1, "beta2": 0.9, "momentum": 0.9}, 1)], [])


def bits(n: int = N) -> torch.Tensor:
    return BitMask.from_bool(torch.arange(n) % 3 != 0).packed


def selection() -> Selection:
    return Selection(Cutoffs.of([(key_of(0.5, torch.float32), 10, 1, 0, 0, -1)]))


class Case:
    """A backend and tensors that belong together; a test replaces one of them."""

    def __init__(self, backend: str) -> None:
        self.backend = choose(backend, torch.device("cpu"))
        self.weight, self.mask, self.out = torch.randn(N), bits(), bits()
        self.grad, self.master = torch.randn(N), torch.randn(N)
        (self.layout,) = self.backend.compactions([(self.mask, N)])
        self.state = [torch.ones(self.layout.num_kept) for _ in range(2)]
        self.target = torch.zeros(N)

    def update(self, rule: str = "adam") -> None:
        tensor = UpdateTensor(self.weight, None, tuple(self.state), self.layout.mask, self.layout)
        self.backend.update(rule, UpdateBatch([tensor]), [self.grad], [0], ONCE)

    def update_masters(self) -> None:
        tensor = UpdateTensor(self.weight.bfloat16(), self.master, mask=self.mask)
        self.backend.update("sgd", UpdateBatch([tensor]), [self.grad.bfloat16()], [0], ONCE)

    def move(self) -> None:
        self.backend.move_state([StateMove(self.state[0], self.layout, self.target, None, N)])

    def prune(self) -> None:
        self.backend.prune([Layer(self.weight, self.mask)], selection(), [self.out])

    def apply(self) -> None:
        self.backend.apply([Layer(self.weight, self.mask)])

    def count(self) -> None:
        self.backend.sum_squares([Layer(self.weight, self.mask)])

    def rank(self) -> None:
        self.backend.compactions([(self.mask, N)])


def replaced(layout: Compaction, **fields: object) -> Compaction:
    return layout._replace(**fields)


Change = Callable[[Case], None]
WRONG: list[tuple[str, Change, Callable[[Case], None], str]] = [
    ("mask of a weight", lambda c: setattr(c, "mask", c.mask[:-1]), Case.apply, "2500 elements of a mask, got 2499"),
    ("mask to prune by", lambda c: setattr(c, "mask", c.mask[:-1]), Case.prune, "2500 elements of a mask, got 2499"),
    ("place of new bits", lambda c: setattr(c, "out", c.out[:9]), Case.prune, "2500 elements of .*, got 9"),
    ("mask of gradients", lambda c: setattr(c, "mask", c.mask[:-1]), Case.count, "2500 elements of a mask"),
    ("mask to rank", lambda c: setattr(c, "mask", c.mask[:-1]), Case.rank, "2500 elements of a mask"),
    ("gradient", lambda c: setattr(c, "grad", c.grad[:-1]), Case.update, "gradient"),
    ("one state", lambda c: c.state.__setitem__(1, c.state[1][:-1]), Case.update, "elements of state, got"),
    ("master weights", lambda c: setattr(c, "master", c.master[1:]), Case.update_masters, "elements of master weights"),
    (
        "ranks",
        lambda c: setattr(c, "layout", replaced(c.layout, chunk_offsets=c.layout.chunk_offsets[:-1])),
        Case.update,
        "elements of chunk offsets",
    ),
    (
        "mask of compact state",
        lambda c: setattr(c, "layout", replaced(c.layout, mask=c.mask[:-1])),
        Case.update,
        "elements of a mask",
    ),
    (
        "number kept",
        lambda c: setattr(c, "layout", replaced(c.layout, num_kept=c.layout.num_kept - 1)),
        Case.update,
        "expected (chunk offsets of )?13332 ",
    ),
    (
        "state to move",
        lambda c: c.state.__setitem__(0, c.state[0][:-1]),
        Case.move,
        "expected (chunk offsets of )?1333",
    ),
    ("target", lambda c: setattr(c, "target", c.target[:-1]), Case.move, "20000 elements of state, got 19999"),
    (
        "ranks to move by",
        lambda c: setattr(c, "layout", replaced(c.layout, chunk_offsets=c.layout.chunk_offsets[1:])),
        Case.move,
        "elements of chunk offsets",
    ),
]


@pytest.mark.parametrize(("change", "call", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
@pytest.mark.parametrize("backend", COMPILED)
def test_what_does_not_belong_together_is_refused(
    backend: str, change: Change, call: Callable[[Case], None], message: str
) -> None:
    call(Case(backend))
    case = Case(backend)
    change(case)
    tensors = [case.weight, case.mask, case.out, case.master, *case.state, case.target]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=message):
        call(case)
    for tensor, was in zip(tensors, before, strict=True):
        assert_bitwise_equal(tensor, was)


@pytest.mark.parametrize(("rule", "number"), [("adam", 1), ("sgd", 2), ("average", 1)])
def test_a_rule_without_the_state_it_keeps_is_refused(rule: str, number: int) -> None:
    case = Case("cpu")
    case.state = [torch.ones(case.layout.num_kept)] * number
    with pytest.raises(ValueError, match="arrays of state"):
        case.update(rule)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_state_of_a_dtype_that_has_no_kernel_is_refused(backend: str, dtype: torch.dtype) -> None:
    case = Case(backend)
    case.state = [values.to(dtype) for values in case.state]
    before = case.weight.clone()
    with pytest.raises(ValueError, match=f"state of .*, got {str(dtype).removeprefix('torch.')}"):
        case.update()
    assert_bitwise_equal(case.weight, before)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_of_every_dtype_is_moved(backend: str, dtype: torch.dtype) -> None:
    case = Case(backend)
    case.state[0] = torch.arange(case.layout.num_kept).to(dtype)
    case.target = case.target.to(dtype)
    case.move()
    kept = BitMask(case.mask, (N,)).to_bool()
    expected = torch.zeros(N, dtype=dtype).masked_scatter_(kept, case.state[0])
    assert_bitwise_equal(case.target, expected)


def test_bits_written_behind_torchs_back_are_noticed_before_state_is_walked_by_them() -> None:
    """More bits than there are values would have the kernel write past the end of the state."""
    parameter = torch.nn.Parameter(torch.randn(N))
    parameter.grad = torch.randn(N)
    optimizer = AdamW([parameter], compact_state=True, backend="cpu")
    mask = BitMask(bits(), (N,))
    optimizer.set_masks({parameter: mask})
    optimizer.step()
    before = parameter.detach().clone()
    (state,) = optimizer.state.values()
    laid_out = [v for v in vars(optimizer).values() if hasattr(v, "get") and hasattr(v, "version")]
    layout = laid_out[0].get(parameter) if laid_out else state.layout
    layout.mask.data[-1] = 0xFF
    for _ in range(2):
        with pytest.raises(ValueError, match="bits by which compact state was laid out, got a mask written since"):
            optimizer.step()
        assert_bitwise_equal(parameter.detach(), before)


SHIFTED, SHORT, LARGER = ((2 * N,), (N,), (N,)), ((N,), (0,), (N - 1,)), ((N - 1,), (0,), (N,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": [-1, 4, 8, 8]}, "ascend"),
        ({"places": [0, 5, 4, 8]}, "ascend"),
        ({"places": [0, 4, 8, N + 1]}, "ascend"),
        ({"row": 2}, "positions of layers"),
        ({"bracket": (5, 8)}, "lie in them"),
        ({"bracket": (0, 3)}, "lie in them"),
        ({"region": SHIFTED}, "lie in them"),
        ({"region": SHORT}, "as many weights as its layer"),
        ({"region": LARGER}, "exceeds its whole"),
    ],
    ids=str,
)
def test_slots_outside_of_a_layer_are_refused(change: dict[str, object], message: str) -> None:
    case = Case("cpu")
    layers = [Layer(case.weight, case.mask)] * 2
    asked = {"places": [0, 4, 8, N], "row": 1, "bracket": (4, 7), "region": ((N,), (0,), (N,))}

    def count(row: int, places: list[int], bracket: tuple[int, int], region: object) -> np.ndarray:
        ends = Brackets.of([4, bracket[0]], [7, bracket[1]])
        all_places = np.array([[0, 4, 8, N], places])
        regions = [((N,), (0,), (N,)), region]
        return case.backend.count_slots(layers, np.array([0, row]), np.array([1, 1]), all_places, ends, regions, 4)

    assert count(**asked).sum() == 0
    with pytest.raises(ValueError, match="indices are those of a single slot"):
        case.backend.count_slots(
            layers,
            np.array([0]),
            np.array([1]),
            np.array([[0, 4, 8, N]]),
            Brackets.of([4], [7]),
            [((N,), (0,), (N,))],
            4,
            np.zeros((1, 3), np.int64),
        )
    with pytest.raises(ValueError, match=message):
        count(**{**asked, **change})


@pytest.mark.parametrize("group", [(0, 3, 9), (2, 1, 9), (0, 0, 9), (0, 1, 0), (0, 1, 1 << 20)])
def test_samples_of_other_layers_or_sizes_are_refused(group: tuple[int, int, int]) -> None:
    case = Case("cpu")
    with pytest.raises(ValueError, match=r"a sample (needs layers, and a number of weights|does not fit its row)"):
        case.backend.draw([Layer(case.weight, case.mask)] * 2, [(0, 1, 9), group])
