"""What the phases cost beside the steps, estimated before they begin.

The unit is a dense forward of one sample. In the sparse form the MLP's share of it, about 0.8 up to 16K tokens, is computed for
every row and the rest for the share k of kept blocks; the other forms' forward counts as dense. Backward costs k: frozen weights have no
gradient. Fitting predictors on a document costs its dense forward and about 0.2 more: block scores and the predictors' steps; a
recall probe has no steps and costs 0.15 more, queries and keys projected once more among it.
Attention, quadratic in length, counts like everything else, so these are estimates: right to tens of percent
(benchmarks/phase_flops.py counts the phases).
"""

from dataclasses import dataclass

from ...models.lemo_config import LemoConfig

_FIT = 1.2
_PROBE = 1.15
_MLP = 0.8
# Share of a run's compute from which the phases are worth a warning.
LARGE_SHARE = 0.05
# The same for recall probes and refits during the steps.
LARGE_PROBE_SHARE = 0.01


@dataclass(frozen=True)
class PhaseCost:
    """Compute of a run's parts, in dense forwards of one sample.

    Args:
        predictor: Fitting the predictors.
        calibrate: Finding the thresholds.
        steps: All training steps.
        shares: Finding the layers' shares.
    """

    predictor: float
    calibrate: float
    steps: float
    shares: float = 0.0

    @property
    def share(self) -> float:
        """Share of the run's compute that the phases take before the first step, in [0, 1]."""
        phases = self.predictor + self.shares + self.calibrate
        return phases / max(phases + self.steps, 1e-12)

    def __str__(self) -> str:
        whole = max(self.predictor + self.shares + self.calibrate + self.steps, 1e-12)
        shares = f"shares {self.shares / whole:.1%}, " if self.shares else ""
        return (
            f"{self.share:.1%} of the run's compute goes into the phases before the first step "
            f"(predictor {self.predictor / whole:.1%}, {shares}calibrate {self.calibrate / whole:.1%}; estimated)"
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
    chosen = sum(not lemo.is_dense(layer, num_layers) for layer in range(num_layers))
    forward, backward = _step(lemo, num_layers)
    # The first pass profiles the dense model; in the exact form there is nothing to differentiate.
    passes = 1 + (2 * chosen * rounds * forward if lemo.attention_forward != "exact" else 0)
    return PhaseCost(
        predictor=_FIT * fitted_documents,
        calibrate=passes * profile_documents,
        steps=(forward + backward) * samples,
    )


@dataclass(frozen=True)
class SearchCost:
    """Compute of the share search, in dense forwards of one sample.

    Args:
        measured: Measuring one document at every share tried.
        compared: Comparing the shares found with those at the start on one document.
    """

    measured: float
    compared: float

    @property
    def document(self) -> float:
        """Both: as many documents are compared on as are measured, or fewer."""
        return self.measured + self.compared


def estimate_search_cost(lemo: LemoConfig, num_layers: int, probes: int) -> SearchCost:
    """Estimates what the share search costs by document (share_sensitivity.py has the formulas).

    Args:
        lemo: The model's lemo block.
        num_layers: Layers of the model.
        probes: Shares tried in each layer that chooses.
    """
    chosen = [layer for layer in range(num_layers) if not lemo.is_dense(layer, num_layers)]
    forward, kept = _step(lemo, num_layers)
    if lemo.attention_forward != "exact":
        # The layers above a probed one run again, and itself.
        again = sum(num_layers - layer for layer in chosen) / num_layers
        return SearchCost(forward * (1 + probes * again), 2 * forward)
    # The layers below a probed one run backward again, and itself both ways.
    again = sum(1 + kept + kept * layer for layer in chosen) / num_layers
    return SearchCost(3 + kept + probes * again, 2 + 2 * (1 + kept))


def _step(lemo: LemoConfig, num_layers: int) -> tuple[float, float]:
    """Forward and backward of a training sample."""
    shares = [1.0 if lemo.is_dense(layer, num_layers) else lemo.ratio_of(layer) for layer in range(num_layers)]
    kept = sum(shares) / num_layers
    # With nearby tokens the dropped rows' projections too, which are most of attention.
    drops_attention = lemo.attention_forward == "sparse" and not lemo.nearby
    return (_MLP + (1 - _MLP) * kept if drops_attention else 1.0), kept


@dataclass(frozen=True)
class ProbeCost:
    """Compute of recall probes and refits beside the steps, in dense forwards of one sample.

    Args:
        probes: All probes.
        refits: All refits that the run may make.
        steps: All training steps.
        refit_limit: How many refits these are.
    """

    probes: float
    refits: float
    steps: float
    refit_limit: int

    @property
    def share(self) -> float:
        """Share of the compute of the steps, probes and refits that probes and refits take, in [0, 1]."""
        extra = self.probes + self.refits
        return extra / max(extra + self.steps, 1e-12)

    def __str__(self) -> str:
        whole = max(self.probes + self.refits + self.steps, 1e-12)
        refits = f", {self.refit_limit} refits at most {self.refits / whole:.2%}" if self.refit_limit else ""
        return f"recall probes take {self.probes / whole:.2%} of the run's compute{refits} (estimated)"


def estimate_probe_cost(
    lemo: LemoConfig,
    num_layers: int,
    probed_documents: int,
    refits: int,
    refit_documents: int,
    probe_documents: int,
    profile_documents: int,
    samples: int,
) -> ProbeCost:
    """Estimates what recall probes and refits cost.

    Args:
        lemo: The model's lemo block.
        num_layers: Layers of the model.
        probed_documents: Documents that all probes of the run read.
        refits: Refits that the run may make.
        refit_documents: Documents that each fits the predictors on.
        probe_documents: Documents that the probe after it reads.
        profile_documents: Documents on which a refit's thresholds are set; 0 where there are none.
        samples: Training samples of all steps.
    """
    # Thresholds follow by what they kept before and keep after: two dense passes over the profile set.
    refit = _FIT * refit_documents + _PROBE * probe_documents + 2 * profile_documents
    return ProbeCost(_PROBE * probed_documents, refits * refit, sum(_step(lemo, num_layers)) * samples, refits)
