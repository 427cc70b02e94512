"""The committed tables of what the CUDA kernels cost are those of the kernels as they are."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest
from subprocesses import ROOT

pytestmark = pytest.mark.thorough

spec = importlib.util.spec_from_file_location("cuda_static", ROOT / "benchmarks/cuda_static.py")
cuda_static = importlib.util.module_from_spec(spec)
sys.modules["cuda_static"] = cuda_static
spec.loader.exec_module(cuda_static)

RESULTS = ROOT / "benchmarks/results"
TABLE = json.loads((RESULTS / "cuda-static.json").read_text())
COMPILED = [cuda_static.Compiled(**row) for row in TABLE["compiled"]]


@pytest.fixture(scope="module")
def counted():
    return cuda_static.counted()


def test_launches_and_bytes_are_those_committed(counted) -> None:
    """When they are no longer: python benchmarks/cuda_static.py."""
    assert [row._asdict() for row in counted] == TABLE["counted"]


def test_launches_do_not_grow_with_the_number_of_tensors(counted) -> None:
    launches = {row.name: row.launches for row in counted}
    models = [name for name in launches if name.endswith("tensors")]
    assert len(models) == 4
    for name in models:
        assert launches[name] <= (12 if name.startswith("prune") else 1)


def test_no_phase_moves_much_more_than_it_must(counted) -> None:
    for row in counted:
        if row.floor is not None:
            assert 0.95 < (row.loaded + row.stored) / row.floor < 1.4, row


def test_a_prune_step_reads_weights_once_and_little_more(counted) -> None:
    (row,) = (row for row in counted if row.name == "prune step, float32, 0.88 to 0.9")
    assert 4.0 < row.loaded + row.stored <= 6.5


def test_registers_are_spilled_once_per_chunk_at_most() -> None:
    """The kernels that keep a strip of keys in registers put some of what each chunk needs once aside."""
    assert {kernel.arch for kernel in COMPILED} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    spilling = [kernel for kernel in COMPILED if kernel.spill_stores or kernel.spill_loads]
    assert max(kernel.stack for kernel in spilling) <= 104
    assert {kernel.kernel.partition("<")[0] for kernel in spilling if kernel.arch == "sm_90"} == {"count"}
    assert not [kernel for kernel in spilling if kernel.kernel.startswith(("update", "whole_tiles", "begin"))]


def on_hopper(name: str) -> Any:
    (kernel,) = (kernel for kernel in COMPILED if (kernel.kernel, kernel.arch) == (name, "sm_90"))
    return kernel


def test_only_masks_are_read_and_written_by_the_byte() -> None:
    looked_at = [kernel for kernel in COMPILED if kernel.bytewide is not None]
    assert {kernel.kernel for kernel in looked_at} == {kernel.kernel for kernel in COMPILED}
    assert not [kernel for kernel in looked_at if kernel.bytewide]


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("count<unsigned int>", 80),
        ("count<unsigned long>", 80),
        ("apply<unsigned long>", 80),
        ("update<Rule 1, DType 0, DType 0>", 116),
        ("update<Rule 1, DType 0, DType 3>", 116),
    ],
)
def test_registers_leave_room_for_other_blocks(kernel: str, most: int) -> None:
    assert on_hopper(kernel).registers <= most


def test_whole_tiles_of_a_step_are_few_instructions() -> None:
    adam = on_hopper("whole_tiles<Rule 1, DType 0, DType 0>")
    assert adam.instructions <= 1800
    assert adam.loads_of_16_bytes == 10  # weights, gradients, three of state


def test_the_page_shows_the_table() -> None:
    assert (RESULTS / "cuda-static.md").read_text() == cuda_static.markdown(TABLE)


REPORT = """\
ptxas info    : Compiling entry function '_ZN3gmp4cuda7kernels10move_stateEPKNS0_12StateMoveRowEll' for 'sm_80'
ptxas info    : Function properties for _ZN3gmp4cuda7kernels10move_stateEPKNS0_12StateMoveRowEll
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 84 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 195.118 ms
ptxas info    : Compiling entry function '_ZN3gmp4cuda7kernels5startEv' for 'sm_90'
ptxas info    : Function properties for _ZN3gmp4cuda7kernels5startEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 384 bytes cmem[0]
"""


def test_the_compilers_report_is_read() -> None:
    first, second = cuda_static.parsed(REPORT)
    numbers = ("registers", "spill_stores", "spill_loads", "stack", "shared")
    assert (first["arch"], *(first[key] for key in numbers)) == ("sm_80", "40", "8", "4", "16", "84")
    assert (second["arch"], *(second[key] for key in numbers)) == ("sm_90", "12", "0", "0", "0", "0")
    assert [cuda_static.readable(row["kernel"]) for row in (first, second)] == ["move_state", "start"]


LISTING = """\
\t\tFunction : _ZN3gmp4cuda7kernels10move_stateEPKNS0_12StateMoveRowEll
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.U8 R2, desc[UR6][R8.64] ;           /* 0x0000000608027981 */
        /*0020*/                   LDG.E.128 R4, desc[UR6][R8.64] ;          /* 0x0000000608047981 */
        /*0030*/             @!UP1 ULDC UR4, c[0x0][0x4] ;                   /* 0x0000000608047981 */
        /*0040*/                   STG.E.U8 desc[UR6][R8.64], R2 ;           /* 0x0000000608047981 */
        /*0050*/                   LDS.U8 R2, [R3] ;                         /* 0x0000000608047981 */
        /*0060*/                   NOP;                                      /* 0x0000000000007918 */
"""


def test_the_machine_code_is_read() -> None:
    (code,) = cuda_static.counted_code(LISTING).values()
    assert code == cuda_static.Code(instructions=6, loads_of_16_bytes=1, bytewide=2)
