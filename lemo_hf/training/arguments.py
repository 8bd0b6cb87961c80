"""Arguments of a LeMo run: the stock `TrainingArguments` and those of the phases predictor -> shares -> calibrate -> sparse -> dense tail.

What is eliminated (block size, keep ratio, selection, form) belongs to the model and stands in `LemoConfig`.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..errors import LemoError


@dataclass(repr=False)  # the stock repr names a token by its kind; a generated one would show it
class LemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the phases of a LeMo run.

    Documents are samples of the training set, drawn by `data_seed` (or `seed`) without touching the order of training.

    Raises:
        LemoError: If a value is outside its domain.
    """

    # What a run pushes may be made of private text; the stock default leaves it to the Hub, where it is public for most.
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Whether a repository that the run creates is private; False makes it public."}
    )

    # Predictor phase: fits the pattern predictors on the frozen model.
    predictors: str | None = field(
        default=None, metadata={"help": "Folder with lemo_predictors.safetensors to start from; without it they start at random."}
    )
    predictor_documents: int | None = field(
        default=None,
        metadata={
            "help": "Documents to fit the predictors on; by default 64, or 0 where the selection does not read predictors."
        },
    )
    predictor_passes: int = field(default=1, metadata={"help": "Passes over these documents (the paper: up to 400)."})
    predictor_steps: int = field(default=4, metadata={"help": "Optimizer steps of every layer's predictor on each document."})
    predictor_learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate (Adam), decaying linearly to 0."})
    prune_documents: int = field(default=16, metadata={"help": "Documents between two prunings of hidden units; 0 never prunes."})
    prune_share: float = field(
        default=0.999,
        metadata={"help": "A hidden unit is removed when it is zero after ReLU for more than this share of tokens."},
    )

    # Share search: a kept share for each layer.
    share_search: str | None = field(
        default=None,
        metadata={
            "help": "Find each layer's share before the first step, by what it is worth to training, within what keep_ratio costs in "
            "'kept_share' (kept blocks), 'flops' or 'memory' (there within memory_budget, if it is set). By default every layer "
            "keeps keep_ratio."
        },
    )

    # Calibrate phase: thresholds under the budget of keep_ratio (Algorithm 1), for selection="threshold".
    calibrate_documents: int = field(default=4, metadata={"help": "Documents of the profile set."})
    calibrate_rounds: int = field(
        # One: a round is most of what calibration costs, 64 forwards a document at 32 layers. The budget holds without any.
        default=1,
        metadata={"help": "Rounds of central differences; each runs 2 x layers forwards a document."},
    )
    calibrate_eta: float = field(
        default=0.25,
        metadata={"help": "Largest move of a threshold in a round, in standard deviations of the layer's informativeness."},
    )
    calibrate_epsilon: float = field(default=0.25, metadata={"help": "Half width of the central difference, in the same unit."})

    # Recall probes during the sparse phase: a dense forward without autograd on fixed text.
    probe_steps: int = field(default=100, metadata={"help": "Steps between recall probes; 0 never probes."})
    probe_documents: int = field(default=1, metadata={"help": "Documents that a probe reads."})
    recall_drop: float = field(
        # Relative: what recall a model and a text allow differs. A tenth of what predictors commonly have above chance.
        default=0.03,
        metadata={
            "help": "Mean recall, in points of 1, that may be lost since the last fit before the predictors are fitted again; "
            "-1 fits them again at every probe."
        },
    )
    refit_documents: int = field(default=8, metadata={"help": "Documents that a refit reads."})
    refit_limit: int = field(default=2, metadata={"help": "Most refits in a run."})

    # Evaluation during training: dense, as the model is served.
    eval_sparse: bool = field(
        default=False,
        metadata={
            "help": "Also measure the loss of the sparse training-time forward, as eval_sparse_forward_loss: optimistic, since "
            "a block is kept for what later tokens see in it, and a second pass over the evaluation set."
        },
    )

    # Dense tail: the last steps keep every token, which closes most of the perplexity gap of the sparse form.
    dense_tail_share: float = field(default=0.0, metadata={"help": "Share of the steps, at the end, that keep every token."})

    # The machine that LemoConfig(offload=...) offloads on; how much is offloaded belongs there.
    offload_bandwidth: float | None = field(
        default=None,
        metadata={"help": "Bytes per second between device and host memory; measured as training begins if not given."},
    )
    offload_min_bytes: int = field(
        default=2**20, metadata={"help": "Bytes of a saved tensor from which on it is offloaded; smaller ones stay."}
    )

    # Surviving a kill before the first checkpoint.
    phase_save_documents: int = field(
        default=8, metadata={"help": "Documents between two saves of the predictor phase; calibration saves after every round."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("predictor_passes", "predictor_steps", "calibrate_documents", "probe_documents", "phase_save_documents"):
            self._require(name, getattr(self, name) >= 1, "at least 1", "set it to 1 or more")
        for name in ("calibrate_rounds", "prune_documents", "probe_steps", "refit_documents", "refit_limit"):
            self._require(name, getattr(self, name) >= 0, "0 or more", "set it to 0 to switch it off")
        for name in ("predictor_learning_rate", "calibrate_eta", "calibrate_epsilon"):
            self._require(name, getattr(self, name) > 0, "above 0", "leave it out for the default")
        units = (None, "kept_share", "flops", "memory")
        self._require(
            "share_search", self.share_search in units, "'kept_share', 'flops' or 'memory'", "leave it out for one share"
        )
        bandwidth = self.offload_bandwidth
        self._require("offload_bandwidth", bandwidth is None or bandwidth > 0, "above 0", "leave it out to have it measured")
        self._require("offload_min_bytes", self.offload_min_bytes >= 1, "at least 1", "leave it out for the default")
        documents = self.predictor_documents
        self._require("predictor_documents", documents is None or documents >= 0, "0 or more", "set it to 0 to skip the phase")
        self._require("recall_drop", -1 <= self.recall_drop <= 1, "a share in [-1, 1]", "set refit_limit=0 to never refit")
        self._require("prune_share", 0 < self.prune_share <= 1, "a share in (0, 1]", "leave it out for the default")
        self._require("dense_tail_share", 0 <= self.dense_tail_share < 1, "a share in [0, 1)", "0.05 is a short tail")

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments beside every checkpoint, and pushes them.
        return {**self.__dict__, "hub_token": None}

    def __copy__(self) -> "LemoTrainingArguments":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "LemoTrainingArguments":
        copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _require(self, name: str, holds: bool, domain: str, fix: str) -> None:
        if not holds:
            raise LemoError(f"{name} must be {domain}; got {getattr(self, name)!r}; {fix}")
