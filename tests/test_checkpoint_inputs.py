"""Whatever paths, indexes and headers hold: an error of the package, one line of the command, and nothing left behind.

Everything happens in a folder of its own, devices excepted, which are only ever named as inputs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from gmp_kernels.checkpoints import PruneJob, folders, inspect_checkpoint, open_checkpoint, stream, total_of
from gmp_kernels.checkpoints import files as files_module
from gmp_kernels.errors import CheckpointError, DeviceError, DistributedError, GMPError, OutputError, TargetError
from gmp_kernels.tools.cli import checkpoints as cli_checkpoints
from gmp_kernels.tools.cli import main as cli

WEIGHTS = {"a.weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), "b.bias": torch.ones(4)}
INDEX = {"metadata": {"total_size": 272}, "weight_map": dict.fromkeys(WEIGHTS, "model.safetensors")}
MANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and all kinds of things that are none."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "model").mkdir()
    for path in (root / "in.safetensors", root / "model" / "model.safetensors"):
        save_file(WEIGHTS, path)
    for name in ("empty", "with_pipe"):
        (root / name).mkdir()
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "with_pipe" / "x.safetensors")
    (root / "file").write_text("dear")
    (root / "loop").symlink_to("loop")
    (root / "broken").symlink_to("nowhere")
    return root


ODD = [
    *("", ".", "..", "./", "model/..", "pipe", "file", "file/x", "empty", "with_pipe", "loop", "loop/x", "broken"),
    *("in.safetensors", "model", "model/", "new", "no/where", "a\0b", "a\nb", "\x1b[2J", "\udcff", "\ud800", "-", "~"),
    *("x" * 245, "x" * 255, "x" * 256, "x/" * 3000),
]
NEW = ("new", "a\nb", "\x1b[2J", "\udcff", "-", "~", "x" * 245)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("source", [*ODD, "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/nothing"])
def test_paths(place: Path, monkeypatch: pytest.MonkeyPatch, source: str, force: bool) -> None:
    monkeypatch.chdir(place)
    before = contents(place / "model"), names_in(place)
    for target in ODD:
        try:
            PruneJob(Path(source), Path(target), sparsity=0.5, force=force).run()
        except GMPError:
            pass
        else:
            # With force an empty folder, too, gives way to one.
            assert source in ("in.safetensors", "model", "model/") and target in ("empty", *NEW)
            made = place / target
            shutil.rmtree(made) if made.is_dir() else made.unlink()
            if target == "empty":
                made.mkdir()
        assert (contents(place / "model"), names_in(place)) == before, target
        assert (place / "file").read_text() == "dear"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(
        [-1, 0, 10**400, 1.5, float("nan"), "", "model.safetensors", "../model.safetensors", "/etc/hosts"]
    )
    | st.sampled_from(["a\0b", "\ud800", "model.safetensors.index.json", "sub/../model.safetensors", "lm_head.weight"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "weight_map"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def changed(draw: st.DrawFn, document: dict[str, Any]) -> Any:
    """A document with an entry or two put in, replaced or taken out at any depth."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 2))):
        place = document
        while inner := [value for value in place.values() if isinstance(value, dict)]:
            if draw(st.booleans()):
                break
            place = draw(st.sampled_from(inner))
        key = draw(st.sampled_from([*place, "x", "../x", "lm_head.weight"]))
        if draw(st.booleans()):
            place[key] = draw(json_values)
        else:
            place.pop(key, None)
    return document


NO_INDEX = [b"", b"\xff\xfe", b"[" * 100_000, b'{"weight_map":' * 100_000, b"null", b'"x"', bytes(64), b"1" * 5000]


