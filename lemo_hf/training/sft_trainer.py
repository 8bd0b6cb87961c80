"""`trl.SFTTrainer` with the phases of a LeMo run installed. The one module that imports trl; it is imported where used.

trl computes the loss itself: `model(..., fused_lm_head=True)` runs the backbone, which is LeMo's, and log-probabilities in chunks,
so its `loss_type`s, entropy and token accuracy are those of the sparse training forward. Packed and padding-free rows carry
`position_ids` that restart and `cu_seq_lens`, which the backbone reads as documents on every device, FlashAttention or not.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..errors import LemoError
from .arguments import LemoTrainingArguments
from .trainer import LemoTrainerMixin

try:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise LemoError(f"LemoSFTTrainer is trl's SFTTrainer with LeMo; trl cannot be imported ({error}); pip install trl") from error


@dataclass(repr=False)
class LemoSFTConfig(SFTConfig, LemoTrainingArguments):
    """`trl.SFTConfig` with the phases of a LeMo run.

    Two defaults are not trl's: repositories that a run creates are private, and whole-layer checkpointing is off, because it stores
    every row of a layer's input and with that undoes what elimination saves; `LemoConfig(checkpoint="kept_rows")` is LeMo's own.

    Raises:
        LemoError: If a value is outside its domain.
    """

    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Whether a repository that the run creates is private; False makes it public."}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # as in TrainingArguments
        default=None, metadata={"help": "Alias of `activation_checkpointing`, whose default is False; trl's is True."}
    )
    # trl's dataclass generates one that shows a token.
    __repr__ = TrainingArguments.__repr__


class LemoSFTTrainer(LemoTrainerMixin, SFTTrainer):
    """A `trl.SFTTrainer` that trains a LeMo model through its phases, predictor -> calibrate -> sparse -> dense tail.

    Args and errors: see `LemoTrainerMixin`; `args` are `LemoSFTConfig`. Data, chat templates, packing and `peft_config` are trl's.
    """

    arguments_class = LemoSFTConfig

    def sparse_forward_loss(self, dataloader: Any, ignore_keys: list[str] | None = None) -> float:
        # trl gathers entropy and accuracy of every evaluated batch: those of the dense pass are to be logged.
        measured = {name: list(values) for name, values in self._metrics["eval"].items()}
        loss = super().sparse_forward_loss(dataloader, ignore_keys)
        self._metrics["eval"].clear()
        self._metrics["eval"].update(measured)
        return loss
