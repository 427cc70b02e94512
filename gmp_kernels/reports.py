"""Reports of the updates of the scheduler, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gmp_kernels.errors import printable

__all__ = ["LayerReport", "StepReport"]


@dataclass(frozen=True)
class LayerReport:
    """Report of one update on one layer.

    Attributes
    ----------
    name : str
    threshold : float
        Largest magnitude this update pruned, 0.0 if it pruned nothing new; in global scope over all layers that are
        below their ``max_sparsity``. With ``scores`` or blocks the largest score; Inf where the pattern alone decides.
    num_weights, num_pruned, num_newly_pruned : int
        Numbers of weights, of zeros in the mask, and of zeros that this update added.
    num_ties : int
        Weights, or blocks, of exactly the threshold's magnitude; in global scope over the same layers.
    """

    name: str
    threshold: float
    num_weights: int
    num_pruned: int
    num_newly_pruned: int
    num_ties: int

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights, in [0, 1]."""
        return self.num_pruned / self.num_weights

    def __str__(self) -> str:
        return (
            f"{printable(self.name)}: sparsity {self.sparsity:.4f}, {self.num_pruned} of {self.num_weights} weights "
            f"pruned, {self.num_newly_pruned} of them newly, threshold {self.threshold:.4g}"
        )


@dataclass(frozen=True)
class StepReport:
    """Report of one update.

    Attributes
    ----------
    step : int
        Step of the schedule, in optimizer steps: 0 at the first ``scheduler.step()``.
    num_calls : int
        Calls of ``scheduler.step()``, this one included.
    target_sparsity : float
        Sparsity of the schedule at this step, overrides aside.
    sparsity : float
        Sparsity reached over all ``layers`` together.
    seconds : float
        Wall time of the update.
    layers : tuple of LayerReport
        The layers due at this step: all of them, unless an override has update steps of its own.
    """

    step: int
    num_calls: int
    target_sparsity: float
    sparsity: float
    seconds: float
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        layers = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        return (
            f"step {self.step}: sparsity {self.sparsity:.4f} (target {self.target_sparsity:.4f}), {layers}, "
            f"{1e3 * self.seconds:.1f} ms"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepReport:
        """Return the report from which ``to_dict()`` made ``data``."""
        return cls(**{**data, "layers": tuple(LayerReport(**layer) for layer in data["layers"])})