def check(path: Path, out: Path, **request: Any) -> None:
    """Inspect and prune; whatever fails fails with an error of the package and leaves nothing."""
    try:
        checkpoint = open_checkpoint(path)
        found = inspect_checkpoint(checkpoint, histogram=True)
        total = total_of(found)
        list(cli_checkpoints._statistics(found, total, with_histogram=True).lines())
        list(cli_checkpoints._bars(total.histogram).lines())
        json.dumps([total.to_dict(), *(t.to_dict() for t in found)])
    except CheckpointError as error:
        assert "\x1b" not in str(error)
    try:
        PruneJob(path, out, sparsity=0.5, **request).run()
    except GMPError:
        assert not out.exists()
    else:
        assert [t.shape for t in open_checkpoint(out).tensors] == [t.shape for t in open_checkpoint(path).tensors]
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    out.with_name(f"{out.stem}.masks.safetensors").unlink(missing_ok=True)
    assert not any(name.endswith(".partial") for name in names_in(out.parent))


requests = st.fixed_dictionaries(
    {"dtype": st.sampled_from([None, torch.float16]), "masks": st.booleans(), "copy_others": st.booleans()}
)


@given(
    raw=changed(INDEX).map(lambda document: json.dumps(document).encode()) | st.sampled_from(NO_INDEX), request=requests
)
@settings(MANY, max_examples=150)
def test_indexes(place: Path, tmp_path: Path, raw: bytes, request: dict[str, Any]) -> None:
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    shutil.copy(place / "in.safetensors", folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(raw)
    check(folder, tmp_path / "out", **request)


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
NAMES = [
    "",
    ".",
    "..",
    "../x.weight",
    "/x.weight",
    "\x1b[2J.weight",
    "\u202e",
    "n\n.weight",
    "[red].weight",
    "$a^$.weight",
]
NAMES += ["w.weight", "w.weight.mask", "w_orig", "w_mask", "__metadata", "*.weight", "re:(.weight", "漢字.weight"]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header that holds, of any names, dtypes and bytes."""
    masks = draw(st.sampled_from(["{", '{"shapes": 5}', '{"shapes": {"w.weight": [8]}}', "[" * 2000]))
    entries: dict[str, Any] = {"__metadata__": {"masks": masks}}
    begin = 0
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=5, unique=True)):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 8]), max_size=3))
        end = begin + int(torch.Size(shape).numel()) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return entries, draw(st.sampled_from([bytes(begin), b"\xff" * begin, bytes(i * 37 % 251 for i in range(begin))]))


WHOLE = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.bias": {"dtype": "F16", "shape": [2], "data_offsets": [16, 20]},
}


@given(
    file=tensors() | st.tuples(changed(WHOLE), st.just(bytes(20))),
    cut=st.sampled_from([0, 0, 0, 1, 30]),
    request=requests,
)
@settings(MANY, max_examples=250)
def test_headers(tmp_path: Path, file: tuple[Any, bytes], cut: int, request: dict[str, Any]) -> None:
    header, data = file
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + data
    (tmp_path / "in.safetensors").write_bytes(raw[: len(raw) - cut])
    check(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **request)


@pytest.mark.parametrize(
    "arguments", ["inspect {}", "prune {} out --sparsity .5", "prune in.safetensors {} --sparsity .5"]
)
def test_the_command_says_it_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: str
) -> None:
    monkeypatch.chdir(place)
    for path in ("pipe", "loop", "with_pipe", "x" * 256, "\udcff\x1b[2J/x", "..", "in.safetensors/x", ""):
        command = [word.format(path) for word in arguments.split(" ")]
        monkeypatch.setattr("sys.argv", ["gmp-kernels", *command])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        assert caught.value.code in (1, 2)
        assert printed.out == "" and printed.err.startswith("gmp-kernels: ")
        assert printed.err.removesuffix("\n").isprintable()


def test_a_name_twice_in_an_index(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a.weight": "x", "a.weight": "model.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="a name occurs twice"):
        open_checkpoint(tmp_path)


def test_an_index_of_sizes_that_has_none(tmp_path: Path) -> None:
    """Without one it gets none when the dtype changes."""
    for i, metadata in enumerate((None, [], 5, "x", {})):
        folder = tmp_path / f"in{i}"
        folder.mkdir()
        save_file(WEIGHTS, folder / "model.safetensors")
        document = INDEX | {"metadata": metadata}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))
        PruneJob(folder, tmp_path / f"out{i}", sparsity=0.5, dtype=torch.float16).run()
        assert json.loads((tmp_path / f"out{i}" / "model.safetensors.index.json").read_text()) == document


def refused(*_: object, **__: object) -> Any:
    raise PermissionError(13, "Permission denied", "x")


def refused_walk(*_: object, onerror: Callable[[OSError], None], **__: object) -> None:
    onerror(PermissionError(13, "Permission denied", "x"))


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart from outputs that cannot be written."""
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    for patched, name, substitute, message in [
        (Path, "stat", refused, "in: cannot be read: Permission denied"),
        (folders.os, "walk", refused_walk, "x: cannot be read: Permission denied"),
        (Path, "read_bytes", refused, "expected an index with a weight_map"),
        (files_module, "safe_open", refused, "expected a whole .safetensors file"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=message):
            patch.setattr(patched, name, substitute)
            open_checkpoint(folder)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        patch.setattr(stream, "FileIO", refused)
        stream.opened(folder / "model.safetensors")
    job = PruneJob(folder, tmp_path / "out", sparsity=0.5)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="cannot be read any more: No such file"):
        job.run()
    assert names_in(tmp_path) == []


def test_an_input_that_is_gone_at_the_end(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "in.safetensors")
    job = PruneJob(tmp_path / "in.safetensors", tmp_path / "out", sparsity=0.5)
    with pytest.raises(CheckpointError, match="cannot be read any more: No such file"):
        job.run(progress=lambda *_: (tmp_path / "in.safetensors").unlink(missing_ok=True))
    assert not (tmp_path / "out").exists()


def test_memory_that_is_not_there(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place / "in.safetensors"
    PruneJob(source, tmp_path / "out", sparsity=0.5).run(max_memory=10**18)  # takes what it needs of it
    for max_memory in (0, -5):
        with pytest.raises(DeviceError, match="expected memory to work in"):
            PruneJob(source, tmp_path / "more", sparsity=0.5).run(max_memory=max_memory)
    monkeypatch.setattr("gmp_kernels.checkpoints.prune.LEAST_MEMORY", 1 << 62)
    with pytest.raises(DeviceError, match=r"no memory left, .* were allowed; allow less"):
        PruneJob(source, tmp_path / "more", sparsity=0.5).run(max_memory=1 << 61)
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("size", ["", "two", "2"])
def test_an_environment_of_processes_that_are_not_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(DistributedError, match=r"as WORLD_SIZE says, got no connection .* or unset WORLD_SIZE"):
        PruneJob(place / "in.safetensors", tmp_path / "out", sparsity=0.5).run()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("entry", ["re:" + "(" * 5000, "re:a{99999999999}", "re:[", "re:(?P<1>)"])
def test_expressions_that_are_none(place: Path, tmp_path: Path, entry: str) -> None:
    with pytest.raises(TargetError, match="expected a regular expression"):
        PruneJob(place / "in.safetensors", tmp_path / "out", sparsity=0.5, targets=[entry])


def test_what_is_neither_file_nor_folder(place: Path) -> None:
    for source in (place / "pipe", Path("/dev/null")):
        with pytest.raises(CheckpointError, match="got a device or a pipe"):
            open_checkpoint(source)


def test_an_output_without_a_name(place: Path) -> None:
    for target in ("", "/", "..", "a/.."):
        with pytest.raises(OutputError, match="expected the name of an output, got none"):
            PruneJob(place / "in.safetensors", Path(target), sparsity=0.5, force=True)


def test_a_picture_of_any_name(tmp_path: Path) -> None:
    names = ["$a^$.weight", "$\\frac$", "_x", "\x1b[2J\0"]
    extremes = torch.tensor([5e-324, 1.7e308], dtype=torch.float64)
    save_file({name: extremes.clone() for name in names}, tmp_path / "$_$.safetensors")
    arguments = ["inspect", str(tmp_path / "$_$.safetensors"), "--plot", str(tmp_path / "a.png")]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
