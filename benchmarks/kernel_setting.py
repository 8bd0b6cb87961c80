"""What benchmarks/kernel_times.py measures with: the sizes of a measurement, and what a kernel is compared with at these."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lemo_hf.models.documents import Documents, find_documents
from lemo_hf.models.token_elimination import Selection, selection_of_blocks


@dataclass(frozen=True)
class Setting:
    """Sizes of one measurement: Llama-3-8B's unless tiny, and the default predictor's rank and features."""

    rows: int
    keep: float
    device: torch.device
    dtype: torch.dtype
    hidden: int = 4096
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    predictor: int = 32
    vocabulary: int = 128256
    block_size: int = 64
    segment: int = 1024

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers; the generator's state moves on."""
        return (torch.randn(*shape, device=self.device, dtype=torch.float32) * scale).to(self.dtype)

    def kept_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of blocks chosen at random, and the others; both sorted."""
        blocks = self.rows // self.block_size
        chosen = torch.randperm(blocks, device=self.device)[: max(1, round(self.keep * blocks))]
        marks = torch.zeros(blocks, dtype=torch.bool, device=self.device).index_fill_(0, chosen, True)
        marks = marks.repeat_interleave(self.block_size)
        return marks.nonzero().squeeze(1), (~marks).nonzero().squeeze(1)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return torch.empty(0, dtype=self.dtype).element_size()


@dataclass
class Case:
    """One kernel at one setting.

    Args:
        ours, naive: Both return tensors that must agree.
        bytes: What must move at least; 0 where traffic is not the bound.
        flops: What must be computed, multiply-adds as two; 0 where arithmetic is not the bound.
        others: Further things to time, by name; they return what they like.
        libraries: Other packages' functions for the same, by name; like `ours` they must agree with `naive`.
        missing: Why a package is not among them, by name.
        exact: Whether results must agree bit for bit.
        allowed: How many times the error of a result they may have: twice where gradients are among them, which kernel and formula
            both round more than once.
        compiles: Whether `torch.compile` of the formula is timed.
        formula: What `torch.compile` is given where `naive` asks autograd, which it cannot trace; it must agree with `naive`.
    """

    ours: Callable[[], Any]
    naive: Callable[[], Any]
    bytes: int = 0
    flops: int = 0
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    libraries: dict[str, Callable[[], Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    exact: bool = False
    allowed: float = 1.0
    compiles: bool = True
    formula: Callable[[], Any] | None = None


def one_document(setting: Setting) -> tuple[Documents, Selection]:
    """All rows as one document, and a choice of its blocks."""
    documents = find_documents(1, setting.rows, setting.block_size, setting.device)
    marks = torch.zeros(sum(documents.block_counts), dtype=torch.bool, device=setting.device)
    return documents, selection_of_blocks(marks.index_fill_(0, setting.kept_rows()[0] // setting.block_size, True), documents)
