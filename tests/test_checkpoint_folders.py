"""Which files of a folder are the model: the rest is named and left out, or copied when asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_cases import INDEX, contents, load, model_tensors, write_folder
from safetensors.torch import save_file
from typer.testing import CliRunner

from gmp_kernels.checkpoints import PruneJob, open_checkpoint
from gmp_kernels.errors import CheckpointError, OutputError
from gmp_kernels.tools.cli import main as cli

RUNNER = CliRunner()
WEIGHTS = {"q.weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}

OTHERS = {
    "consolidated.safetensors": "other weights",
    "model.fp16.safetensors": "other weights",
    "model.safetensors.index.fp16.json": "other weights",
    "pytorch_model.bin": "other weights",
    "pytorch_model-00001-of-00002.bin": "other weights",
    "pytorch_model.bin.index.json": "other weights",
    "original/consolidated.00.pth": "other weights",
    "flax_model.msgpack": "other weights",
    "tf_model.h5": "other weights",
    "model-Q4_K_M.gguf": "other weights",
    "onnx/model.onnx": "other weights",
    "onnx/model.onnx_data": "other weights",
    "variables.data-00000-of-00001": "other weights",
    "Model.CKPT": "other weights",
    "adapter_model.safetensors": "adapters",
    "adapter_config.json": "adapters",
    "optimizer.pt": "states of a trainer or optimizer",
    "scheduler.pt": "states of a trainer or optimizer",
    "rng_state_0.pth": "states of a trainer or optimizer",
    "training_args.bin": "states of a trainer or optimizer",
    "trainer_state.json": "states of a trainer or optimizer",
    "global_step100/mp_rank_00_model_states.pt": "states of a trainer or optimizer",
    "masks/model.safetensors": "masks written by prune",
    "old.masks.safetensors": "masks written by prune",
}
KEPT = (
    "config.json",
    "tokenizer.model",
    "tokenizer.json",
    "merges.txt",
    "modeling_x.py",
    "README.md",
    "1_Pooling/config.json",
)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"{}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


def test_what_is_not_the_model_is_left_out_by_name(model: Path, tmp_path: Path) -> None:
    put(model, *OTHERS, *KEPT, ".git/config", ".git/lfs/ab/cdef", ".cache/huggingface/x.lock", ".gitattributes")
    job = PruneJob(model, tmp_path / "out", sparsity=0.5)
    hidden = dict.fromkeys((".git/", ".cache/"), "hidden folders")
    assert job.checkpoint.left_out == OTHERS | hidden
    job.run()
    assert set(contents(tmp_path / "out")) == {"model.safetensors", ".gitattributes", *KEPT}


def test_it_is_copied_as_it_is_when_asked_for(model: Path, tmp_path: Path) -> None:
    put(model, *OTHERS, *KEPT, ".git/config")
    job = PruneJob(model, tmp_path / "out", sparsity=0.5, masks=True, copy_others=True)
    assert job.checkpoint.left_out == {}
    job.run()
    after = contents(tmp_path / "out")
    assert set(after) == {"model.safetensors", ".git/config", *KEPT, *OTHERS}
    # The masks are those of this run.
    assert {name for name in OTHERS if after[name] != b"{}"} == {"masks/model.safetensors"}


def test_the_command_names_what_it_leaves_out(model: Path, tmp_path: Path) -> None:
    put(model, "pytorch_model.bin", *(f"rng_state_{i}.pth" for i in range(12)))
    prune = ["prune", str(model), str(tmp_path / "out"), "--sparsity", "0.5"]
    for arguments in ([*prune, "--dry-run"], ["inspect", str(model)], prune):
        output = RUNNER.invoke(cli.app, arguments).output
        assert "left out, other weights: pytorch_model.bin\n" in output
        assert "rng_state_0.pth" in output and "and 4 more\n" in output
        assert "prune --copy-others copies them as they are" in output
    output = RUNNER.invoke(cli.app, [*prune, "--force", "--copy-others"]).output
    assert "left out" not in output and (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model", "weights"], ["model"]),
        (["diffusion_pytorch_model", "diffusion_pytorch_model.fp16"], ["diffusion_pytorch_model"]),
        (["model-00001-of-00002", "model-00002-of-00002", "more"], ["model-00001-of-00002", "model-00002-of-00002"]),
        (["model-00001-of-00001", "other-00001-of-00001"], ["model-00001-of-00001"]),
        (["weights", "weights.fp16"], ["weights"]),
        (["weights.fp16", "weights.bf16"], ["weights.bf16", "weights.fp16"]),
        (["weights", "consolidated"], ["weights"]),
        (["consolidated"], ["consolidated"]),
        (["weights", "weights.masks"], ["weights"]),
        (["weights", "adapter_model"], ["weights"]),
        (["adapter_model"], ["adapter_model"]),
        (["pytorch_lora_weights", "optimizer"], ["optimizer", "pytorch_lora_weights"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_which_files_are_the_model_without_an_index(tmp_path: Path, names: list[str], chosen: list[str]) -> None:
    for name in names:
        save_file({f"{name}.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    put(tmp_path, "adapter_config.json")
    checkpoint = open_checkpoint(tmp_path)
    assert [shard.name for shard in checkpoint.shards] == [f"{name}.safetensors" for name in chosen]
    # An adapter that is the model keeps its config.
    is_adapter = any(name.startswith(("adapter", "pytorch_lora")) for name in chosen)
    assert ("adapter_config.json" in checkpoint.others) is is_adapter


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00003", "model-00003-of-00003"], "expected 3 shards, got none called 'model-00002-of-00003"),
        (["a-00001-of-00001", "b-00001-of-00001"], r"one set of shards, got 'a-\*-of-00001\.safetensors', 'b-"),
        (["sub/model", "sub/more"], "at its top level, got some in 'sub' only; name such a folder"),
    ],
)
def test_folders_that_hold_no_single_model(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "sub").mkdir()
    for name in names:
        save_file({f"{name}.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_folder_of_another_format_is_told(tmp_path: Path) -> None:
    put(tmp_path, "pytorch_model.bin", "config.json")
    with pytest.raises(CheckpointError, match=r"got only 'pytorch_model\.bin'; convert other formats first"):
        open_checkpoint(tmp_path)


def test_the_main_index_goes_before_others(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    (source / f"other.{INDEX}").write_text("{}")
    save_file(WEIGHTS, source / "model.safetensors")
    checkpoint = open_checkpoint(source)
    assert len(checkpoint.shards) == 3 and checkpoint.index == INDEX
    assert set(checkpoint.left_out) == {f"other.{INDEX}", "model.safetensors"}


def test_a_pipeline_is_refused_with_its_parts(tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        save_file(WEIGHTS, tmp_path / part / "diffusion_pytorch_model.safetensors")
    put(tmp_path, "model_index.json", "scheduler/scheduler_config.json")
    save_file(WEIGHTS, tmp_path / "v1-5-pruned.safetensors")
    with pytest.raises(CheckpointError, match=r"a pipeline of 'unet', 'vae' .* such as .*/unet"):
        open_checkpoint(tmp_path)
    assert len(open_checkpoint(tmp_path / "vae").shards) == 1


def test_a_tied_name_that_only_the_index_has(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", model_tensors()[:2])
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["embed_tokens.weight"]
    (source / INDEX).write_text(json.dumps(index))
    output = RUNNER.invoke(cli.app, ["prune", str(source), str(tmp_path / "out"), "--sparsity", "0.5"]).output
    assert "in the index only, tied to another tensor: lm_head.weight" in output
    assert (tmp_path / "out" / INDEX).read_bytes() == (source / INDEX).read_bytes()
    assert len(load(tmp_path / "out")) == len(index["weight_map"]) - 1


def test_a_shard_where_the_masks_would_go(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "masks").mkdir(parents=True)
    for name in ("a", "masks/a"):
        save_file({f"{name}.weight": torch.ones(2, 2)}, source / f"{name}.safetensors")
    (source / INDEX).write_text(
        json.dumps({"weight_map": {f"{name}.weight": f"{name}.safetensors" for name in ("a", "masks/a")}})
    )
    with pytest.raises(OutputError, match=r"expected no shard in masks/, .*, got 'masks/a\.safetensors'"):
        PruneJob(source, tmp_path / "out", sparsity=0.5, masks=True)
    PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert set(contents(tmp_path / "out")) == {"a.safetensors", "masks/a.safetensors", INDEX}
