"""Pruning a checkpoint by a pattern gives the bits of ``prune_`` on its tensors, however files are cut into pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import TINY, adversarial_tensors, assert_masks, assert_pruned, contents, load, write_folder
from optim_cases import one_thread as one_thread
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gmp_kernels import GMPError, NonFiniteError, ShapeError, SparsityError, StateError, prune_
from gmp_kernels.checkpoints import DEFAULT_MEMORY, PruneJob, inspect, inspect_checkpoint, stream
from gmp_kernels.checkpoints.masks import read_masks
from gmp_kernels.checkpoints.staging import Staging
from gmp_kernels.patterns import NM, Block, Pattern, Unstructured
from gmp_kernels.tools.cli import main as cli
from gmp_kernels.tools.testing import DTYPES, assert_bitwise_equal

PATTERNS = {
    "2:4": (NM(2, 4), (24, 44)),
    "1:4": (NM(1, 4), (9, 20)),
    "odd": (NM(2, 5), (21, 35)),
    "of 32": (NM(30, 32), (13, 96)),
    "transposed": (NM(2, 4, dim=0), (24, 43)),
    "conv": (NM(2, 4), (6, 8, 3, 3)),
    "conv dim 0": (NM(3, 7, dim=0), (14, 5, 3, 3)),
    "block": (Block(4, 4), (24, 44)),
    "odd block": (Block(3, 5), (21, 35)),
    "row block": (Block(1, 16), (13, 48)),
    "column block": (Block(8, 1), (48, 7)),
    "wide block": (Block(32, 2), (64, 138)),
    "conv block": (Block(2, 3), (6, 5, 3, 3)),
    "kept rows": (Unstructured(3), (24, 43)),
}
CASES = ["random", "constant", "small_integers", "mostly_zeros", "bfloat16_ties", "every_exponent"]
MEMORIES = {"many pieces": TINY, "few pieces": 1 << 14, "whole": DEFAULT_MEMORY}
USUAL = {(torch.float32, "many pieces"), (torch.bfloat16, "few pieces"), (torch.float64, "whole")}


def settings() -> list[Any]:
    return [
        pytest.param(dtype, memory, marks=[] if (dtype, memory) in USUAL else pytest.mark.thorough)
        for dtype in DTYPES
        for memory in MEMORIES
    ]


RUNNER = CliRunner(env={"COLUMNS": "160"})


def shares(pattern: Pattern, shape: tuple[int, ...]) -> list[float]:
    """Sparsities on the way to all that a pattern allows."""
    most = pattern.most(shape) / torch.Size(shape).numel()
    return [0.31 * most, 0.77 * most, most]


def tensors_of(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    given = adversarial_tensors(dtype, shape[0], torch.Size(shape[1:]).numel())
    return {f"{name}.weight": given[f"{name}.weight"].view(shape) for name in CASES}


@pytest.mark.parametrize(("dtype", "memory"), settings(), ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_are_pruned_as_the_whole(tmp_path: Path, name: str, dtype: torch.dtype, scope: str, memory: str) -> None:
    pattern, shape = PATTERNS[name]
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    # What is no target moves the others to odd places.
    save_file(tensors_of(shape, dtype) | {"a.bias": torch.ones(3, dtype=torch.uint8)}, source)
    for sparsity in shares(pattern, shape):
        job = PruneJob(source, target, sparsity=sparsity, scope=scope, pattern=pattern, masks=True, force=True)
        report = job.run(max_memory=MEMORIES[memory])
        names = [tensor.name for tensor in job.tensors]
        masks = assert_pruned(source, target, names, sparsity=sparsity, scope=scope, pattern=pattern)
        assert_masks(tmp_path / "out.masks.safetensors", dict(zip(names, masks, strict=True)))
        assert [layer.num_pruned for layer in report.layers] == [mask.numel - mask.num_kept for mask in masks]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 4, dim=0), Block(4, 4), Block(8, 1)], ids=str)
def test_the_first_count_nearly_always_suffices(
    tmp_path: Path, pattern: Pattern, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of whole groups or blocks brackets the threshold, so that the file is read twice and no more."""
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({f"{i}.weight": torch.randn(96, 4096, generator=generator).bfloat16() for i in range(3)}, source)
    num_read = 0
    read = stream.read_into

    def noted(buffer: torch.Tensor, *place: Any) -> None:
        nonlocal num_read
        num_read += buffer.nbytes
        read(buffer, *place)

    monkeypatch.setattr(stream, "read_into", noted)
    PruneJob(source, target, sparsity=0.3, scope=scope, pattern=pattern).run(max_memory=1 << 20)
    assert_pruned(source, target, [f"{i}.weight" for i in range(3)], sparsity=0.3, scope=scope, pattern=pattern)
    nbytes = source.stat().st_size
    assert 2 * nbytes - 10_000 < num_read <= 2 * nbytes
    num_read = 0
    # At the most that the pattern allows there is nothing to count.
    job = PruneJob(source, target, sparsity=0.5, scope=scope, pattern=NM(2, 4), force=True)
    job.run(max_memory=1 << 20)
    assert num_read <= nbytes
    assert_pruned(source, target, [f"{i}.weight" for i in range(3)], sparsity=0.5, scope=scope, pattern=NM(2, 4))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Block(4, 4)], ids=str)
