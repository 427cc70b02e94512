"""Pruning a checkpoint on disk gives, to the bit, what the oracle makes of its tensors; the rest is copied."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    INDEX,
    TINY,
    adversarial_tensors,
    assert_masks,
    assert_pruned,
    contents,
    load,
    model_tensors,
    shard_files,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import save_file

from gmp_kernels import BitMask, DTypeError, NonFiniteError, ShapeError, TargetError, prune_
from gmp_kernels.checkpoints import DEFAULT_MEMORY, PruneJob, stream
from gmp_kernels.checkpoints.prune import _buffers
from gmp_kernels.tools.testing import DTYPES, assert_bitwise_equal

DEFAULT_TARGETS = [f"layers.{i}.{name}.weight" for i in range(3) for name in ("k", "q")]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces this small are not worth waking threads for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_of_a_file_are_pruned_as_the_whole(
    tmp_path: Path, dtype: torch.dtype, scope: str, sparsity: float
) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(adversarial_tensors(dtype), source, {"format": "pt", "note": "kept"})
    job = PruneJob(source, target, sparsity=sparsity, scope=scope, masks=True)
    report = job.run(max_memory=TINY)
    names = [tensor.name for tensor in job.tensors]
    masks = assert_pruned(source, target, names, sparsity=sparsity, scope=scope)
    assert_masks(tmp_path / "out.masks.safetensors", dict(zip(names, masks, strict=True)))
    assert [layer.num_pruned for layer in report.layers] == [mask.numel - mask.num_kept for mask in masks]
    assert report.sparsity == pytest.approx(sum(layer.num_pruned for layer in report.layers) / (len(names) * 24 * 43))
    # Header and layout are those of the input.
    assert target.stat().st_size == source.stat().st_size
    header_bytes = 8 + int.from_bytes(source.read_bytes()[:8], "little")
    assert target.read_bytes()[:header_bytes] == source.read_bytes()[:header_bytes]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_with_and_without_the_compiled_kernels(
    tmp_path: Path, backend: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GMP_KERNELS_BACKEND", backend)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = adversarial_tensors(torch.float16, 7, 50)
    names = ["bfloat16_ties.weight", "mostly_zeros.weight", "two_values.weight"]
    save_file({name: tensors[name] for name in names}, source)
    PruneJob(source, target, sparsity=0.6, scope=scope).run(max_memory=TINY)
    assert_pruned(source, target, names, sparsity=0.6, scope=scope)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("max_memory", [TINY, 1 << 14, DEFAULT_MEMORY])
def test_the_memory_allowed_does_not_change_the_result(tmp_path: Path, scope: str, max_memory: int) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = adversarial_tensors(torch.bfloat16, 64, 129)
    save_file(tensors | {"odd.bias": torch.ones(3, dtype=torch.uint8)}, source)
    job = PruneJob(source, target, sparsity=0.6, scope=scope)
    job.run(max_memory=max_memory)
    assert_pruned(source, target, [tensor.name for tensor in job.tensors], sparsity=0.6, scope=scope)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_do_not_change_the_result(tmp_path: Path, scope: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({f"{i}.weight": torch.randn(500, 700, generator=generator).bfloat16() for i in range(3)}, source)
    job = PruneJob(source, target, sparsity=0.8, scope=scope)
    job.run(max_memory=1 << 20)
    assert_pruned(source, target, [tensor.name for tensor in job.tensors], sparsity=0.8, scope=scope)


def tensors_around(num_bytes: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Targets of just what fits so many bytes, a little less or more, much more, and next to nothing; many ties."""
    fits = num_bytes // dtype.itemsize
    sizes = [fits - 1, 1, fits, 7, fits + 1, fits // 2, fits // 2 + 3, 3 * fits + 5, fits, fits]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator).mul(2 + i % 3 * 40).round().to(dtype) for i, n in enumerate(sizes)]
    others = {f"{i}.steps": torch.arange(i) for i in range(0, len(sizes), 3)}
    return {f"{i}.weight": weight.view(1, -1) for i, weight in enumerate(weights)} | others


@pytest.mark.parametrize("output", [None, torch.float64, torch.float16])
@pytest.mark.parametrize("max_memory", [TINY, 3 * TINY + 100, 1 << 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_around_what_is_held_at_once(
    tmp_path: Path, dtype: torch.dtype, max_memory: int, output: torch.dtype | None
) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    piece_bytes, num_buffers = _buffers(max_memory, output, "layer")
    before = tensors_around(piece_bytes * num_buffers, dtype)
    save_file(before, source)
    PruneJob(source, target, sparsity=0.7, dtype=output, masks=True).run(max_memory=max_memory)
    names = [name for name in before if name.endswith(".weight")]
    result = prune_([before[name] for name in names], sparsity=0.7, backend="reference")
    after = load(target)
    for name in names:
        assert_bitwise_equal(after[name], before[name].to(output or dtype), name)
    assert_masks(tmp_path / "out.masks.safetensors", dict(zip(names, result.masks, strict=True)))


def test_what_fits_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.safetensors"
    piece_bytes, num_buffers = _buffers(TINY, None, "layer")
    fits = piece_bytes * num_buffers // 4
    save_file({f"{i}.weight": torch.randn(1, n) for i, n in enumerate([fits, 9, fits, fits // 3, fits])}, source)
    places: list[int] = []
    read = stream.read_into

    def noted(buffer: torch.Tensor, source: FileIO, offset: int) -> None:
        places.append(offset)
        read(buffer, source, offset)

    monkeypatch.setattr(stream, "read_into", noted)
    PruneJob(source, tmp_path / "out.safetensors", sparsity=0.5).run(max_memory=TINY)
    assert len(places) == len(set(places))
    assert_pruned(source, tmp_path / "out.safetensors", [f"{i}.weight" for i in range(5)], sparsity=0.5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_folder_is_copied_whole(tmp_path: Path, scope: str) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    (source / "tokenizer.json").symlink_to(source / "config.json")
    (source / "run.sh").write_text("true")
    (source / "run.sh").chmod(0o755)
    before = contents(source)
    job = PruneJob(source, target, sparsity=0.7, scope=scope, masks=True)
    assert [tensor.name for tensor in job.tensors] == DEFAULT_TARGETS
    job.run(max_memory=TINY)
    masks = assert_pruned(source, target, DEFAULT_TARGETS, sparsity=0.7, scope=scope)
    for file, pair in zip(shard_files(target), [masks[0:2], masks[2:4], masks[4:6]], strict=True):
        names = [name for name in DEFAULT_TARGETS if name in load(file)]
        assert_masks(target / "masks" / file.name, dict(zip(names, pair, strict=True)))
    after = contents(target)
    assert contents(source) == before
    others = {name for name in before if not name.endswith(".safetensors")}
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    assert set(after) == set(before) | {f"masks/{file.name}" for file in shard_files(target)}
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "run.sh").stat().st_mode & 0o111
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    (source / INDEX).unlink()
    PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert_pruned(source, tmp_path / "out", DEFAULT_TARGETS, sparsity=0.5)


def test_weights_beside_the_index_are_copied_as_they_are_when_asked_for(tmp_path: Path) -> None:
    source, name = write_folder(tmp_path / "in"), "consolidated.safetensors"
    save_file({"layers.0.q.weight": torch.ones(3, 3)}, source / name)
    PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert not (tmp_path / "out" / name).exists()
    PruneJob(source, tmp_path / "both", sparsity=0.5, copy_others=True).run()
    assert (tmp_path / "both" / name).read_bytes() == (source / name).read_bytes()


def test_tensors_need_not_be_aligned(tmp_path: Path) -> None:
    """The format allows it; the safetensors library itself writes wide dtypes first."""
    weight = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
    entries = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a.weight": {"dtype": "F32", "shape": [9, 70], "data_offsets": [1, 1 + weight.nbytes]},
    }
    text = json.dumps(entries).encode()
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + weight.numpy().tobytes())
    PruneJob(source, target, sparsity=0.5).run(max_memory=TINY)
    prune_(weight, sparsity=0.5, backend="reference")
    assert target.read_bytes()[: 8 + len(text) + 1] == source.read_bytes()[: 8 + len(text) + 1]
    assert target.read_bytes()[8 + len(text) + 1 :] == weight.numpy().tobytes()


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (None, None, DEFAULT_TARGETS),
        (None, ["layers.1"], DEFAULT_TARGETS[:2] + DEFAULT_TARGETS[4:]),
        (["layers.2"], None, DEFAULT_TARGETS[4:]),
        (["layers.2.q"], None, ["layers.2.q.weight"]),
        (["*.q"], ["re:layers\\.[01]"], ["layers.2.q.weight"]),
        (["layers.0.q.bias", "lm_head"], None, ["layers.0.q.bias", "lm_head.weight"]),
        (["layers.0.*"], None, DEFAULT_TARGETS[:2]),
        (["*"], ["*layers*"], ["embed_tokens.weight", "lm_head.weight"]),
        (["layers.1.norm.weight"], None, ["layers.1.norm.weight"]),
    ],
)
def test_targets_in_the_words_of_the_scheduler(
    tmp_path: Path, targets: list[str] | None, ignore: list[str] | None, expected: list[str]
) -> None:
    source = write_folder(tmp_path / "in")
    job = PruneJob(source, tmp_path / "out", sparsity=0.5, targets=targets, ignore=ignore)
    assert [tensor.name for tensor in job.tensors] == expected
    job.run()
    assert_pruned(source, tmp_path / "out", expected, sparsity=0.5)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte",
        "wpe",
        "shared",
        "lm_head",
        "model.embed_tokens",
        "h.0.ln_1",
        "encoder.LayerNorm",
        "final_norm",
    ],
)
def test_embeddings_norms_and_heads_are_no_default_targets(tmp_path: Path, name: str) -> None:
    save_file({f"{name}.weight": torch.ones(4, 4), "mlp.weight": torch.ones(4, 4)}, tmp_path / "in.safetensors")
    job = PruneJob(tmp_path / "in.safetensors", tmp_path / "out.safetensors", sparsity=0.5)
    assert [tensor.name for tensor in job.tensors] == ["mlp.weight"]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["layers.7"], TargetError, "targets: .* got 'layers.7', which matches nothing; did you mean 'layers.2"),
        (["layers.0.q.weigth"], TargetError, "did you mean 'layers.0.q.weight'"),
        (
            ["*.bias"],
            TargetError,
            "which matches only biases, norms or scales; name those exactly if you mean them, such as",
        ),
        (["re:("], TargetError, "expected a regular expression"),
        (["packed.weight"], DTypeError, "got 'packed.weight' of F8_E4M3; prune before quantizing"),
        (["steps"], DTypeError, "'steps' of I64"),
    ],
)
def test_targets_that_cannot_be_pruned(
    tmp_path: Path, targets: list[str], error: type[Exception], message: str
) -> None:
    source = write_folder(tmp_path / "in")
    with pytest.raises(error, match=message):
        PruneJob(source, tmp_path / "out", sparsity=0.5, targets=targets)


