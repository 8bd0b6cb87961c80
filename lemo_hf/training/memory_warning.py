"""On CUDA: a line before the first step if it is not expected to fit the card."""

import logging

from transformers import TrainerState, TrainingArguments

from .lemo_callback import LemoCallback
from .step_memory import memory_of, memory_warning

logger = logging.getLogger(__name__)


class WarnOfMemory(LemoCallback):
    """Warns, with the kept share that fits; on a CPU nobody knows how much memory there will be."""

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.device.type == "cuda" and self.run.writes and self.run.lemo.memory_budget is None:
            line = memory_warning(self.run, args, memory_of(args.device), on_gpu=True)
            if line is not None:
                logger.warning("%s", line)