def test_with_and_without_the_compiled_kernels(
    tmp_path: Path, pattern: Pattern, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GMP_KERNELS_BACKEND", backend)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors_of((12, 20), torch.float16), source)
    for scope in ("layer", "global"):
        job = PruneJob(source, target, sparsity=0.4, scope=scope, pattern=pattern, force=True)
        job.run(max_memory=TINY)
        names = [tensor.name for tensor in job.tensors]
        assert_pruned(source, target, names, sparsity=0.4, scope=scope, pattern=pattern)


def test_a_folder_converted_with_masks(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    pattern, only = NM(1, 5), ["layers.0", "layers.2.q"]
    job = PruneJob(source, target, sparsity=0.7, pattern=pattern, targets=only, dtype=torch.float64, masks=True)
    job.run(max_memory=TINY)
    before, after = load(source), load(target)
    for name in ("layers.0.q.weight", "layers.0.k.weight", "layers.2.q.weight"):
        expected = before[name].clone()
        (mask,) = prune_(expected, sparsity=0.7, pattern=pattern, backend="reference").masks
        assert_bitwise_equal(after[name], expected.double(), name)
        shard = next(file for file in target.glob("*.safetensors") if name in load_file(file))
        assert read_masks(target / "masks" / shard.name)[name] == mask
    assert_bitwise_equal(after["layers.1.q.weight"], before["layers.1.q.weight"].double(), "no target")


@pytest.mark.parametrize("max_memory", [TINY, DEFAULT_MEMORY])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
@pytest.mark.parametrize("pattern", [NM(2, 4), Block(2, 2)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_and_inf_are_found_wherever_they_are_ranked(
    tmp_path: Path, bad: float, pattern: Pattern, sparsity: float, scope: str, max_memory: int
) -> None:
    """The bad weight would be protected, or in a sum; at 0.5 no threshold is looked for."""
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    weights = {name: torch.randn(64, 64) for name in ("a.weight", "b.weight")}
    weights["b.weight"][50, 7] = bad
    save_file(weights, source)
    job = PruneJob(source, target, sparsity=sparsity, scope=scope, pattern=pattern)
    with pytest.raises(NonFiniteError, match=f"'b.weight' at flat index {50 * 64 + 7}; no output") as caught:
        job.run(max_memory=max_memory)
    assert caught.value.index == 50 * 64 + 7 and not target.exists()


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    shapes = {"a.weight": (8, 16), "b.weight": (4, 7), "c.weight": (3, 4), "d.weight": (6, 3, 3, 3)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, source)
    for pattern, misfits in ((NM(2, 4), "bd"), (NM(2, 4, dim=0), "cd"), (Block(4, 4), "bcd")):
        with pytest.raises(ShapeError, match="fit their patterns") as caught:
            PruneJob(source, target, sparsity=0.5, pattern=pattern)
        assert str(caught.value).endswith(f"ignore=[{', '.join(repr(f'{name}.weight') for name in misfits)}]")
        PruneJob(source, target, sparsity=0.5, pattern=pattern, ignore=[f"{name}.weight" for name in misfits])
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_more_than_the_pattern_allows_is_refused(tmp_path: Path, scope: str) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"a.weight": torch.randn(8, 16), "b.weight": torch.randn(8, 8)}, source)
    label = "'a.weight'" if scope == "layer" else "all weights together"
    with pytest.raises(SparsityError, match=rf"at most 0.75 for {label} \(1:4\), got"):
        PruneJob(source, target, sparsity=0.8, scope=scope, pattern=NM(1, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_run_is_resumed_with_its_own_pattern_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    only = ["layers.0", "layers.2"]

    def job(out: Path, pattern: Pattern | None) -> PruneJob:
        return PruneJob(source, out, sparsity=0.4, scope="global", pattern=pattern, targets=only)

    finish = Staging.finish

    def stop(*arguments: Any) -> None:
        finish(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Staging, "finish", stop)
        job(target, Block(2, 2)).run(max_memory=TINY)
    for other in (Block(1, 2), None):
        with pytest.raises(StateError):
            job(target, other).run(resume=True)
    job(target, Block(2, 2)).run(resume=True)
    job(tmp_path / "whole", Block(2, 2)).run()
    assert contents(target) == contents(tmp_path / "whole")


def test_wide_bands_take_the_memory_that_they_need(tmp_path: Path) -> None:
    """Two bands of 32 rows are more than the memory allowed; a band that is no whole number of mask bytes is eight."""
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(
        {"a.weight": torch.randn(96, 1000), "b.weight": torch.randn(96, 33), "c.weight": torch.randn(99, 33)}, source
    )
    for pattern, only in ((Block(32, 1), ["a", "b"]), (Block(3, 11), ["b", "c"]), (Block(3, 1), ["a", "b", "c"])):
        job = PruneJob(source, target, sparsity=0.4, pattern=pattern, targets=only, force=True)
        job.run(max_memory=TINY)
        assert_pruned(source, target, [tensor.name for tensor in job.tensors], sparsity=0.4, pattern=pattern)


def test_a_report_says_where_the_pattern_alone_decides(tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    weight = torch.arange(1.0, 65.0).view(4, 16)
    save_file({"a.weight": weight}, source)
    for max_memory in (TINY, DEFAULT_MEMORY):
        for sparsity in (0.5, 0.25):
            for pattern in (NM(2, 4), Block(2, 2)):
                job = PruneJob(source, target, sparsity=sparsity, pattern=pattern, force=True)
                (layer,) = job.run(max_memory=max_memory).layers
                result = prune_(weight.clone(), sparsity=sparsity, pattern=pattern, backend="reference")
                (threshold,) = result.thresholds
                assert (layer.threshold, layer.num_ties) == (threshold.value, threshold.num_ties)
                assert layer.num_pruned == layer.num_newly_pruned == sparsity * 64


def command(*arguments: object) -> str:
    result = RUNNER.invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refusal(*arguments: object) -> str:
    """The line that the command line would print."""
    error = RUNNER.invoke(cli.app, list(map(str, arguments)), standalone_mode=False).exception
    if isinstance(error, cli.UsageError):
        return cli.in_one_line(error)
    assert isinstance(error, GMPError), error
    return cli.in_flags(str(error), cli.flags_of(list(map(str, arguments))))


@pytest.mark.parametrize(
    ("words", "pattern", "sparsity"),
    [
        ("--pattern 2:4", NM(2, 4), 0.5),
        ("--pattern 1:4 --scope global", NM(1, 4), 0.75),
        ("--pattern 2:4@0 --sparsity 0.3", NM(2, 4, dim=0), 0.3),
        ("--pattern 2:3@2 --targets conv", NM(2, 3, dim=2), 1 / 3),
        ("--pattern 4x4 --sparsity 0.6", Block(4, 4), 0.6),
        ("--pattern 8x1 --sparsity 0.6 --scope global", Block(8, 1), 0.6),
    ],
)
def test_the_command_prunes_by_a_pattern(tmp_path: Path, words: str, pattern: Pattern, sparsity: float) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"conv.weight": torch.randn(8, 12, 3, 3), "fc.weight": torch.randn(16, 40)}, source)
    output = command("prune", source, target, *words.split())
    names = ["conv.weight"] if "conv" in words else ["conv.weight", "fc.weight"]
    scope = "global" if "global" in words else "layer"
    assert_pruned(source, target, names, sparsity=sparsity, scope=scope, pattern=pattern)
    zeros = sum(int((load(target)[name] == 0).sum()) for name in names)
    assert f"to a sparsity of {zeros / sum(load(target)[name].numel() for name in names):.4f}" in output


def test_what_the_command_refuses(tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = {"a.weight": torch.randn(8, 16), "b c.weight": torch.randn(8, 6), "d.weight": torch.randn(3, 7)}
    save_file(tensors, source)

    def said(words: str) -> str:
        return refusal("prune", source, target, *words.split())

    assert said("--pattern 2:4") == (
        "prune: expected weights whose shapes fit their patterns, got 'b c.weight' cannot be 2:4: size 6 of dim 1 is "
        "not divisible by 4; 'd.weight' cannot be 2:4: size 7 of dim 1 is not divisible by 4. Leave them out: "
        "--ignore 'b c.weight' --ignore d.weight"
    )
    assert said("--pattern 2:4 --targets a --sparsity 0.6") == (
        "prune: expected a sparsity of at most 0.5 for 'a.weight' (2:4), got 77 of 128 weights to prune; the pattern "
        "allows 64"
    )
    assert said("--pattern 4x4") == "--sparsity: expected a fraction to prune, got none"
    assert said("") == "--sparsity: expected a fraction to prune, got none"
    assert said("--pattern 4:2") == "--pattern: expected 1 <= keep < of <= 32, got keep=4, of=2"
    assert said("--pattern 64x1") == "--pattern: expected 1 to 32 rows and cols, not both 1, got 64 x 1"
    for word in ("2/4", "2:4:1", "4x", "x", "2:4@", "-1:4", "2:4 "):
        line = refusal("prune", source, target, f"--pattern={word}")
        assert line == f"--pattern: expected N:M such as 2:4, or blocks such as 4x4, got {word!r}"
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def zeros_of(name: str) -> torch.Tensor:
    """A mask (True = zero) of shape 64 x 96, of which no more is known than its name says."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(64, 96, generator=generator)
    if name == "unstructured":
        return scores < 0.5
    if name in ("dense", "all"):
        return torch.full((64, 96), name == "all")
    if "x" in name:
        rows, cols = map(int, name.split("x"))
        return (scores[::rows, ::cols] < 0.5).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    n, of = map(int, name.removesuffix("@0").split(":"))
    if name.endswith("@0"):
        return zeros_of_groups(scores.T.reshape(96, -1, of), n).view(96, 64).T.contiguous()
    return zeros_of_groups(scores.view(64, -1, of), n).view(64, 96)


def zeros_of_groups(scores: torch.Tensor, keep: int) -> torch.Tensor:
    return scores.argsort(-1).argsort(-1) >= keep


FOUND = {
    "1:4": ["1:4"],
    "2:4": ["2:4"],
    "4:8": ["4:8"],
    "1:2": ["2:4"],
    "3:4": [],
    "1:4@0": ["1:4 along dim 0"],
    "4:8@0": ["4:8 along dim 0"],
    "32x32": ["blocks of 32 x 32"],
    "16x16": ["blocks of 16 x 16"],
    "4x4": ["blocks of 4 x 4"],
    "1x32": ["blocks of 1 x 32"],
    "1x4": ["blocks of 1 x 4"],
    "8x1": ["blocks of 8 x 1"],
    "2x2": [],
    "unstructured": [],
    "dense": [],
    "all": [],
}


@pytest.mark.parametrize("piece_bytes", [1 << 13, 1 << 14, 1 << 22])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_inspect_recognizes_patterns(
    tmp_path: Path, dtype: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "PIECE_BYTES", piece_bytes)
    weights = torch.full((64, 96), 3.0)
    weights[::2] = -2.0
    kind = getattr(torch, dtype)
    save_file({name: weights.masked_fill(zeros_of(name), -0.0).to(kind) for name in FOUND}, tmp_path / "a.safetensors")
    found = {t.name: list(t.patterns) for t in inspect_checkpoint(tmp_path / "a.safetensors")}
    rows = piece_bytes // kind.itemsize // 96  # of a piece; the largest blocks that fit are found
    sides = {name: min(rows // 4 * 4, 16) for name in ("32x32",) if rows < 32}
    assert found == FOUND | {name: [f"blocks of {side} x {side}"] for name, side in sides.items()}


def test_one_weight_more_breaks_a_pattern_in_any_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "PIECE_BYTES", 1 << 13)
    path = tmp_path / "a.safetensors"
    for name, looser in (("1:4", ("2:4",)), ("2:4", ()), ("16x16", ()), ("1x8", ())):
        kept = (~zeros_of(name)).float()
        places = (kept == 0).flatten().nonzero().flatten()
        for place in (places[0], places[len(places) // 2], places[-1]):
            weights = kept.clone()
            weights.view(-1)[place] = 5.0
            save_file({"a": weights}, path)
            (found,) = inspect_checkpoint(path)
            assert found.patterns == looser, (name, int(place))


def test_patterns_of_convolutions_and_of_what_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = {
        "conv": prune_one(torch.randn(8, 16, 3, 3), NM(2, 4)),
        "transposed": prune_one(torch.randn(8, 15, 3, 3), NM(2, 4, dim=0)),
        "blocks": prune_one(torch.randn(8, 16, 3, 3), Block(8, 16)),
        "vector": torch.tensor([0.0, 0.0, 1.0, 1.0]),
        "scalar": torch.tensor(0.0),
        "none": torch.ones(0, 4),
        "odd": torch.zeros(3, 7).index_fill_(0, torch.tensor([1]), 2.0),
    }
    save_file(weights, path)
    assert {t.name: t.patterns for t in inspect_checkpoint(path)} == {
        "conv": ("2:4",),
        "transposed": ("2:4 along dim 0",),
        "blocks": ("blocks of 8 x 8",),
        "vector": (),
        "scalar": (),
        "none": (),
        "odd": (),
    }


def prune_one(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    prune_(weight, sparsity=0.5, pattern=pattern)
    return weight


def test_the_table_says_what_zeros_keep_to(tmp_path: Path) -> None:
    path, numbers = tmp_path / "a.safetensors", tmp_path / "a.json"
    dense = {"b.weight": torch.ones(8, 16)}
    save_file(dense, path)
    assert "zeros keep to" not in command("inspect", path)
    save_file(dense | {"a.weight": prune_one(torch.randn(8, 16), NM(2, 4))}, path)
    lines = command("inspect", path, "--json", numbers).splitlines()
    assert lines[1].split()[-3:] == ["zeros", "keep", "to"]
    rows = {line.split()[0]: line.split()[-1] for line in lines[3:] if line}
    assert rows["a.weight"] == "2:4" and rows["b.weight"] == "1"
    found = {tensor["name"]: tensor["patterns"] for tensor in json.loads(numbers.read_text())["tensors"]}
    assert found == {"a.weight": ["2:4"], "b.weight": []}


def test_inspect_takes_tensors_without_elements(tmp_path: Path) -> None:
    shapes = {"a": (0, 0), "b": (0, 8), "c": (8, 0), "d": (0,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "m.safetensors")
    assert [(t.numel, t.patterns) for t in inspect_checkpoint(tmp_path / "m.safetensors")] == [(0, ())] * 4
