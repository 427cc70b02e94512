"""Files of results: the machine, and every row measured so far."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from gmp_kernels.backends import cpu
from gmp_kernels.errors import DeviceError, OutputError
from gmp_kernels.tools.bench.measurement import CPU, Case, Failure, Result

__all__ = ["Machine", "Record"]

Device: TypeAlias = torch.device


@dataclass(frozen=True)
class Machine:
    """Machine and versions of a measurement.

    Attributes
    ----------
    device : str
        Name of the CPU.
    cores, threads : int
        Cores of the machine, and threads of both sides.
    load : float
        Processes that wanted a core in the minute before. A load near 1 or above disturbs the measurement: if another
        process takes a core away, every parallel loop, ours or torch's, waits for longer than the loop takes.
    python, torch, numpy : str
        Versions.
    date : str
        ISO 8601, UTC.
    gpu : str, optional
        Name of the GPU, if the GPU was measured.
    isa : str, optional
        Instruction set of our kernels on the CPU; None if that backend cannot run.
    is_isa_chosen : bool
        Whether ``GMP_KERNELS_ISA`` chose it. Otherwise it is the widest set that the CPU has.
    """

    device: str
    cores: int
    threads: int
    load: float
    python: str
    torch: str
    numpy: str
    date: str
    gpu: str | None = None
    isa: str | None = None
    is_isa_chosen: bool = False

    @classmethod
    def here(cls, device: Device = CPU) -> Machine:
        """Describe this machine and process, and the GPU if ``device`` is one.

        Raises
        ------
        DeviceError
            ``device`` is a GPU, but torch can use none.
        """
        if device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                f"expected a GPU that torch can use, got none (torch {torch.__version__}); measure the CPU instead, or "
                "check nvidia-smi and that torch is a CUDA build"
            )
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
        return cls(
            device=found[1].strip() if found else platform.machine(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            load=os.getloadavg()[0],
            python=platform.python_version(),
            torch=torch.__version__,
            numpy=np.__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            isa=cpu.isa(),
            is_isa_chosen="GMP_KERNELS_ISA" in os.environ,
        )

    @property
    def slug(self) -> str:
        """Device and cores as a file name, such as ``amd-epyc-2-cores``; for a GPU its name only.

        An instruction set that was chosen is part of the name, so that the tables of several sets can stand side by
        side.
        """
        chosen = f" {self.isa}" if self.is_isa_chosen else ""
        name = self.gpu or f"{self.device} {self.cores} cores{chosen}"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain data, ready for JSON."""
        return asdict(self)


class Record:
    """A file of results. It is replaced as a whole after every row, so that a crash in a later one loses nothing.

    Parameters
    ----------
    path : Path or None
        The file; None if nothing is to be written.
    machine : Machine
    cases : sequence of Case
        All rows of the table, in its order.
    shrink : int
        Divides the number of weights.
    keeps : bool
        Whether rows that the file has already, and that are not measured now, stay in it.

    Raises
    ------
    OutputError
        Rows are to stay, but were measured with another number of threads or weights, or with other versions.
    """

    def __init__(
        self, path: Path | None, machine: Machine, cases: Sequence[Case], shrink: int = 1, *, keeps: bool = False
    ) -> None:
        self._path, self._machine, self._shrink = path, machine, shrink
        self._titles = [case.title for case in cases]
        self._rows: dict[str, dict[str, Any]] = {}
        if keeps and path is not None and path.exists():
            found = json.loads(path.read_text())
            if _setting(found) != _setting(self._document()):
                raise OutputError(
                    f"{path}: expected rows measured in this setting, to which more can be added, got another "
                    "number of threads or weights, or other versions; give another name, or measure all rows"
                )
            self._rows = {f"{row['name']} / {row['baseline_name']}": row for row in found["cases"]}

    def add(self, outcome: Result | Failure) -> None:
        """Add a row, in place of an earlier one of the same case, and write the file."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self._rows[outcome.case.title] = {**outcome.to_dict(), "date": date}
        if self._path is not None:
            scratch = self._path.with_name(self._path.name + ".new")
            scratch.write_text(json.dumps(self._document(), indent=2) + "\n")
            scratch.replace(self._path)

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """{title of the case: its row as it is in the file}, in the order of the table, without failures."""
        return {title: row for title, row in self._ordered() if "error" not in row}

    def _ordered(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((title, self._rows[title]) for title in self._titles if title in self._rows)

    def _document(self) -> dict[str, Any]:
        rows = [row for _, row in self._ordered()]
        return {"machine": self._machine.to_dict(), "shrink": self._shrink, "cases": rows}


def _setting(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what rows of one file have in common."""
    setting = {**document["machine"], "shrink": document["shrink"]}
    return {name: value for name, value in setting.items() if name not in ("load", "date")}