def test_an_empty_tensor_is_no_target_but_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"empty.weight": torch.ones(0, 4), "mlp.weight": torch.arange(16.0).view(4, 4)}, source)
    PruneJob(source, target, sparsity=0.5).run()
    assert_pruned(source, target, ["mlp.weight"], sparsity=0.5)
    with pytest.raises(ShapeError, match=r"expected weights in 'empty\.weight', got shape"):
        PruneJob(source, tmp_path / "other", sparsity=0.5, targets=["empty.weight"])


def test_global_scope_wants_one_dtype(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4).half()}, source)
    with pytest.raises(DTypeError, match="expected one dtype for scope='global', got F16, F32"):
        PruneJob(source, tmp_path / "out", sparsity=0.5, scope="global")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_memory", [TINY, DEFAULT_MEMORY])
def test_another_dtype_for_the_output(tmp_path: Path, dtype: torch.dtype, max_memory: int) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    PruneJob(source, target, sparsity=0.5, dtype=dtype, masks=True).run(max_memory=max_memory)
    before, after = load(source), load(target)
    prune_([before[name] for name in DEFAULT_TARGETS], sparsity=0.5, backend="reference")
    for name, tensor in before.items():
        expected = tensor.to(dtype) if tensor.dtype in DTYPES else tensor
        assert_bitwise_equal(after[name], expected, name)
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert index["weight_map"] == json.loads((source / INDEX).read_text())["weight_map"]
    for file in shard_files(target):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        names = [name for name in DEFAULT_TARGETS if name in load(file)]
        # Of the weights as they were pruned, before the conversion.
        assert_masks(target / "masks" / file.name, {name: BitMask.from_bool(before[name] != 0) for name in names})


