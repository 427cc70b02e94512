"""The text of a demo run: report.md, and the table on the terminal. Both use only the metrics."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from rich import box
from rich.table import Table

from gmp_kernels.tools.demo.trial import METHODS

__all__ = ["markdown", "table"]

Metrics: TypeAlias = dict[str, Any]
# Mean, standard deviation and values of an accuracy over the seeds.
Spread: TypeAlias = dict[str, Any]
Row: TypeAlias = tuple[str, ...]

LOADING = """```python
from safetensors.torch import load_file
from gmp_kernels import BitMask
from gmp_kernels.tools.demo.model import DigitMLP

tensors = load_file("model.safetensors")
masks = {name: tensors.pop(f"{name}.mask") for name in list(tensors) if f"{name}.mask" in tensors}
model = DigitMLP()
model.load_state_dict(tensors)
masks = {name: BitMask(packed, model.get_parameter(name).shape) for name, packed in masks.items()}
```"""


def table(metrics: Metrics) -> Table:
    """Return the summary for the terminal: one row per method."""
    header, rows = _summary(metrics)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column(header[0])
    for name in header[1:]:
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(*row)
    return result


def markdown(metrics: Metrics, command: str) -> str:
    """Return the report; ``command`` is the command line that repeats the run."""
    config = metrics["config"]
    stages = config["stages"]
    seeds = config["seeds"]
    num_weights = sum(layer["num_weights"] for layer in metrics["layers"].values())
    sections = [
        "# Gradual magnitude pruning on handwritten digits",
        _paragraph(
            f"A multilayer perceptron with {num_weights:,} prunable weights was trained on scikit-learn's digits.",
            f"It was then pruned in three ways to {100 * config['sparsity']:g}% sparsity in every layer.",
            f"For testing, {metrics['num_test_images']} images were held out.",
            f"All runs that prune and train had {config['epochs']} epochs of {stages['steps_per_epoch']} steps,",
            "with the same order of images and the same learning rates.",
            f"Seeds: {', '.join(map(str, seeds))}." if len(seeds) > 1 else f"One seed: {seeds[0]}.",
        ),
        _markdown_table(*_summary(metrics)),
        _paragraph(
            "Training time includes the pruning steps and excludes evaluation. The pruned methods start from the dense",
            "network, whose training time is not included in theirs.",
            *(("The spread is the standard deviation over the seeds.",) if len(seeds) > 1 else ()),
        ),
        "## What the numbers say",
        "\n".join(f"- {sentence}" for sentence in _findings(metrics)),
        f"Chance is two standard errors of the difference, over the {'seeds' if len(seeds) > 1 else 'test images'}.",
        "## Why gradually",
        _what_the_sweep_says(metrics),
        "![Test accuracy against sparsity](sweep.png)",
        _markdown_table(*_sweep(metrics)),
    ]
    if len(seeds) > 1:
        sections += ["## Every seed", _markdown_table(*_per_seed(metrics))]
    sections += [
        "## Pictures",
        "![Sparsity of each layer against optimizer steps](sparsity.png)",
        "![Learning rate against optimizer steps](learning_rate.png)",
        "![Test accuracy against epochs](accuracy.png)",
        "## Layers",
        _markdown_table(*_layers(metrics)),
        "## Repeat it",
        f"```\n{command}\n```",
        _paragraph(
            "On the same machine, a seed gives the same networks if versions and number of threads are the same:",
            ", ".join(f"{name} {number}" for name, number in metrics["versions"].items()) + ",",
            f"torch threads: {config['threads']}. All numbers are in `metrics.json`.",
        ),
        _paragraph(
            f"`model.safetensors` holds the gradually pruned network of seed {seeds[0]} and its masks, which have one",
            "bit per weight. To load them:",
        ),
        LOADING,
    ]
    return "\n\n".join(sections) + "\n"


def _findings(metrics: Metrics) -> list[str]:
    config, seconds = metrics["config"], metrics["seconds"]
    gmp, retrained = seconds["gmp"], seconds["oneshot_retrained"]
    updates = metrics["num_updates"]
    return [
        _versus_dense(metrics, "gmp", "Gradual pruning"),
        _versus_dense(metrics, "oneshot", "One-shot pruning without retraining")
        + " The batch norms of that network still hold the averages of the dense one.",
        _versus_dense(metrics, "oneshot_retrained", "One-shot pruning with retraining"),
        _gradual_versus_retrained(metrics),
        _paragraph(
            f"The {updates} updates of gradual pruning took {gmp['pruning'] * 1e3:.1f} ms together,",
            f"{gmp['pruning'] / updates * 1e3:.2f} ms each: {_percent(gmp['pruning'] / gmp['training'])} of its",
            f"{gmp['training']:.1f} s of training. Of these, {gmp['updates']:.1f} s went into the optimizer",
            f"(`{config['optimizer']}`) and pruning, after the backward passes.",
            f"Retraining after one-shot pruning took {retrained['training']:.1f} s.",
        ),
        f"Every layer has exactly round(sparsity x weights) zeros at a sparsity of {config['sparsity']:g}."
        if _counts_are_exact(metrics)
        else "The zeros of some layers are not round(sparsity x weights).",
    ]


def _versus_dense(metrics: Metrics, method: str, subject: str) -> str:
    accuracy = metrics["test_accuracy"]
    difference = _difference(metrics, accuracy[method], accuracy["dense"], "the dense network")
    return f"{subject} ends at {_percent(accuracy[method]['mean'])}, {difference}."


def _gradual_versus_retrained(metrics: Metrics) -> str:
    gmp, retrained = metrics["test_accuracy"]["gmp"], metrics["test_accuracy"]["oneshot_retrained"]
    sentence = f"Gradual pruning ends {_difference(metrics, gmp, retrained, 'one-shot with retraining')}"
    pairs = list(zip(gmp["per_seed"], retrained["per_seed"], strict=True))
    if len(pairs) > 1:
        ahead, behind = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        sentence += f": ahead in {ahead} of {len(pairs)} seeds, behind in {behind}"
    if retrained["mean"] >= gmp["mean"]:
        sentence += "; here the gradual schedule buys nothing over pruning at once with the same retraining"
    return sentence + "."


def _difference(metrics: Metrics, accuracy: Spread, other: Spread, name: str) -> str:
    """Describe the difference of ``accuracy`` from ``other``, called ``name``, and whether it may be chance."""
    num_images = metrics["num_test_images"]
    difference = accuracy["mean"] - other["mean"]
    images = abs(difference) * num_images
    if images < 0.005:
        return f"level with {name}"
    chance = _chance(metrics, accuracy, other)
    compared = "more" if abs(difference) > chance else "not more"
    side = "above" if difference > 0 else "below"
    return (
        f"{100 * abs(difference):.2f} points {side} {name} ({images:.3g} of {num_images} test images, {compared} than "
        f"the {100 * chance:.2f} points that chance alone may give)"
    )


def _chance(metrics: Metrics, accuracy: Spread, other: Spread) -> float:
    """Return two standard errors of the difference of two means: over the seeds, or for one seed over the images."""
    num_seeds = len(accuracy["per_seed"])
    if num_seeds > 1:
        return 2 * math.sqrt((accuracy["std"] ** 2 + other["std"] ** 2) / num_seeds)
    mean = (accuracy["mean"] + other["mean"]) / 2
    return 2 * math.sqrt(2 * mean * (1 - mean) / metrics["num_test_images"])


def _swept(metrics: Metrics) -> list[tuple[float, Spread, Spread]]:
    """Return each sparsity of the sweep with the accuracies of gradual pruning and of one-shot with retraining."""
    sweep = metrics["sweep"]
    accuracy = sweep["test_accuracy"]
    return list(zip(sweep["sparsities"], accuracy["gmp"], accuracy["oneshot_retrained"], strict=True))


def _what_the_sweep_says(metrics: Metrics) -> str:
    ahead: list[str] = []
    level: list[str] = []
    behind: list[str] = []
    for sparsity, gmp, retrained in _swept(metrics):
        difference = gmp["mean"] - retrained["mean"]
        clear = abs(difference) > _chance(metrics, gmp, retrained)
        (level if not clear else ahead if difference > 0 else behind).append(f"{100 * sparsity:g}%")
    sentences = [
        (ahead, "gradual pruning is ahead of one-shot with retraining by more than chance"),
        (level, "chance may explain the difference"),
        (behind, "gradual pruning is behind one-shot with retraining by more than chance"),
    ]
    return _paragraph(
        "Gradual pruning and one-shot with retraining at several sparsities, from the same dense networks.",
        *(f"At {', '.join(sparsities)} sparsity, {said}." for sparsities, said in sentences if sparsities),
    )


def _sweep(metrics: Metrics) -> tuple[Row, list[Row]]:
    rows: list[Row] = [
        (
            f"{100 * sparsity:g}%",
            _mean_and_spread(gmp),
            _mean_and_spread(retrained),
            f"{100 * (gmp['mean'] - retrained['mean']):+.2f}",
            f"{100 * _chance(metrics, gmp, retrained):.2f}",
        )
        for sparsity, gmp, retrained in _swept(metrics)
    ]
    return ("sparsity", METHODS["gmp"], METHODS["oneshot_retrained"], "difference in points", "chance"), rows


def _counts_are_exact(metrics: Metrics) -> bool:
    sparsity = metrics["config"]["sparsity"]
    return all(layer["num_pruned"] == round(sparsity * layer["num_weights"]) for layer in metrics["layers"].values())


def _summary(metrics: Metrics) -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for method, name in METHODS.items():
        seconds = metrics["seconds"][method]
        rows.append(
            (
                name,
                _mean_and_spread(metrics["test_accuracy"][method]),
                _percent(metrics["sparsity"][method]),
                f"{seconds['training']:.1f} s",
                f"{seconds['pruning'] * 1e3:.1f} ms",
            )
        )
    return ("method", "test accuracy", "sparsity", "training", "pruning"), rows


def _layers(metrics: Metrics) -> tuple[Row, list[Row]]:
    counts = {name: (layer["num_weights"], layer["num_pruned"]) for name, layer in metrics["layers"].items()}
    num_weights, num_pruned = (sum(column) for column in zip(*counts.values(), strict=True))
    counts["all"] = (num_weights, num_pruned)
    rows: list[Row] = [(name, f"{n:,}", f"{zeros:,}", _percent(zeros / n)) for name, (n, zeros) in counts.items()]
    return ("layer", "weights", "zeros", "sparsity"), rows


def _per_seed(metrics: Metrics) -> tuple[Row, list[Row]]:
    rows: list[Row] = [
        (str(seed), *(_percent(metrics["test_accuracy"][method]["per_seed"][i]) for method in METHODS))
        for i, seed in enumerate(metrics["config"]["seeds"])
    ]
    return ("seed", *METHODS.values()), rows


def _markdown_table(header: Row, rows: list[Row]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _paragraph(*sentences: str) -> str:
    return " ".join(sentences)


def _mean_and_spread(accuracy: Spread) -> str:
    return _percent(accuracy["mean"]) + ("" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.2f}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"
