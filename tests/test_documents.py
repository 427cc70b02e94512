"""The documents name what is there: every folder, every test file, and files behind every link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from subprocesses import ROOT

PLACES = ("*.md", "docs/**/*.md", "examples/*.md", "tests/*.md", "benchmarks/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
GENERATED = {ROOT / "docs/command-line.md"}  # by make docs


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", path.read_text())
    files = {path.parent / link for link in links if "://" not in link}
    assert not [file for file in files if not file.exists() and file.resolve() not in GENERATED]


def test_contributing_names_every_folder() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = [path for part in ("gmp_kernels", "csrc") for path in (ROOT / part).glob("[a-z]*/[a-z]*.*")]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in files}
    assert not {folder for folder in folders if f"`{folder}/`" not in text}


def test_the_map_of_the_tests_names_every_file() -> None:
    text = (ROOT / "tests/README.md").read_text()
    names = {path.stem for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "distributed_jobs"}
    named = set(re.findall(r"`(?:gpu/)?(\w+)`", text))
    assert sorted(names - named) == []
    assert not {name for name in named - names if name.startswith("test_")}
