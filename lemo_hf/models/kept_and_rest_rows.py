"""One layer's run over its kept rows, under autograd, and its rest rows, without; sparse_decoder.py has the formulas."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .document_attention import AttentionScope, attend, with_kept_row_gradient
from .documents import Documents
from .kept_key_attention import KeptKeyScope, attend_kept_keys, with_rest_keys
from .lemo_config import AttentionForward
from .nearby_attention import NearbyScope, attend_nearby
from .row_movement import TakenRows, add_and_norm, interleave, lay_among, merge, rest_norm, take
from .token_elimination import Selection, gather_rows
from .two_dimensional_sparsity import AttentionPattern, attend_in_pattern

# Rows whose MLP runs at one time without autograd: enough for any card to be busy.
_ROWS_AT_ONCE = 16384


class RowLayer(Protocol):
    """A layer's modules on flat rows, as sparse_decoder.py describes them."""

    @property
    def attention_scale(self) -> float:
        """Factor on the dot products."""

    @property
    def attention_window(self) -> int | None:
        """Positions that a token sees."""

    @property
    def plain_norms(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The two norms where kernels may compute them."""

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
    """Position tensors of some flat rows, as `project_heads` takes them; none where positions are in the rows already."""
    return (*rotary, rows) if rotary else ()


def heads_of(layer: RowLayer, normed: Tensor, rotary: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some flat rows, `(rows, heads, head_dim)` each, as flash operators take them."""
    heads = layer.project_heads(normed, rows_of(rotary, rows))
    device = normed.device.type
    if not torch.is_autocast_enabled(device):
        return heads
    # Rotary leaves float32 queries and keys beside 16-bit values; autocast knows SDPA but not its flash operator.
    query, key, value = (head.to(torch.get_autocast_dtype(device)) for head in heads)
    return query, key, value


class KeptAndRestRows:
    """One layer's run: kept rows under autograd, rest rows without.

    Args:
        layer: The layer's modules.
        selection: Its rows.
        documents: The batch's documents.
        rotary: Position tensors by flat row.
        form: What attends to what: all rows to all in the exact form, all rows to kept and nearby ones with `"kept_keys"`, kept rows
            to kept rows in the sparse form.
        pattern: Which of them they attend to, in the sparse form; `None` for all.
        nearby: Tokens that a row sees though they are not kept, itself included, `None` for all earlier ones: every row with `"kept_keys"`,
            in the sparse form rest rows alone (0 for no attention of these), in the exact form kept queries' gradients.

    Its methods turn autograd off by blocks, not by decorators: torch.compile cannot trace a decorated method of an object
    that is made within the graph.
    """

    def __init__(
        self,
        layer: RowLayer,
        selection: Selection,
        documents: Documents,
        rotary: tuple[Tensor, ...],
        form: AttentionForward,
        pattern: AttentionPattern | None = None,
        nearby: int | None = 0,
    ) -> None:
        self.layer = layer
        self.selection = selection
        self.documents = documents
        self.rotary = rotary
        self.form = form
        # Whether one attention serves kept and rest rows: its result is then no function of the kept rows alone.
        self.is_shared = form != "sparse"
        self.pattern = pattern
        self.nearby = nearby
        # Of a shared attention the kept rows' output and log-sum-exp once they are known, and the rest keys and values that their
        # gradient reads; until used, the rest rows' output too.
        self.finished: tuple[Tensor, ...] | None = None
        self._rest_heads: tuple[Tensor, ...] = ()
        self._rest_attended: Tensor | None = None

    def project_rest(self, residual: Tensor) -> None:
        """Projects the rest rows, where they attend.

        Before the kept rows' pass, not within it: an adapter's dropout then draws the kept rows' numbers in one stretch,
        which a second run can repeat without the rest rows.
        """
        rows = self.selection.rest_rows
        if (self.is_shared or self.nearby) and rows.numel():
            with torch.no_grad():
                _, normed = rest_norm(residual, rows, None, self.layer.attention_norm, self.layer.plain_norms[0])
                self._rest_heads = heads_of(self.layer, normed, self.rotary, rows)

    def take(self, residual: Tensor, *, and_norm: bool = True) -> TakenRows:
        """The kept rows of `residual` `(all_rows, hidden)`, normalised too where that is one pass and wanted."""
        return take(residual, self.selection, self.layer.plain_norms[0] if and_norm else None)

    def forward(self, residual: Tensor, taken: TakenRows) -> Tensor:
        """The layer on all real rows of `residual` `(all_rows, hidden)`, its kept rows taken already."""
        kept, kept_update = self.kept_forward(taken.kept, normed=taken.normed)
        rest, rest_update = self.rest_forward(residual)
        return merge(taken, kept, kept_update, rest, rest_update, self.selection)

    def kept_forward(
        self,
        kept: Tensor,
        finished: tuple[Tensor, ...] | None = None,
        normed: Tensor | None = None,
        *,
        for_backward: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The layer on kept rows `(kept, hidden)`.

        Args:
            kept: Kept rows of the residual stream.
            finished: What `finished` held after the first run, in a shared attention's second run; the first
                run of any form reads the rest rows' heads, which `project_rest` has supplied where they attend.
            normed: The kept rows normalised for attention, where they are.
            for_backward: Whether the result is wanted for its gradient alone: rows that the MLP does not keep then skip it.

        Returns:
            Two parts, `(kept, hidden)` each, whose sum is the kept rows' new value: the rows after attention, and the MLP's output.
        """
        scope = self._scope(self.selection.kept_lengths, self.selection.real_kept)
        normed = self.layer.attention_norm(kept) if normed is None else normed
        query, key, value = heads_of(self.layer, normed, self.rotary, self.selection.kept_rows)
        if self.pattern is not None:
            output = attend_in_pattern(query, key, value, scope, self.pattern)
        else:
            output = self._attend_kept(query, key, value, scope, finished)
        if self._rest_heads:  # in the sparse form's first run: a shared attention has taken them
            self._attend_rest(key, value)
        update = self.layer.project_output(output)
        if self.selection.mlp_kept is not None:
            return self._with_fewer_rows(kept + update, for_backward)
        middle, normed = add_and_norm(kept, update, self.layer.mlp_norm, self.layer.plain_norms[1])
        return middle, self.layer.feed_forward(normed)

    @property
    def can_attend_ahead(self) -> bool:
        """Whether `attend_ahead` finds what `kept_forward` would: not where an adapter's dropout draws anew at each run."""
        layer: Any = self.layer
        draws = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in layer.modules())
        return not draws or not (self.is_shared or self._rest_heads)

    def attend_ahead(self, kept: Tensor) -> tuple[Tensor, ...] | None:
        """Runs, without autograd, what of attention reads rest rows, from the kept rows `(kept, hidden)`.

        Afterwards `kept_forward` is a function of its arguments alone, without effects, and can be run again as it is.

        Returns:
            Of a shared attention what `kept_forward` takes as `finished`.
        """
        if not (self.is_shared or self._rest_heads):
            return None
        with torch.no_grad():
            # Of a copy: a compiler that sees the same steps twice saves their results instead of taking them again.
            normed = self.layer.attention_norm(kept.clone())
            query, key, value = heads_of(self.layer, normed, self.rotary, self.selection.kept_rows)
            if self.is_shared:
                return self._attend_all(query, key, value)
            self._attend_rest(key, value)
        return None

    def _attend_kept(
        self, query: Tensor, key: Tensor, value: Tensor, scope: AttentionScope, finished: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Attention of the kept rows: to all of them in the sparse form, otherwise to rest rows too."""
        if finished is None:
            with torch.no_grad():
                finished = self._attend_all(query, key, value) if self.is_shared else attend(query, key, value, scope)
            if self.is_shared:
                self.finished = finished  # for kept-row checkpointing to store; the sparse form runs its attention again
        attended, lse, *rest = finished
        attended = with_kept_row_gradient(query, key, value, attended, lse, scope)
        return with_rest_keys(attended, query, lse, rest[0], rest[1], self._reach()) if rest else attended

    def _reach(self) -> KeptKeyScope:
        """What rows see of dropped keys; in the exact form kept queries' gradients alone are asked."""
        longest = max(self.documents.lengths)
        width = longest if self.nearby is None else min(self.nearby, longest)
        return KeptKeyScope(self.selection, self.documents, self.layer.attention_scale, width, self.layer.attention_window)

    def _with_fewer_rows(self, middle: Tensor, for_backward: bool) -> tuple[Tensor, Tensor]:
        """Kept rows after attention `(kept, hidden)`, and the MLP's output, with gradient at the rows that the MLP keeps."""
        at, rest_at = self.selection.mlp_kept, self.selection.mlp_rest
        assert at is not None
        assert rest_at is not None
        output = self.layer.feed_forward(self.layer.mlp_norm(gather_rows(middle, at)))
        with torch.no_grad():
            if for_backward:
                rest = output.new_zeros(rest_at.shape[0], output.shape[1])
            else:
                rest = self._feed_forward_in_parts(self.layer.mlp_norm(gather_rows(middle, rest_at)))
        return middle, lay_among(output, rest, at, rest_at)

    def _scope(self, lengths: list[int], real_rows: Tensor | None = None) -> AttentionScope:
        """What attention among all real rows, or some of them, needs to know; `lengths` of them belong to each document."""
        scale, window = self.layer.attention_scale, self.layer.attention_window
        if window is None or window >= max(self.documents.lengths):
            return AttentionScope(lengths, scale)
        positions = self.documents.place_of_row
        return AttentionScope(lengths, scale, window, positions if real_rows is None else positions[real_rows])

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Attention of all real rows: what `finished` holds; the rest rows' output is put by."""
        kept_at, rest_at = self.selection.real_kept, self.selection.real_rest
        # A row that sees itself alone besides kept ones sees no dropped key.
        sees_none = self.nearby is not None and self.nearby <= 1
        of_kept, of_rest = (key, value), () if sees_none else self._rest_heads[1:]
        if self._rest_heads:
            # Every row is projected once; kept and rest are laid into one transient buffer.
            query, key, value = interleave((query, key, value), self._rest_heads, kept_at, rest_at)
            self._rest_heads = ()
        if self.form == "kept_keys" and rest_at.numel():
            output, lse = attend_kept_keys(query, key, value, *of_kept, self._reach())
        else:
            output, lse = attend(query, key, value, self._scope(self.documents.lengths))
        self._rest_attended = output.index_select(0, rest_at)
        return output.index_select(0, kept_at), lse.index_select(0, kept_at), *of_rest

    def _attend_rest(self, key: Tensor, value: Tensor) -> None:
        """The rest rows' attention to the tokens just before them, put by; `key` and `value` are those of kept rows."""
        query, *rest = self._rest_heads
        self._rest_heads = ()
        window = self.layer.attention_window
        assert self.nearby is not None, "the sparse form's width is a number"
        width = self.nearby if window is None else min(self.nearby, window)
        with torch.no_grad():
            keys, values = interleave((key, value), tuple(rest), self.selection.real_kept, self.selection.real_rest)
            scope = NearbyScope(self.selection, self.documents, self.layer.attention_scale, width)
            self._rest_attended = attend_nearby(query, keys, values, scope)

    def rest_forward(self, residual: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rest rows, without autograd, after `kept_forward`.

        Returns:
            Two parts, `(rest, hidden)` each, whose sum is the rest rows' new value. The first is `None` if it is what the
            residual stream holds; both are if there are no rest rows.
        """
        rows = self.selection.rest_rows
        if not rows.numel():
            return None, None
        with torch.no_grad():
            update = None
            if self._rest_attended is not None:
                update = self.layer.project_output(self._rest_attended)
                self._rest_attended = None
            rest, normed = rest_norm(residual, rows, update, self.layer.mlp_norm, self.layer.plain_norms[1])
            return rest, self._feed_forward_in_parts(normed)

    def _feed_forward_in_parts(self, normed: Tensor) -> Tensor:
        """The MLP of rows that nothing is saved of, so that its inner rows, wider than the residual stream, exist for a part at a time."""
        first, *others = normed.split(_ROWS_AT_ONCE)
        update = self.layer.feed_forward(first)
        if not others:
            return update
        whole = update.new_empty(normed.shape[0], update.shape[1])
        places = whole.split(_ROWS_AT_ONCE)
        places[0].copy_(update)
        for place, part in zip(places[1:], others, strict=True):
            place.copy_(self.layer.feed_forward(part))
        return whole
