"""Tests that inspect reports what torch counts on the loaded tensors; what it draws and writes says the same."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoint_cases import adversarial_tensors, model_tensors, write_folder
from safetensors.torch import save_file
from subprocesses import run_python
from typer.testing import CliRunner

from gmp_kernels import TargetError, prune_
from gmp_kernels.checkpoints import BINS_PER_OCTAVE, PruneJob, files, inspect, inspect_checkpoint, mask_metadata
from gmp_kernels.tools.cli import checkpoints as cli_checkpoints
from gmp_kernels.tools.cli import main as cli
from gmp_kernels.tools.testing import DTYPES, adversarial_cases

RUNNER = CliRunner(env={"COLUMNS": "160"})


def run(*arguments: str | Path) -> list[list[str]]:
    result = RUNNER.invoke(cli.app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.output.splitlines()]


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "PIECE_BYTES", 256)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = adversarial_tensors(dtype) | {"any_bits": adversarial_cases(999, dtype)["any_bits"]}
    save_file(tensors, tmp_path / "a.safetensors")
    found = {t.name: t for t in inspect_checkpoint(tmp_path / "a.safetensors", histogram=True)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        magnitudes = tensor.double().abs().flatten()
        kept = magnitudes[magnitudes.isfinite() & (magnitudes > 0)]
        statistics = found[name]
        assert files.DTYPES[statistics.dtype] == dtype
        assert statistics.shape == tensor.shape
        assert statistics.num_zeros == int((magnitudes == 0).sum())
        assert statistics.num_nan == int(magnitudes.isnan().sum())
        assert statistics.num_inf == int(magnitudes.isinf().sum())
        assert statistics.sparsity == statistics.num_zeros / tensor.numel()
        assert statistics.largest == (kept.max().item() if len(kept) else None)
        assert statistics.smallest == (kept.min().item() if len(kept) else None)
        normal = kept[kept >= torch.finfo(dtype).smallest_normal]
        octaves = Counter(math.frexp(magnitude)[1] - 1 for magnitude in normal.tolist())
        seen: Counter[int] = Counter()
        for b, count in statistics.histogram.items():
            seen[b // BINS_PER_OCTAVE] += count
        assert seen.total() == len(kept)
        assert {b: n for b, n in seen.items() if b in octaves and b > min(seen)} == {
            b: n for b, n in octaves.items() if b > min(seen)
        }


@pytest.mark.usefixtures("in_pieces")
def test_quarters_of_an_octave(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 1.2, 1.25, -1.5, 1.75, 1.99, 2.0, 0.5, 0.0])}, tmp_path / "a.safetensors")
    (statistics,) = inspect_checkpoint(tmp_path / "a.safetensors", histogram=True)
    assert statistics.histogram == {-4: 1, 0: 2, 1: 1, 2: 1, 3: 2, 4: 1}


def test_dtypes_without_a_magnitude_order(tmp_path: Path) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -448.0, math.nan])
    tensors = {
        "bool": torch.tensor([True, False]),
        "complex": torch.ones(2, dtype=torch.complex64),
        "e4m3": values.to(torch.float8_e4m3fn),
        "e5m2": torch.tensor([math.inf, -0.0, 3.0]).to(torch.float8_e5m2),
        "int16": torch.tensor([0, -1, 5, 0], dtype=torch.int16),
        "none": torch.ones(0, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = {t.name: t for t in inspect_checkpoint(tmp_path / "a.safetensors")}
    numbers = {name: (t.num_zeros, t.num_nan, t.num_inf, t.smallest, t.largest) for name, t in found.items()}
    assert numbers == {
        "bool": (1, None, None, None, None),
        "complex": (None, None, None, None, None),
        "e4m3": (2, 1, 0, 1.5, 448.0),
        "e5m2": (1, 0, 1, 3.0, 3.0),
        "int16": (2, None, None, None, None),
        "none": (0, 0, 0, None, None),
    }
    assert found["none"].sparsity is None


def test_the_table_of_a_folder_and_its_total(tmp_path: Path) -> None:
    tensors = model_tensors()
    tensors[0]["layers.0.q.weight"].mul_(torch.arange(30) % 3 > 0)
    lines = run(write_folder(tmp_path / "in", tensors))
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["layers.0.q.weight"][:6] == ["F32", "20x30", "0.3333", "200", "0", "0"]
    assert rows["layers.1.norm.weight"][2:] == ["1.0000", "30", "0", "0", "-", "-"]
    assert rows["steps"][2:] == ["0.3333", "1", "-", "-", "-", "-"]
    # Counters are no weights.
    numel = sum(t.numel() for shard in tensors for t in shard.values() if t.is_floating_point())
    assert rows["total"][0] == str(numel)
    assert float(rows["total"][1]) == pytest.approx(230 / numel, abs=5e-5)


def test_a_narrow_terminal_cuts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNER.env, "COLUMNS", "40")
    name = "model.layers.10.post_attention_layernorm.weight"
    save_file({name: torch.ones(1234, 5)}, tmp_path / "a.safetensors")
    assert [name, "F32", "1234x5", "0.0000", "0", "0", "0", "1", "1"] in run(tmp_path / "a.safetensors")


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_a_folder_that_is_missing_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(cli_checkpoints, "open_checkpoint", None)
    result = RUNNER.invoke(cli.app, ["inspect", str(tmp_path), option, str(tmp_path / "none" / "a")])
    assert "expected its folder to be there, got none; create" in str(result.exception)
    result = RUNNER.invoke(cli.app, ["inspect", str(tmp_path), option, str(tmp_path)])
    assert "expected the name of a file, got a folder" in str(result.exception)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    done = run_python("-m", "gmp_kernels", "inspect", str(tmp_path / "a.safetensors"), "--json", "/dev/full")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("gmp-kernels: the output cannot be written: [Errno 28] No space left")


def test_filter(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    lines = run(folder, "--filter", "layers.1.*", "--filter", "lm_head")
    names = {line[0] for line in lines if len(line) > 5} - {"tensor"}
    assert names == {"layers.1.q.weight", "layers.1.k.weight", "layers.1.norm.weight", "lm_head.weight", "total"}
    with pytest.raises(TargetError, match="filter: expected names"):
        inspect_checkpoint(folder, only=["nothing.*"])


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    run(write_folder(tmp_path / "in"), "--json", file, "--histogram")
    document = json.loads(file.read_text())
    assert [t["name"] for t in document["tensors"]] == [t.name for t in inspect_checkpoint(tmp_path / "in")]
    q = next(t for t in document["tensors"] if t["name"] == "layers.0.q.weight")
    assert (q["dtype"], q["shape"], q["numel"], q["num_zeros"], q["sparsity"]) == ("F32", [20, 30], 600, 0, 0.0)
    assert sum(q["histogram"].values()) == 600
    assert document["total"]["numel"] == sum(t["numel"] for t in document["tensors"] if t["kind"] == "weight")


def test_what_masks_and_counters_are(tmp_path: Path) -> None:
    """Neither counts for the total; bits are shown as the weights they stand for."""
    weight = torch.randn(25, 41, generator=torch.Generator().manual_seed(0))
    (mask,) = prune_(weight, sparsity=0.3).masks
    tensors = {
        "conv.weight_orig": torch.ones(2, 2),
        "conv.weight_mask": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        "head_mask": torch.zeros(4),
        "norm.num_batches_tracked": torch.zeros((), dtype=torch.int64),
        "w.weight": weight,
        "w.weight.mask": mask.packed,
        "odd.mask": torch.zeros(3, dtype=torch.uint8),
    }
    shapes = {"w.weight": weight.shape, "odd": (9, 9)}
    save_file(tensors, tmp_path / "a.safetensors", mask_metadata(shapes))
    found = {t.name: t for t in inspect_checkpoint(tmp_path / "a.safetensors")}
    assert {name: t.kind for name, t in found.items()} == {
        "conv.weight_orig": "weight",
        "conv.weight_mask": "mask",
        "head_mask": "weight",
        "norm.num_batches_tracked": "other",
        "w.weight": "weight",
        "w.weight.mask": "mask",
        "odd.mask": "other",
    }
    bits = found["w.weight.mask"]
    assert (bits.shape, bits.numel, bits.num_zeros) == ((25, 41), 1025, 308)
    rows = {line[0]: line[1:] for line in run(tmp_path / "a.safetensors") if line}
    assert rows["w.weight.mask"] == ["bits", "mask", "25x41", "0.3005", "308", "-", "-", "-", "-"]
    assert rows["conv.weight_mask"][:5] == ["F32", "mask", "2x2", "0.7500", "3"]
    assert rows["total"][:3] == ["1033", "0.3020", "312"]


def test_masks_that_the_command_has_written(tmp_path: Path) -> None:
    PruneJob(write_folder(tmp_path / "in"), tmp_path / "out", sparsity=0.5, masks=True).run()
    for file in (tmp_path / "out" / "masks").iterdir():
        found = inspect_checkpoint(file)
        assert found and {(t.kind, t.num_zeros) for t in found} == {("mask", t.numel // 2) for t in found}


@pytest.mark.parametrize(
    "masks", ["", "[", "5", '{"shapes": 5}', '{"shapes": {"w": [-8]}}', '{"shapes": {"w": [1, "x"]}}']
)
def test_masks_of_a_file_that_says_nonsense_about_them(tmp_path: Path, masks: str) -> None:
    save_file({"w.mask": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "a.safetensors", {"masks": masks})
    assert inspect_checkpoint(tmp_path / "a.safetensors")[0].kind == "other"


def test_a_histogram_cuts_the_ranges_in_which_there_is_nothing(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([2.0**-120, 1.0, 8.0, 2.0**100]), "counter": torch.tensor([7])}
    save_file(tensors, tmp_path / "a.safetensors")
    lines = run(tmp_path / "a.safetensors", "--histogram", "--plot", tmp_path / "a.png")
    shares = [line for line in lines if line and (line[0].startswith("2^") or line[0] == "⋮")]
    assert [line[:2] for line in shares] == [
        ["2^100", "1"],
        ["⋮", "0"],
        ["2^3", "1"],
        ["2^2", "0"],
        ["2^1", "0"],
        ["2^0", "1"],
        ["⋮", "0"],
        ["2^-120", "1"],
    ]
    assert next(line for line in lines if line[:2] == ["a", "F32"])[-2:] == ["█⋮█", "█⋮█"]


def test_histograms_in_the_terminal_and_as_a_picture(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 1.5, 1.9, 4.0]), "b": torch.zeros(3)}, tmp_path / "a.safetensors")
    lines = run(tmp_path / "a.safetensors", "--histogram", "--plot", tmp_path / "a.png")
    assert ["2^2", "1", "25.00%", "█" * 13] in lines
    assert ["2^1", "0", "0.00%"] in lines
    assert ["2^0", "3", "75.00%", "█" * 40] in lines
    assert next(line for line in lines if line[:1] == ["a"])[-2:] == ["█", "▃"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_histogram_of_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert any(line[:4] == ["a", "F32", "3", "1.0000"] for line in run(tmp_path / "a.safetensors", "--histogram"))
    result = RUNNER.invoke(cli.app, ["inspect", str(tmp_path / "a.safetensors"), "--plot", str(tmp_path / "a.png")])
    assert "there is nothing to draw" in str(result.exception)
    assert not (tmp_path / "a.png").exists()