def test_a_dtype_too_narrow_for_a_value(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"a.weight": torch.tensor([[1.0, 7e4]])}, source)
    with pytest.raises(DTypeError, match=r"in the range of torch\.float16 in 'a\.weight'"):
        PruneJob(source, tmp_path / "out.safetensors", sparsity=0.5, dtype=torch.float16).run()
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("max_memory", [TINY, DEFAULT_MEMORY])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite(tmp_path: Path, scope: str, max_memory: int, value: float) -> None:
    source = tmp_path / "in.safetensors"
    tensors = {name: torch.ones(20, 50) for name in ("a.weight", "b.weight", "c.bias")}
    tensors["b.weight"][15, 7] = tensors["c.bias"][0, 0] = value
    save_file(tensors, source)
    with pytest.raises(NonFiniteError, match=r"in 'b\.weight' at flat index 757; no output was written") as caught:
        PruneJob(source, tmp_path / "out.safetensors", sparsity=0.5, scope=scope).run(max_memory=max_memory)
    assert (caught.value.layer, caught.value.index) == (1, 757)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
    # Where it is not looked at it does not matter.
    job = PruneJob(source, tmp_path / "out.safetensors", sparsity=0.5, scope=scope, ignore=["b"])
    job.run(max_memory=max_memory)
    assert_pruned(source, tmp_path / "out.safetensors", ["a.weight"], sparsity=0.5)


def test_copies_without_help_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(stream.os, "copy_file_range", refuse)
    source = write_folder(tmp_path / "in")
    PruneJob(source, tmp_path / "out", sparsity=0.5).run(max_memory=TINY)
    assert_pruned(source, tmp_path / "out", DEFAULT_TARGETS, sparsity=0.5)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", model_tensors(torch.bfloat16))
    for scope in ("layer", "global"):
        for max_memory in (TINY, DEFAULT_MEMORY):
            calls: list[tuple[int, int]] = []
            job = PruneJob(source, tmp_path / "out", sparsity=0.5, scope=scope, force=True)
            job.run(max_memory=max_memory, progress=lambda done, total, calls=calls: calls.append((done, total)))
            assert calls == sorted(calls)
            assert calls[-1][0] == calls[-1][1]
