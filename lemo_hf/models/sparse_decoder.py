"""The mixins that put token elimination around a stock decoder (LeMo paper, section 4; the forms `exact` and `kept_keys` and the
MLP rule are ours).

A layer splits its rows once. *Kept* rows run the whole layer under autograd, so a sublayer saves kept rows only. *Rest* rows
run what they need under `no_grad`: their MLP always (its output is exact), and attention too where it is shared: the dense one in
the exact form, to kept rows and the `nearby_tokens` latest with `kept_keys`. A rest row's update is a constant to backward, its
gradient stays on the residual stream. With kept rows K, rest rows R, N = norm and V(i) = K up to i and the rows just before i:

    sparse     x[K] += Attn(N(x)[K] -> K);    x[K] += MLP(N(x[K]));                                 x[R] += MLP(N(x[R]))
    kept_keys  x[K] += Attn(N(x)[K] -> V);    x[K] += MLP(N(x[K]));   x[R] += Attn(N(x)[R] -> V);   x[R] += MLP(N(x[R]))
    exact      x[K] += Attn(N(x)[K] -> all);  x[K] += MLP(N(x[K]));   x[R] += Attn(N(x)[R] -> all); x[R] += MLP(N(x[R]))

Where attention is shared, kept queries get their gradient through all keys that they see, and keys and values of R get none.

Saved per kept row in rows of H: norms 2, shared input of q, k, v 1, attention (q, k, v, output) 2 + 2 kv/heads, gated MLP 2 I / H;
per rest row of a shared attention its key and value, 2 kv/heads. With `checkpoint="kept_rows"`: the kept residual row, and of a
shared attention the kept output and log-sum-exp and those keys and values, so that neither its forward nor a rest row is ever run
again. In the sparse form K may attend to itself in a sparse pattern (two_dimensional_sparsity.py), and R to the tokens just before
it (`nearby_tokens`, nearby_attention.py), saving as much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .block_scoring import BlockScoring
from .documents import Documents, PaddingMaskError, find_documents
from .kept_and_rest_rows import KeptAndRestRows
from .kept_row_checkpoint import checkpoint_kept_rows
from .lemo_config import LemoConfig, LemoConfigError
from .pooled_predictor import layer_predictor
from .sparse_batch import SparseBatch as SparseBatch  # part of what this module offers
from .token_elimination import Selection, choose_blocks, keep_everything


class SparseDecoderLayer(BlockScoring):
    """Mixin of a stock decoder layer (before it in the bases): runs the layer on kept rows where a `SparseBatch` is passed.

    The family's mixin or the architecture's file supplies the small methods that name its modules; all work on flat rows.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.layer_idx = layer_idx
        self.lemo_predictor = layer_predictor(config.lemo, config.hidden_size, layer_idx)

    def forward(self, hidden_states: Tensor, *args: Any, sparse_batch: SparseBatch | None = None, **kwargs: Any) -> Tensor:
        if sparse_batch is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return self.sparse_forward(hidden_states, self.position_embeddings(kwargs), sparse_batch)

    def position_embeddings(self, layer_arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """What `project_heads` needs of the positions, each `(batch or 1, seq_len, dim)`, from the layer's keyword arguments."""
        raise NotImplementedError

    def mlp_norm(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def project_output(self, attended: Tensor) -> Tensor:
        raise NotImplementedError

    def feed_forward(self, rows: Tensor) -> Tensor:
        """The MLP on normalised rows, without the residual."""
        raise NotImplementedError

    @torch.no_grad()
    def choose(self, residual: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch) -> Selection:
        """The layer's selection, made once per batch.

        Args:
            residual: The layer's input, `(all_rows, hidden)`.
            rotary: Position tensors by flat row.
            batch: The batch; it remembers the result.
        """
        if self.layer_idx not in batch.selections:
            if batch.keeps_everything or batch.config.is_dense(self.layer_idx, batch.num_layers):
                selection = keep_everything(batch.documents)
            elif (drawn := batch.drawn_already(self.layer_idx)) is not None:
                selection = drawn
            else:
                scores = self.informativeness(residual, rotary, batch) if batch.config.needs_scores else None
                selection = choose_blocks(scores, batch.documents, batch.config, self.layer_idx, batch.draw)
            batch.selections[self.layer_idx] = selection
        return batch.selections[self.layer_idx]

    def sparse_forward(self, hidden_states: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch) -> Tensor:
        """Runs the layer on the rows it chooses.

        Args:
            hidden_states: Residual stream, `(batch, seq_len, hidden)`; not modified.
            rotary: Position tensors, each `(batch or 1, seq_len, dim)`.
            batch: Documents and settings of this forward.

        Returns:
            The new residual stream, `(batch, seq_len, hidden)`; padding rows pass unchanged.
        """
        residual = hidden_states.flatten(0, 1)
        flat_rotary = batch.flat_rotary(rotary)
        selection = self.choose(residual, flat_rotary, batch)
        pattern = self.choose_pattern(residual, flat_rotary, batch, selection)
        form, nearby = batch.config.attention_forward, batch.config.nearby
        split = KeptAndRestRows(self, selection, batch.documents, flat_rotary, form, pattern, nearby)
        split.project_rest(residual)
        if batch.config.checkpoint == "kept_rows" and torch.is_grad_enabled():
            weights = [weight for weight in self.parameters() if weight.requires_grad]  # type: ignore[attr-defined]
            merged = checkpoint_kept_rows(residual, split, weights)
        else:
            merged = split.forward(residual, split.take(residual))
        # No view, to which FSDP2 could not tie its hooks safely; `merged` is not used again.
        return torch.ops.aten._unsafe_view(merged, hidden_states.shape)


class SparseBackbone:
    """Mixin of a stock backbone (before it in the bases): finds documents and runs the layers sparsely in training mode.

    In evaluation it is the stock backbone, but for one kind of batch: several documents in a row. Stock code keeps these apart
    only where it finds restarts in `position_ids`, no mask and no cache (which it makes by default), OPT never. Here every layer
    keeps all rows of a sparse forward then: the dense values, each document's as if it were alone.
    """

    config: Any
    training: bool
    layer_class: type[nn.Module]
    # Set by `sparse_evaluation`: the sparse forward without gradients, for calibration and for labelled comparisons.
    lemo_sparse_evaluation = False
    # Number of the next training forward, counted in sampled selection only. Trainer callbacks set it from the global step, so
    # that a resumed run draws alike.
    lemo_draw = 0
    # By layer the share of rows that the last sparse forward kept, in [0, 1], for logging; numbers only, so that no tensor of
    # a batch outlives its step.
    lemo_kept_shares: tuple[float, ...] = ()

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.layers = nn.ModuleList(self.layer_class(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor | None = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        lemo: LemoConfig = self.config.lemo
        active = lemo.enabled and (self.training or self.lemo_sparse_evaluation)
        if active and kwargs.get("past_key_values") is not None:
            if self.training and torch.is_grad_enabled():
                raise LemoConfigError(
                    "LeMo trains without a cache; got past_key_values, as prefix tuning passes them; use LoRA, or train with enabled=False"
                )
            active = False  # generation, which is inference whatever the mode
        documents = None
        if active:
            self._refuse_unsupported(kwargs)
            documents = self._documents(input_ids, attention_mask, kwargs)
        elif lemo.enabled and not self.training and kwargs.get("past_key_values") is None:
            documents = self._packed_documents(input_ids, attention_mask, kwargs)
        if documents is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        # Only sampled selection reads the number: elsewhere it would make torch.compile compile every step anew.
        sampled = active and lemo.selection == "sampled"
        draw = self.lemo_draw if sampled else 0
        batch = SparseBatch(documents, lemo, self.config.num_hidden_layers, draw, keeps_everything=not active)
        if self.training and sampled:
            self.lemo_draw += 1
        if not documents.lengths:
            # Nothing but padding: the stock forward still gives every weight its zero gradient, which a backward pass expects.
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        # A mask that is 4-dimensional already is passed through by the stock code: no (seq_len, seq_len) mask is ever formed,
        # and the layers read documents instead.
        no_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=documents.device)
        kwargs["use_cache"] = False
        kwargs["position_ids"] = self.sparse_position_ids(documents, _shape_of(input_ids, kwargs)[0], kwargs.get("position_ids"))
        output = super().forward(input_ids=input_ids, attention_mask=no_mask, sparse_batch=batch, **kwargs)  # type: ignore[misc]
        if active:
            self.lemo_kept_shares = tuple(batch.selections[layer].kept_share for layer in range(batch.num_layers))
        return output

    def _documents(self, input_ids: Tensor | None, attention_mask: Any, kwargs: dict[str, Any]) -> Documents:
        return find_documents(
            *_shape_of(input_ids, kwargs),
            self.config.lemo.block_size,
            (kwargs["inputs_embeds"] if input_ids is None else input_ids).device,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=kwargs.get("position_ids"),
            seq_idx=kwargs.get("seq_idx"),
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        )

    def _packed_documents(self, input_ids: Tensor | None, attention_mask: Any, kwargs: dict[str, Any]) -> Documents | None:
        """The documents of a batch of evaluation that has several in a row; `None` for any other, which is the stock model's."""
        if all(kwargs.get(name) is None for name in ("position_ids", "seq_idx", "cu_seq_lens_q")):
            return None
        try:
            documents = self._documents(input_ids, attention_mask, kwargs)
        except PaddingMaskError:
            return None  # training refuses such a mask; what evaluation makes of it is the stock model's
        if not documents.are_packed(_shape_of(input_ids, kwargs)[0]):
            return None
        self._refuse_unsupported(kwargs)
        return documents

    def sparse_position_ids(self, documents: Documents, batch_size: int, given: Tensor | None) -> Tensor | None:
        """The `position_ids` of a sparse forward: every document counts from its own start, wherever it lies.

        To rotary positions only distance matters, but they are rounded, and some scalings look at the largest.

        Args:
            documents: The batch's documents, at least one.
            batch_size: Rows of the batch.
            given: What the caller passed.

        Returns:
            `(batch or 1, seq_len)`, or `None` where stock code counts the same.
        """
        if given is not None or all(start * batch_size % documents.num_rows == 0 for start in documents.starts):
            return given
        return documents.positions(padding=0).view(batch_size, -1)

    def _refuse_unsupported(self, kwargs: dict[str, Any]) -> None:
        for name, fact in (("attention_dropout", "LeMo attention has no dropout"), ("layerdrop", "LeMo runs every layer")):
            if value := getattr(self.config, name, 0.0):
                raise LemoConfigError(f"{fact}; the config has {name}={value}; set it to 0.0")
        if not getattr(self.config, "is_causal", True):
            raise LemoConfigError("LeMo attention is causal; the config has is_causal=False; train with enabled=False")
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise LemoConfigError(
                "attention weights are never formed here; got output_attentions=True; ask for them after model.eval(), "
                "one document a row"
            )


def _shape_of(input_ids: Tensor | None, kwargs: dict[str, Any]) -> tuple[int, int]:
    tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
    if tokens is None:
        raise ValueError("the model needs tokens; got neither input_ids nor inputs_embeds; pass one of them")
    return tokens.shape[0], tokens.shape[1]


@contextmanager
def sparse_evaluation(backbone: Any) -> Iterator[None]:
    """Runs the sparse forward in evaluation mode, for calibration and for figures labelled as sparse.

    Args:
        backbone: A model with `SparseBackbone` among its bases.
    """
    before = backbone.lemo_sparse_evaluation
    backbone.lemo_sparse_evaluation = True
    try:
        yield
    finally:
        backbone.lemo_sparse_evaluation = before


def sparse_backbone(model: nn.Module) -> Any:
    """The backbone with LeMo inside `model`, through PEFT's and other wrappers.

    It is recognised by its config's `lemo` block and its layers, not by `isinstance`: classes that came as remote code are
    not this package's.

    Raises:
        LemoConfigError: If there is none.
    """
    for module in model.modules():
        if hasattr(module, "lemo_sparse_evaluation") and hasattr(getattr(module, "config", None), "lemo"):
            return module
    raise LemoConfigError(
        f"the model carries no LeMo; got {type(model).__name__}; load it with AutoLemoModelForCausalLM.from_pretrained"
    )
