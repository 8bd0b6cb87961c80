"""Signals that ask a run to leave: it saves at the end of the running step, or where a phase stands, and leaves.

SIGTERM (schedulers, `docker stop`, torchrun), SIGINT (Ctrl-C; a second one leaves at once) and SIGUSR1 (Slurm's
`--signal=USR1@300`) are caught while a run trains. The process ends with 128 plus the signal's number: 143, 130, 138.

Trainer's `enable_jit_checkpoint` is not used: it waits three seconds, knows SIGTERM only, may save between the forward of a step
and its optimizer step, so that the resumed run draws other dropout, and leaves as a finished run does.
"""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

from ...errors import LemoStopped
from ..scale_out.processes import Processes

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Catches the signals between `catch` and `release`, and remembers the first that came."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self.is_saving = False
        self._before: dict[signal.Signals, Any] = {}

    def catch(self) -> None:
        """Begins to catch them; in another thread than the main one Python does not allow it."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self.caught, self.is_saving = None, False
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def release(self) -> None:
        """Gives the signals back to who had them before."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.caught is not None and number == signal.SIGINT
        if again or not _is_training(frame):
            # Under another trainer an error may have ended the training: nobody would look at what is noted.
            self.release()
            signal.raise_signal(signal.Signals(number))
            return
        if self.caught is not None:
            return
        self.caught = signal.Signals(number)
        # A logger may be at work right now, and must not be entered again.
        os.write(2, f"lemo: {self.caught.name} received; saving at the end of this step, then leaving\n".encode())

    def is_requested(self, device: torch.device) -> bool:
        """Whether a signal came, to this process or to another of the run; all of them have to ask at the same places.

        Args:
            device: The one that the model computes on.
        """
        requested = not Processes(device).all(self.caught is None)
        if requested and self.caught is None:
            self.caught = signal.SIGTERM
        return requested

    def leave(self, where: str, with_optimizer: bool = True) -> None:
        """Ends the run.

        Args:
            where: Where it saved, for the message.
            with_optimizer: Whether what it saved holds the optimizer; without it a resumed run is another one.

        Raises:
            LemoStopped: Always.
        """
        self.release()
        number = self.caught or signal.SIGTERM
        if with_optimizer:
            logger.warning("stopped by %s, saved %s; go on with resume_from_checkpoint", number.name, where)
        else:
            logger.warning(
                "stopped by %s, saved the weights %s, and no optimizer (save_only_model=True); resume_from_checkpoint would begin a new "
                "optimizer and learning rate at this step, so the run would not be the same",
                number.name,
                where,
            )
        raise LemoStopped(128 + number)


def _is_training(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop":
            return True
        frame = frame.f_back
    return False
