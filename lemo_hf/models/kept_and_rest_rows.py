"""One layer's run over its kept rows, under autograd, and its rest rows, without; sparse_decoder.py has the formulas."""

from typing import Protocol

import torch
from torch import Tensor

from .document_attention import AttentionScope, attend, with_kept_row_gradient
from .token_elimination import Documents, Selection, gather_rows, merge_rows


class RowLayer(Protocol):
    """A layer's modules on flat rows, as sparse_decoder.py describes them."""

    @property
    def attention_scale(self) -> float:
        """Factor on the dot products."""

    @property
    def attention_window(self) -> int | None:
        """Positions that a token sees."""

    def attention_norm(self, rows: Tensor) -> Tensor:
        """Norm before attention."""

    def mlp_norm(self, rows: Tensor) -> Tensor:
        """Norm before the MLP."""

    def project_heads(self, rows: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""

    def project_output(self, attended: Tensor) -> Tensor:
        """Attention's output projection."""

    def feed_forward(self, rows: Tensor) -> Tensor:
        """The MLP."""


def rows_of(rotary: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Position tensors of some flat rows."""
    return tuple(part.index_select(0, rows) for part in rotary)


class KeptAndRestRows:
    """One layer's run: kept rows under autograd, rest rows without.

    Its methods turn autograd off by blocks, not by decorators: torch.compile cannot trace a decorated method of an object
    that is made within the graph.
    """

    def __init__(
        self, layer: RowLayer, selection: Selection, documents: Documents, rotary: tuple[Tensor, ...], exact: bool
    ) -> None:
        self.layer = layer
        self.selection = selection
        self.documents = documents
        self.rotary = rotary
        self.exact = exact
        # In the exact form the kept rows' attention output and log-sum-exp once they are known; until used, the rest rows' too.
        self.finished: tuple[Tensor, Tensor] | None = None
        self._rest_heads: tuple[Tensor, ...] = ()
        self._rest_attended: Tensor | None = None

    def project_rest(self, residual: Tensor) -> None:
        """Projects the rest rows, where the exact form needs them.

        Before the kept rows' pass, not within it: an adapter's dropout then draws the kept rows' numbers in one stretch,
        which a second run can repeat without the rest rows.
        """
        rows = self.selection.rest_rows
        if self.exact and rows.numel():
            with torch.no_grad():
                self._rest_heads = self._heads(gather_rows(residual, rows), rows)

    def _heads(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.layer.project_heads(self.layer.attention_norm(hidden), rows_of(self.rotary, rows))
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            return heads
        # Rotary leaves float32 queries and keys beside 16-bit values; autocast knows SDPA but not its flash operator.
        query, key, value = (head.to(torch.get_autocast_dtype(device)) for head in heads)
        return query, key, value

    def forward(self, residual: Tensor, kept: Tensor) -> Tensor:
        """The layer on all real rows of `residual` `(all_rows, hidden)`; `kept` is its kept rows `(kept, hidden)`."""
        kept = self.kept_forward(kept)
        return merge_rows(residual, kept, self.rest_forward(residual), self.selection)

    def kept_forward(self, kept: Tensor, finished: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The layer on kept rows `(kept, hidden)`.

        Args:
            kept: Kept rows of the residual stream.
            finished: Their attention output and log-sum-exp where these are known, in the exact form's second run; the first
                one reads the rest rows' heads, which `project_rest` has supplied.
        """
        scope = self._scope(self.selection.kept_lengths, self.selection.real_kept)
        query, key, value = self._heads(kept, self.selection.kept_rows)
        if finished is None:
            with torch.no_grad():
                finished = self._attend_all(query, key, value) if self.exact else attend(query, key, value, scope)
            if self.exact:
                self.finished = finished  # for kept-row checkpointing to store; the sparse form runs its attention again
        output = with_kept_row_gradient(query, key, value, *finished, scope)
        middle = kept + self.layer.project_output(output)
        return middle + self.layer.feed_forward(self.layer.mlp_norm(middle))

    def _scope(self, lengths: list[int], real_rows: Tensor | None = None) -> AttentionScope:
        """What attention among all real rows, or some of them, needs to know; `lengths` of them belong to each document."""
        scale, window = self.layer.attention_scale, self.layer.attention_window
        if window is None or window >= max(self.documents.lengths):
            return AttentionScope(lengths, scale)
        positions = self.documents.place_of_row
        return AttentionScope(lengths, scale, window, positions if real_rows is None else positions[real_rows])

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The dense attention of all real rows: kept rows' output and log-sum-exp; the rest rows' output is put by."""
        kept_at, rest_at = self.selection.real_kept, self.selection.real_rest
        if self._rest_heads:
            # Every row is projected once; kept and rest are laid into one transient buffer.
            pairs = zip((query, key, value), self._rest_heads, strict=True)
            query, key, value = (_interleave(*pair, kept_at, rest_at) for pair in pairs)
            self._rest_heads = ()
        output, lse = attend(query, key, value, self._scope(self.documents.lengths))
        self._rest_attended = output.index_select(0, rest_at)
        return output.index_select(0, kept_at), lse.index_select(0, kept_at)

    def rest_forward(self, residual: Tensor) -> Tensor | None:
        """New values of the rest rows, `(rest, hidden)`, without autograd, after `kept_forward`; `None` if there are none."""
        if not self.selection.rest_rows.numel():
            return None
        with torch.no_grad():
            rest = gather_rows(residual, self.selection.rest_rows)
            if self._rest_attended is not None:
                rest = rest + self.layer.project_output(self._rest_attended)
                self._rest_attended = None
            return rest + self.layer.feed_forward(self.layer.mlp_norm(rest))


def _interleave(kept: Tensor, rest: Tensor, kept_at: Tensor, rest_at: Tensor) -> Tensor:
    merged = kept.new_empty(kept.shape[0] + rest.shape[0], *kept.shape[1:])
    merged.index_copy_(0, kept_at, kept)
    return merged.index_copy_(0, rest_at, rest)
