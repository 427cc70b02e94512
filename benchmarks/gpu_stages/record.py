"""The record of a run: files that are updated after every fact, and the summary at the end."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_stages.running import ROOT, Outcome

MOST_CHARACTERS = 12_000  # of a summary: of a long output often only the end is shown
LONGEST_TEXT = 600
AS_TEXT: Any = {"encoding": "utf-8", "errors": "backslashreplace"}  # for every locale and every text
HEADINGS = ("ours", "median", "baseline", "median", "ratio", "must", "aim", "verdict", "GB/s")


@dataclass
class StageRecord:
    """Facts that a stage has reported and, once it has ended, its outcome."""

    name: str
    outcome: Outcome | None = None
    facts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def result(self) -> str:
        """The outcome as text."""
        return self.outcome.result if self.outcome else "running"

    def lines(self) -> list[str]:
        """Return the text for people: that of the facts and, if the stage failed, the end of its output."""
        texts = [short(fact["text"]) for fact in self.facts if fact.get("text")]
        failed = self.outcome is not None and not self.outcome.passed
        if failed and self.outcome.last_lines:
            texts += ["the last lines of its output:", *("  " + line[:200] for line in self.outcome.last_lines)]
        return "\n".join(texts).splitlines()


def short(text: Any) -> str:
    """Return the text, cut to a length that leaves room for others."""
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ..."


class Record:
    """All facts and outcomes of a run, in ``<name>.json``, ``<name>.md`` and ``<name>.log``.

    The first two are replaced as whole files after every fact; the log grows. Until the device is known, the files have
    the name that is given here.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self._log = self._path("log").open("w", **AS_TEXT)
        self.machine: dict[str, Any] = {}
        self.stages: list[StageRecord] = []

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def discard(self) -> None:
        """Remove the files, because there was nothing to record."""
        self._log.close()
        for kind in ("json", "md", "log"):
            self._path(kind).unlink(missing_ok=True)

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._name}.{kind}"

    def log(self, text: str) -> None:
        """Add text to the log only."""
        self._log.write(text)
        self._log.flush()

    def say(self, text: str) -> None:
        """Print text and add it to the log. If nobody reads the output any more, the files are still written."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w", **AS_TEXT)  # noqa: PTH123, SIM115
        self.log(text + "\n")

    def begin(self, stage: str) -> None:
        """Record all following facts as those of ``stage``."""
        self.stages.append(StageRecord(stage))

    def fact(self, fact: dict[str, Any]) -> None:
        """Record a fact of the running stage, and write all files."""
        if fact.get("text"):
            # Records are published, so paths are relative to the repository.
            fact = {**fact, "text": str(fact["text"]).replace(f"{ROOT}/", "")}
            self.say("  " + short(fact["text"]).replace("\n", "\n  "))
        if isinstance(fact.get("machine"), dict):
            self.machine |= fact["machine"]
            self._rename()
        self.stages[-1].facts.append(fact)
        self.save()

    def end(self, outcome: Outcome) -> None:
        """Record the outcome of the running stage, and write all files."""
        self.stages[-1].outcome = outcome
        self.save()

    def _rename(self) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", str(self.machine.get("gpu") or "").lower()).strip("-")
        if not slug or self._name.startswith(slug):
            return
        before = [(kind, self._path(kind)) for kind in ("json", "md", "log")]
        self._name = self._name.replace("gpu-check", slug, 1)
        for kind, path in before:
            if path.exists():
                path.replace(self._path(kind))

    @property
    def cases(self) -> list[dict[str, Any]]:
        """Facts that are rows of the benchmark table."""
        return [fact for stage in self.stages for fact in stage.facts if isinstance(fact.get("case"), dict)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data: machine and cases as ``gmp-kernels bench`` writes them, and the stages."""
        stages = []
        for stage in self.stages:
            outcome = stage.outcome or Outcome("running")
            facts = [fact for fact in stage.facts if "case" not in fact and "machine" not in fact]
            stages.append(
                {"name": stage.name, "result": stage.result, "seconds": round(outcome.seconds, 1), "facts": facts}
            )
        return {"machine": self.machine, "shrink": 1, "cases": [row["case"] for row in self.cases], "stages": stages}

    def save(self) -> None:
        """Replace the JSON and the Markdown file."""
        for kind, text in (("json", json.dumps(self.to_dict(), indent=1) + "\n"), ("md", self._markdown())):
            scratch = self._path(f"{kind}.{os.getpid()}.new")  # another run may write to the same folder
            scratch.write_text(text, **AS_TEXT)
            scratch.replace(self._path(kind))

    def _markdown(self) -> str:
        parts = [f"# {self.machine.get('gpu') or 'No GPU'}", "", "Written by `python3 benchmarks/gpu_check.py`.", ""]
        known = [f"{key}: {value}" for key, value in self.machine.items() if value is not None and key != "gpu"]
        parts += [", ".join(known), "", *_markdown_table(("stage", "result", "seconds"), self._stage_rows())]
        if self.cases:
            parts += ["", "## Measured", "", "A ratio is ours / baseline; must and aim are its bounds.", ""]
            parts += _markdown_table(HEADINGS, [row.get("cells", []) for row in self.cases])
        for stage in self.stages:
            texts = [short(f["text"]) for f in stage.facts if f.get("text") and not {"case", "machine"} & f.keys()]
            if texts:
                parts += ["", f"## {stage.name}", "", "```", *texts, "```"]
        return "\n".join(parts) + "\n"

    def _stage_rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for stage in self.stages:
            outcome = stage.outcome or Outcome("running")
            seconds = f"{outcome.seconds:.0f} of {outcome.limit:.0f}" if outcome.limit else ""
            rows.append((stage.name, short(stage.result), seconds))
        return rows

    def summary(self, most: int = MOST_CHARACTERS) -> str:
        """Return one line per stage, then the findings of each, cut to ``most`` characters in all.

        Every stage has the same room. Room that one stage does not need goes to the others.
        """
        table = aligned([("stage", "result", "seconds"), *self._stage_rows()])
        files = ", ".join(str(self._path(kind)) for kind in ("json", "md", "log"))
        frame = f"\nSUMMARY {self.machine.get('gpu') or 'no GPU'}\n{table}"[: most // 2]
        end = f"\nmore in {files}"[:500]
        sections = {stage.name: stage.lines() for stage in self.stages}
        headings = {name: f"\n-- {name}\n" for name, lines in sections.items() if lines}
        room = max(0, most - len(frame) - len(end) - sum(map(len, headings.values())))
        rooms = shared(room, [sum(len(line) + 1 for line in sections[name]) for name in headings])
        body = "".join(
            heading + _cut(sections[name], room) for (name, heading), room in zip(headings.items(), rooms, strict=True)
        )
        return (frame + body)[: most - len(end)] + end


def shared(room: int, wanted: Sequence[int]) -> list[int]:
    """Divide ``room`` evenly; an entry that wants less leaves the rest to the others."""
    given = [0] * len(wanted)
    by_want = sorted(range(len(wanted)), key=wanted.__getitem__)
    for position, index in enumerate(by_want):
        given[index] = min(wanted[index], room // (len(by_want) - position))
        room -= given[index]
    return given


def _cut(lines: Sequence[str], room: int) -> str:
    """Return the first lines that fit, and a line with the number of the others."""
    text = "\n".join(lines) + "\n"
    if len(text) <= room:
        return text
    kept, size = [], 0
    for line in lines:
        size += len(line) + 1
        if size > room - 40:
            break
        kept.append(line)
    return "\n".join([*kept, f"... {len(lines) - len(kept)} more lines in the log"])[: max(0, room - 1)] + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as aligned columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        cells += [""] * (len(headings) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return lines
