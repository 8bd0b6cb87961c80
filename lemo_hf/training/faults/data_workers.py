"""Workers of a data loader that live on when a signal goes to every process of a job, as from Slurm or Ctrl-C in a terminal.

By default they end, PyTorch raises "DataLoader worker exited unexpectedly" in the middle of a step, and nothing is saved.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from .stop_signals import SIGNALS


class OutliveSignals:
    """A loader's `worker_init_fn`: only the parent ends the worker.

    The parent ends workers by SIGTERM too, so whose it is has to be looked at, which a handler in Python cannot: a thread waits for
    it instead, which Linux knows how to do. Processes that the user's data set starts in a worker inherit that SIGTERM is blocked.

    Args:
        before: The loader's own `worker_init_fn`, called afterwards.
    """

    def __init__(self, before: Callable[[int], None] | None) -> None:
        self.before = before

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_leave_with_parent, daemon=True).start()
        if self.before is not None:
            self.before(worker)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)  # as PyTorch's own handler does


def keep_workers(loader: Any) -> None:
    """Has the workers that a data loader will start outlive signals that are not the parent's; workers that run already stay as they are.

    Args:
        loader: A `DataLoader`, wrapped by accelerate or not; anything else is left alone.
    """
    loader = getattr(loader, "base_dataloader", loader)
    if getattr(loader, "num_workers", 0) and not isinstance(loader.worker_init_fn, OutliveSignals):
        loader.worker_init_fn = OutliveSignals(loader.worker_init_fn)
