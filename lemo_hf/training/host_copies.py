"""Pinned host memory in pieces, and copies to and from it on a stream of their own; on a CPU plain copies by the same code."""

import logging
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..profiling.estimate.offload_plan import HostLink

logger = logging.getLogger(__name__)

_MEMORY = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Memory of a bandwidth measurement, and how often it is moved.
_PROBE_BYTES = 2**26
_PROBE_TIMES = 4


class HostMemory:
    """Host memory that grows by chunks up to a limit, is handed out in exact sizes, and is used again.

    Chunks are powers of two: PyTorch rounds pinned memory up to these. A request may come out in several pieces, so nothing is
    lost between them. What is given back may still be written or read by transfers that were begun before: they go through one
    stream, in order, and so does whatever uses the memory next.

    Args:
        limit: Most bytes; what does not fit is not handed out.
        pinned: Whether a device copies to and from it by itself.
        chunk: Bytes that it grows by.
    """

    def __init__(self, limit: float, pinned: bool, chunk: int | None = None) -> None:
        self.limit = limit
        self.reserved_bytes = self.used_bytes = self.peak_bytes = 0
        self._pinned = pinned
        self._chunk = chunk or (2**30 if pinned else 2**24)
        self._chunks: list[Tensor] = []
        self._free: list[tuple[int, int, int]] = []  # chunk, first byte, end; in order
        # A storage may end at any moment, within `take` too: there it is only noted.
        self._returned: deque[list[Tensor]] = deque()
        self._places: dict[int, tuple[int, int, int]] = {}

    def take(self, size: int) -> list[Tensor] | None:
        """`size` bytes, or `None` if there is no room for them."""
        if size > self.room_bytes:
            return None
        while sum(end - begin for _, begin, end in self._free) < size:
            if not self._grow():
                return None
        pieces, left = [], size
        while left:
            chunk, begin, end = self._free.pop(0)
            used = min(left, end - begin)
            if begin + used < end:
                self._free.insert(0, (chunk, begin + used, end))
            piece = self._chunks[chunk][begin : begin + used]
            self._places[piece.data_ptr()] = (chunk, begin, begin + used)
            pieces.append(piece)
            left -= used
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return pieces

    def give_back(self, pieces: list[Tensor]) -> None:
        """Has the memory be used again."""
        self._returned.append(pieces)

    @property
    def room_bytes(self) -> float:
        """Bytes that could be handed out now."""
        self._collect()
        return self.limit - self.used_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that are handed out."""
        self._collect()
        return self.used_bytes

    def _collect(self) -> None:
        while self._returned:
            for piece in self._returned.popleft():
                self._free.append(self._places.pop(piece.data_ptr()))
                self.used_bytes -= piece.numel()
        joined: list[tuple[int, int, int]] = []
        for chunk, begin, end in sorted(self._free):
            if joined and joined[-1][0] == chunk and joined[-1][2] == begin:
                begin = joined.pop()[1]
            joined.append((chunk, begin, end))
        self._free = joined

    def _grow(self) -> bool:
        room = min(self.limit - self.reserved_bytes, 2**62)
        size = min(self._chunk, 2 ** (int(room).bit_length() - 1))
        try:
            chunk = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            self.limit = self.reserved_bytes
            logger.warning(
                "host memory for offloaded activations ends at %.1f GiB, the system gives no more (%s); what does not fit stays on the "
                "device; lower offload_budget",
                self.reserved_bytes / 2**30,
                " ".join(str(error).split())[:120],
            )
            return False
        self._free.append((len(self._chunks), 0, size))
        self._chunks.append(chunk)
        self.reserved_bytes += size
        return True


Moment = Any  # a point in the device's own time


class PlainCopies:
    """Copies at once, in the thread that computes: what a CPU has. All of their time is a stall."""

    def __init__(self) -> None:
        self._transfers: list[tuple[Moment, Moment]] = []
        self._stalls: list[tuple[Moment, Moment]] = []

    def copy(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Moment:
        """Begins copies, after what the device computes now.

        Returns:
            When they are done; for `wait`.
        """
        first = self.moment()
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        last = self.moment()
        self._transfers.append((first, last))
        self._stalls.append((first, last))
        return last

    def wait(self, done: Moment) -> None:
        """Has what is computed from now on wait for copies; the wait counts as a stall."""

    def follow(self, done: Moment) -> None:
        """The same, uncounted: for a copy that nobody wants any more, whose memory is about to be used again."""

    def moment(self) -> Moment:
        """Now, in the order of what is computed."""
        return time.perf_counter()

    def seconds(self, first: Moment, last: Moment) -> float:
        """Time between two moments; waits until the second has come."""
        return float(last - first)

    @property
    def stalls(self) -> int:
        """How many waits there were since `begin`."""
        return len(self._stalls)

    def stalled(self, first: int = 0, last: int | None = None) -> float:
        """Seconds of the waits from one number to another."""
        return sum(self.seconds(*pair) for pair in self._stalls[first:last])

    def transferred(self) -> float:
        """Seconds that transfers took since `begin`."""
        return sum(self.seconds(*pair) for pair in self._transfers)

    def begin(self) -> None:
        """Forgets the times so far."""
        self._transfers, self._stalls = [], []


class StreamCopies(PlainCopies):
    """Copies on a side stream of an accelerator. One stream for both directions, so that host memory is used again in order.

    Memory on the device belongs to the stream that computes: a copy begins after what that stream was given before, and what comes
    after a `wait` on it begins after the copy. So tensors may be let go, and their memory used again, without asking the allocator.

    Args:
        device: The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._module: Any = torch.get_device_module(device)
        self._side = self._module.Stream(device)

    def copy(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Moment:
        self._side.wait_stream(self._module.current_stream(self._side.device))
        with self._module.stream(self._side):
            first = self.moment()
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            last = self.moment()
        self._transfers.append((first, last))
        return last

    def wait(self, done: Moment) -> None:
        before = self.moment()
        self.follow(done)
        self._stalls.append((before, self.moment()))

    def follow(self, done: Moment) -> None:
        self._module.current_stream(self._side.device).wait_event(done)

    def moment(self) -> Moment:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Moment, last: Moment) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000


def copies_for(device: torch.device) -> PlainCopies:
    """How a device copies to host memory and back."""
    return PlainCopies() if device.type == "cpu" else StreamCopies(device)


def measured_link(device: torch.device) -> HostLink:
    """Bandwidth between a device and (pinned) host memory, the fastest of a few copies; on a CPU that of its memory.

    Takes 64 MiB on both sides while it lasts.
    """
    copies, pinned = copies_for(device), device.type != "cpu"
    host = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, pin_memory=pinned)
    there = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=device)

    def fastest(target: Tensor, source: Tensor) -> float:
        times = []
        for _ in range(_PROBE_TIMES):
            copies.begin()
            copies.follow(copies.copy([target], [source]))
            times.append(copies.transferred())
        return _PROBE_BYTES / max(min(times), 1e-9)

    return HostLink(fastest(host, there), fastest(there, host))


def available_host_memory() -> int | None:
    """Bytes of host memory that this process may still take: the system's, or its control group's if that has less; `None` if the
    system does not say.
    """
    found = []
    fields = _fields(_MEMORY)
    if "MemAvailable" in fields:
        found.append(1024 * fields["MemAvailable"])
    try:
        most, now = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(most - now + _fields(_CGROUP / "memory.stat").get("inactive_file", 0))
    except (OSError, ValueError):  # no such group, or one without a limit
        pass
    return max(0, min(found)) if found else None


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {parts[0]: int(parts[1]) for parts in words if len(parts) > 1 and parts[1].isdigit()}
