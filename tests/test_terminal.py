"""Text leaves a command in one place: escaped, aligned, and in whatever encoding there is."""

from __future__ import annotations

import io
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gmp_kernels import TargetError
from gmp_kernels.errors import CheckpointError, NonFiniteError, OutputError, printable
from gmp_kernels.tools.cli import main as cli
from gmp_kernels.tools.cli.terminal import Table, say

EVIL = "a\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202egnp.\u2028\u2066\x00\x7f\udcff.weight"
SHOWN = r"a\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202egnp.\u2028\u2066\x00\x7f\udcff.weight"


@given(st.text())
def test_everything_without_a_glyph_is_escaped_and_nothing_else(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert "".join(c for c in text if c.isprintable()) in (shown, "".join(c for c in text if c.isprintable()))
    if text.isprintable():
        assert shown == text
    assert printable(shown) == shown


def test_the_kinds_of_dangerous_characters() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("layers.0.q é 漢字 [red]x[/] \\x1b") == "layers.0.q é 漢字 [red]x[/] \\x1b"


def test_errors_show_names_escaped() -> None:
    for kind in (TargetError, CheckpointError, OutputError):
        error = kind(f"'{EVIL}' is\nnot there")
        assert str(error) == f"'{SHOWN}' is\nnot there"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(NonFiniteError(EVIL, layer=0, index=1)) == SHOWN


def test_a_table_is_aligned_whatever_is_in_it() -> None:
    table = Table("name", "n", "rest", right=[1])
    for name, number in (("a\x1b[1m", "1"), ("漢字", "22"), ("[red]b[/]", "333")):
        table.add_row(name, number, "x" * 90)
    lines = list(table.lines())
    assert lines[0] == "name          n   rest"
    assert set(lines[1]) == {"─"}
    assert lines[2].startswith(r"a\x1b[1m      1   xxx")
    assert lines[3].startswith("漢字         22   xxx")  # of double width
    assert lines[4].startswith("[red]b[/]   333   xxx")


def test_many_rows_cost_microseconds_each() -> None:
    table, n = Table("tensor", "dtype", "weights", right=[2]), 20_000
    start = time.process_time()
    for i in range(n):
        table.add_row(f"model.layers.{i}.weight", "F32", str(i))
    assert len(list(table.lines())) == n + 2
    # Measured: 4 us; a table of rich took more than 800.
    assert time.process_time() - start < n * 100e-6


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stream_for_less_than_all_of_unicode(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    say("é 漢 █\n")
    expected = {"ascii": r"\xe9 \u6f22 \u2588\n", "latin-1": r"é \u6f22 \u2588\n", "utf-8": r"é 漢 █\n"}
    assert raw.getvalue().decode(encoding) == expected[encoding] + "\n"


def say_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["gmp-kernels", *map(str, command)])
    with pytest.raises(SystemExit):
        cli.main()
    return "".join(capsys.readouterr())


def test_no_name_reaches_the_terminal_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of tensors, files and arguments, in tables, summaries and errors."""
    name = "a\x1b[2J\x1b]0;owned\x07\r\u202e[red]"
    folder = tmp_path / f"in{name}"
    folder.mkdir()
    save_file({f"{name}.weight": torch.randn(8, 8), f"{name}.bias": torch.ones(3)}, folder / "model.safetensors")
    save_file({f"{name}.weight": torch.full((2, 2), torch.nan)}, tmp_path / f"nan{name}.safetensors")
    (folder / f"pytorch{name}.bin").write_text("")
    out = tmp_path / f"out{name}"
    commands = [
        ["inspect", folder, "--histogram", "--json", tmp_path / f"{name}.json"],
        ["prune", folder, out, "--sparsity", ".5", "--dry-run"],
        ["prune", folder, out, "--sparsity", ".5"],
        ["prune", folder, out, "--sparsity", ".5"],
        ["prune", folder, tmp_path / "x", "--sparsity", ".5", "--targets", f"{name}.none"],
        ["prune", tmp_path / f"nan{name}.safetensors", tmp_path / "x", "--sparsity", ".5"],
        ["inspect", tmp_path / f"none{name}"],
    ]
    for command in commands:
        text = say_of(monkeypatch, capsys, *command)
        assert r"\x1b[2J\x1b]0;owned\x07\r\u202e[red]" in text
        assert text.replace("\n", "").isprintable()
    # The command line itself is at fault: typer has escaped some of it already.
    for command in (["plan", "--preset", name], ["plan", f"--{name}"], [name], ["plan", "--layer", name]):
        text = say_of(monkeypatch, capsys, *command)
        assert r"\x1b[2J\x1b]0;owned" in text and text.removesuffix("\n").isprintable()
