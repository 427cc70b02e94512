"""The demo end to end on a few epochs: its files, its numbers, its words."""

import importlib
import io
import json
import statistics
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from gmp_kernels import BitMask, ScheduleError, SparsityError
from gmp_kernels.plots import Curves, plot_sparsity
from gmp_kernels.tools import demo
from gmp_kernels.tools.demo import data, report
from gmp_kernels.tools.demo.model import DigitMLP

SPARSITY = 0.7
FILES = {
    "sweep.png",
    "sparsity.png",
    "learning_rate.png",
    "accuracy.png",
    "report.md",
    "metrics.json",
    "model.safetensors",
}


def run(out_dir: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Return the metrics and what the terminal saw."""
    terminal = io.StringIO()
    options = {"sparsity": SPARSITY, "epochs": 4, **options}
    return demo.run(out_dir, console=Console(file=terminal, width=80), **options), terminal.getvalue()


@pytest.fixture(scope="module")
def drawn() -> list[Curves]:
    """The sparsities that ``finished`` has drawn."""
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawn: list[Curves]) -> tuple[Path, dict[str, Any], str]:
    out_dir = tmp_path_factory.mktemp("demo") / "not" / "there"

    def keep(path: Path, curves: Curves, *rest: Any, **options: Any) -> None:
        drawn.append(curves)
        plot_sparsity(path, curves, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gmp_kernels.tools.demo.job.plot_sparsity", keep)
        return out_dir, *run(out_dir, seeds=2, seed=3)


def test_every_file_is_written(finished: tuple[Path, dict[str, Any], str]) -> None:
    out_dir, metrics, _ = finished
    assert {path.name for path in out_dir.iterdir()} == FILES
    for picture in out_dir.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((out_dir / "metrics.json").read_text()) == metrics


def test_the_sparsity_that_is_drawn_is_that_of_the_run(
    finished: tuple[Path, dict[str, Any], str], drawn: list[Curves]
) -> None:
    _, metrics, _ = finished
    (curves,) = drawn
    sizes = {name: layer["num_weights"] for name, layer in metrics["layers"].items()}
    steps_per_epoch = metrics["config"]["stages"]["steps_per_epoch"]
    begin, end = round(4 / 60 * steps_per_epoch), round(4 * 35 / 60 * steps_per_epoch)
    assert list(curves.steps) == [0, *range(begin, end, steps_per_epoch), end, 4 * steps_per_epoch]
    assert curves.layers.keys() == sizes.keys()
    for i, step in enumerate(curves.steps):
        left = max(0.0, (end - step) / (end - begin))
        sparsity = SPARSITY + (0.05 - SPARSITY) * left**3 if step else 0.0
        num_pruned = {name: round(sparsity * n) for name, n in sizes.items()}
        assert {name: curves.layers[name][i] * n for name, n in sizes.items()} == pytest.approx(num_pruned)
        assert curves.total[i] * sum(sizes.values()) == pytest.approx(sum(num_pruned.values()))
    assert num_pruned == {name: layer["num_pruned"] for name, layer in metrics["layers"].items()}


def test_metrics_hold_what_they_promise(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, metrics, _ = finished
    assert set(metrics["test_accuracy"]) == {"dense", "gmp", "oneshot", "oneshot_retrained"}
    for accuracy in metrics["test_accuracy"].values():
        low, high = sorted(accuracy["per_seed"])
        assert (accuracy["min"], accuracy["max"]) == (low, high)
        assert accuracy["mean"] == pytest.approx((low + high) / 2)
        assert accuracy["std"] == pytest.approx((high - low) / 2**0.5)
    assert metrics["config"]["seeds"] == [3, 4]
    assert metrics["test_accuracy"]["dense"]["min"] > 0.5, "chance is 0.1"
    assert min(metrics["seconds"]["gmp"].values()) > 0
    assert metrics["versions"]["torch"] == torch.__version__
    assert [len(curve) for curve in metrics["curves"]["gmp"]] == [5, 5]


def test_curves_start_where_the_methods_do(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, metrics, _ = finished
    accuracy, curves = metrics["test_accuracy"], metrics["curves"]
    assert [curve[0] for curve in curves["gmp"]] == accuracy["dense"]["per_seed"]
    assert [curve[0] for curve in curves["oneshot_retrained"]] == accuracy["oneshot"]["per_seed"]
    assert [curve[-1] for curve in curves["gmp"]] == accuracy["gmp"]["per_seed"]


def test_checkpoint_has_exact_zeros_where_its_masks_say(finished: tuple[Path, dict[str, Any], str]) -> None:
    out_dir, metrics, _ = finished
    tensors = load_file(out_dir / "model.safetensors")
    model = DigitMLP()
    prunable = {name for name, weight in model.named_parameters() if weight.ndim > 1}
    assert set(metrics["layers"]) == prunable == {n.removesuffix(".mask") for n in tensors if n.endswith(".mask")}
    for name, layer in metrics["layers"].items():
        weight = tensors[name]
        mask = BitMask(tensors[f"{name}.mask"], weight.shape)
        assert torch.equal(weight != 0, mask.to_bool())
        assert int((weight == 0).sum()) == layer["num_pruned"] == round(SPARSITY * weight.numel())
        assert layer["num_weights"] == weight.numel()
    with safe_open(out_dir / "model.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["masks"])["shapes"]
    assert shapes == {name: list(tensors[name].shape) for name in prunable}


def test_the_report_shows_how_to_load_the_network(
    finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir, metrics, _ = finished
    monkeypatch.chdir(out_dir)
    program = (out_dir / "report.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(program, names)
    assert {name: mask.sparsity for name, mask in names["masks"].items()} == {
        name: layer["sparsity"] for name, layer in metrics["layers"].items()
    }
    digits = data.load(seed=3)
    names["model"].eval()
    right = names["model"](digits.test_images).argmax(1) == digits.test_labels
    assert int(right.sum()) / len(right) == metrics["test_accuracy"]["gmp"]["per_seed"][0]


def test_report_and_terminal_say_what_the_metrics_say(finished: tuple[Path, dict[str, Any], str]) -> None:
    out_dir, metrics, terminal = finished
    text = (out_dir / "report.md").read_text()
    for accuracy in metrics["test_accuracy"].values():
        shown = f"{100 * accuracy['mean']:.2f}% ± {100 * accuracy['std']:.2f}"
        assert shown in text
        assert shown in terminal
    for picture in ("sweep.png", "sparsity.png", "learning_rate.png", "accuracy.png"):
        assert f"({picture})" in text
    assert f"gmp-kernels demo --out {out_dir} --sparsity 0.7 --seeds 2 --seed 3" in text
    assert "exactly round(sparsity x weights) zeros" in text


def accuracies(metrics: dict[str, Any], gmp: float, retrained: float) -> dict[str, Any]:
    changed = deepcopy(metrics)
    for method, value in (("dense", 0.99), ("gmp", gmp), ("oneshot", 0.1), ("oneshot_retrained", retrained)):
        changed["test_accuracy"][method] = {
            "mean": value,
            "std": None,
            "min": value,
            "max": value,
            "per_seed": [value],
        }
    changed["config"]["seeds"] = [0]
    return changed


@pytest.mark.parametrize(
    ("gmp", "retrained", "said", "unsaid"),
    [
        (
            0.95,
            0.80,
            "ends 15.00 points above one-shot with retraining (135 of 899 test images, more than the 3.12 points that",
            "buys nothing",
        ),
        (
            0.80,
            0.95,
            "chance alone may give); here the gradual schedule buys nothing",
            "above",
        ),
        (0.98, 0.98, "level with one-shot with retraining; here the gradual schedule buys nothing", "above"),
        (0.98, 0.976, "not more than the 1.38 points that chance alone may give", "buys nothing"),
    ],
)
def test_the_report_takes_no_sides(
    finished: tuple[Path, dict[str, Any], str], gmp: float, retrained: float, said: str, unsaid: str
) -> None:
    _, metrics, _ = finished
    text = report.markdown(accuracies(metrics, gmp, retrained), "command")
    verdict = next(line for line in text.splitlines() if line.startswith("- Gradual") and "with retraining" in line)
    assert said in verdict
    assert unsaid not in verdict


def test_the_sweep_has_the_runs_of_the_summary_and_more(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, metrics, _ = finished
    sweep = metrics["sweep"]
    assert sweep["sparsities"] == [SPARSITY, 0.8, 0.9, 0.95, 0.97, 0.98]
    for method, accuracies_of in sweep["test_accuracy"].items():
        assert accuracies_of[0] == metrics["test_accuracy"][method]
        assert len({tuple(accuracy["per_seed"]) for accuracy in accuracies_of}) > 1, "each sparsity has its own runs"


def test_the_report_weighs_the_sweep_against_its_spread(finished: tuple[Path, dict[str, Any], str]) -> None:
    """Two standard errors, from values whose spread is known: sqrt(2 * 0.01^2 / 2) twice is 2 points."""
    _, metrics, _ = finished
    spread = 0.01 / 2**0.5
    changed = deepcopy(metrics)
    for method, means in {"gmp": [0.93, 0.91, 0.87], "oneshot_retrained": [0.9, 0.9, 0.9]}.items():
        pairs = [(mean - spread, mean + spread) for mean in means]
        changed["sweep"]["test_accuracy"][method] = [
            {"mean": sum(pair) / 2, "std": statistics.stdev(pair), "per_seed": list(pair)} for pair in pairs
        ]
    changed["sweep"]["sparsities"] = [0.95, 0.9, 0.8]
    text = report.markdown(changed, "command")
    assert "At 95% sparsity, gradual pruning is ahead of one-shot with retraining by more than chance." in text
    assert "At 90% sparsity, chance may explain the difference." in text
    assert "At 80% sparsity, gradual pruning is behind one-shot with retraining by more than chance." in text
    assert "| 95% | 93.00% ± 1.00 | 90.00% ± 1.00 | +3.00 | 2.00 |" in text


def test_the_report_owns_up_to_a_wrong_count(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, metrics, _ = finished
    wrong = deepcopy(metrics)
    wrong["layers"]["head.weight"]["num_pruned"] += 1
    text = report.markdown(wrong, "command")
    assert "The zeros of some layers are not round(sparsity x weights)." in text
    assert "exactly round" not in text


def test_same_seed_same_networks_and_another_seed_others(
    finished: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir, metrics, _ = finished
    monkeypatch.setattr("gmp_kernels.tools.demo.trial.SWEEP", ())  # and whatever else is compared
    again = [run(tmp_path / str(seed), seed=seed)[0] for seed in metrics["config"]["seeds"]]
    first, *others = (
        (folder / "model.safetensors").read_bytes() for folder in (out_dir, tmp_path / "3", tmp_path / "4")
    )
    assert first == others[0] != others[1]
    for method, curves in metrics["curves"].items():
        assert curves == [numbers["curves"][method][0] for numbers in again]


def test_threads_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen = []

    def fail(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("stop")

    monkeypatch.setattr("gmp_kernels.tools.demo.job.compare", fail)
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path, threads=before + 1)
    assert [*seen, torch.get_num_threads()] == [before + 1, before]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seeds": 0}, ScheduleError),
        ({"epochs": 0}, ScheduleError),
        ({"sparsity": 1.5}, SparsityError),
        ({"sparsity": float("nan")}, SparsityError),
    ],
)
def test_what_describes_no_run_is_refused_before_a_file_is_written(
    tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="expected"):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("gmp_kernels.tools.demo", "sklearn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gmp-kernels\[demo\]'"):
        importlib.import_module("gmp_kernels.tools.demo")


def test_split_is_stratified_normalised_and_fixed_by_the_seed() -> None:
    digits = data.load(seed=0)
    assert (len(digits.train_images), len(digits.test_images)) == (898, 899)
    assert digits.train_images.shape[1:] == (1, 8, 8)
    assert digits.train_images.mean().abs() < 1e-5
    assert (digits.train_images.std() - 1).abs() < 1e-5
    share = digits.test_labels.bincount() / (digits.test_labels.bincount() + digits.train_labels.bincount())
    assert (share - 0.5).abs().max() < 0.01
    assert torch.equal(data.load(seed=0).test_images, digits.test_images)
    assert not torch.equal(data.load(seed=1).test_images, digits.test_images)


def test_an_epoch_shows_every_image_at_most_once() -> None:
    digits = data.load(seed=0)
    numbered = digits._replace(train_labels=torch.arange(len(digits.train_labels)))
    batches = list(data.batches(numbered, torch.Generator().manual_seed(0)))
    assert len(batches) == data.steps_per_epoch(digits) == 14
    shown = torch.cat([labels for _, labels in batches])
    assert len(shown.unique()) == len(shown) == 14 * 64
    assert all(torch.equal(images, digits.train_images[labels]) for images, labels in batches)
