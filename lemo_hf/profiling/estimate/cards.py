"""Graphics cards and how long a step takes on one: a roofline over the step's operators.

    seconds = sum over operators of max(FLOPs / (peak * efficiency), bytes moved / (bandwidth * efficiency))

Peaks are the makers' data sheets' (bfloat16 tensor cores, dense, float32 sums); memory is what the driver reports as total, which
is neither the sheet's GB nor its GiB. The efficiencies are assumptions, one for each of three kinds of work, until committed
measurements on GPUs exist; the bound at efficiency 1 is always given beside.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import LemoError
from .operator_cost import OperatorCost

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Args:
        name: Short name.
        memory: Total bytes as the driver reports them.
        peak_flops: bfloat16 FLOP/s of the data sheet, dense.
        bandwidth: Memory bandwidth of the data sheet, bytes/s.
        host_link: Bytes/s to host memory, each direction: 16 lanes of PCI Express.
    """

    name: str
    memory: int
    peak_flops: float
    bandwidth: float
    host_link: float = 32e9


def _card(name: str, mebibytes: int, teraflops: float, gigabytes_a_second: float, link: float = 32) -> Card:
    return Card(name, mebibytes * 2**20, teraflops * 1e12, gigabytes_a_second * 1e9, link * 1e9)


# Total memory in MiB (nvidia-smi), bf16 TFLOP/s dense, GB/s; PCI Express 5 in GB/s where it is not 4.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("A100-40GB", 40960, 312, 1555),
        _card("A100-80GB", 81920, 312, 2039),
        _card("H100-80GB", 81559, 989, 3350, 64),
        _card("H200", 143771, 989, 4800, 64),
        _card("L4", 23034, 121, 300),
        _card("L40S", 46068, 362, 864),
        _card("RTX-3090", 24576, 71, 936),
        _card("RTX-4090", 24564, 165.2, 1008),
        _card("RTX-5090", 32607, 209.5, 1792, 64),
    )
}
_OTHER_NAMES = {"a100": "A100-80GB", "h100": "H100-80GB"}


def find_card(name: str) -> Card:
    """A card by name: case, spaces, hyphens and "nvidia" do not matter; A100 and H100 mean the 80 GB ones.

    Raises:
        LemoError: If it is not in the table.
    """
    wanted = _plain(_OTHER_NAMES.get(_plain(name), name))
    for card in CARDS.values():
        if _plain(card.name) == wanted:
            return card
    raise LemoError(f"no such card in the table; {name!r}; choose one of {', '.join(CARDS)}, or give --gpu-memory, such as 80GiB")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def read_bytes(text: str) -> int:
    """Bytes from "80GiB", "80 GB", "512MiB" or a plain number of bytes.

    Raises:
        LemoError: If it is none of these, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?b|b|)\s*", text.lower())
    unit = match.group(2) if match else ""
    power = "bkmgt".index(unit[0]) if unit else 0
    size = int(float(match.group(1)) * (1024 if "i" in unit else 1000) ** power) if match else 0
    if size <= 0:
        raise LemoError(f"not an amount of memory; {text!r}; write it as 80GiB or 80GB")
    return size


@dataclass(frozen=True)
class Efficiency:
    """Share of a card's peaks that three kinds of work reach, each in (0, 1].

    Args:
        products: Matrix products, of the peak FLOP/s.
        attention: Flash attention, likewise.
        movement: Everything else, of the bandwidth.
        source: Where the figures come from.
        transfers: Copies to and from pinned host memory, of the link's bandwidth.
    """

    products: float
    attention: float
    movement: float
    source: str
    transfers: float = 1.0


# No GPU measurement is committed yet: round figures below what tuned kernels reach on large bf16 shapes.
ASSUMED = Efficiency(products=0.65, attention=0.4, movement=0.75, source="assumed, not measured", transfers=0.8)
FULL = Efficiency(products=1.0, attention=1.0, movement=1.0, source="bound")


def seconds(costs: Iterable[OperatorCost], card: Card, efficiency: Efficiency = ASSUMED) -> float:
    """Time of operators that run one after the other."""
    total = 0.0
    for cost in costs:
        share = efficiency.attention if cost.attention else efficiency.products
        computing = cost.flops / (card.peak_flops * share)
        total += max(computing, cost.traffic / (card.bandwidth * efficiency.movement))
    return total
