"""What the phases cost beside the steps, estimated before they begin.

The unit is a dense forward of one sample. In the sparse form the MLP's share of it, about 0.8 up to 16K tokens, is computed for
every row and the rest for the share k of kept blocks; the exact form's forward is dense. Backward costs k: frozen weights have no
gradient. Fitting predictors on a document costs its dense forward and about 0.2 more: block scores and the predictors' steps.
Attention, quadratic in length, counts like everything else, so these are estimates: right to tens of percent
(benchmarks/phase_flops.py counts the phases).
"""

from dataclasses import dataclass

from ..models.lemo_config import LemoConfig

_FIT = 1.2
_MLP = 0.8
# Share of a run's compute from which the phases are worth a warning.
LARGE_SHARE = 0.05


@dataclass(frozen=True)
class PhaseCost:
    """Compute of a run's parts, in dense forwards of one sample.

    Args:
        predictor: Fitting the predictors.
        calibrate: Finding the thresholds.
        steps: All training steps.
    """

    predictor: float
    calibrate: float
    steps: float

    @property
    def share(self) -> float:
        """Share of the run's compute that the phases take before the first step, in [0, 1]."""
        phases = self.predictor + self.calibrate
        return phases / max(phases + self.steps, 1e-12)

    def __str__(self) -> str:
        whole = max(self.predictor + self.calibrate + self.steps, 1e-12)
        return (
            f"{self.share:.1%} of the run's compute goes into the phases before the first step "
            f"(predictor {self.predictor / whole:.1%}, calibrate {self.calibrate / whole:.1%}; estimated)"
        )


def estimate_cost(
    lemo: LemoConfig, num_layers: int, fitted_documents: int, profile_documents: int, rounds: int, samples: int
) -> PhaseCost:
    """Estimates what the phases cost.

    Args:
        lemo: The model's lemo block.
        num_layers: Layers of the model.
        fitted_documents: Documents that predictors are fitted on, passes counted.
        profile_documents: Documents of the profile set; 0 where calibration is skipped.
        rounds: Rounds of central differences.
        samples: Training samples of all steps.
    """
    dense = [lemo.is_dense(layer, num_layers) for layer in range(num_layers)]
    kept = sum(1.0 if dense[layer] else lemo.ratio_of(layer) for layer in range(num_layers)) / num_layers
    sparse = lemo.attention_forward == "sparse"
    forward = _MLP + (1 - _MLP) * kept if sparse else 1.0
    # The first pass profiles the dense model; in the exact form there is nothing to differentiate.
    passes = 1 + (2 * dense.count(False) * rounds * forward if sparse else 0)
    return PhaseCost(
        predictor=_FIT * fitted_documents,
        calibrate=passes * profile_documents,
        steps=(forward + kept) * samples,
    )
