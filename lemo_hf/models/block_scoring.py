"""A layer's block scores, predicted or true, for its selection and its attention pattern."""

import torch
from torch import Tensor, nn

from .documents import Documents
from .kept_and_rest_rows import rows_of
from .kept_row_checkpoint import random_state, random_state_restored
from .kernel_switch import kernel
from .lemo_config import BlockReduction
from .pattern_predictor import PatternPredictor, predicted_block_scores
from .pooled_predictor import LayerPredictor, block_rotary
from .row_movement import predicted_features
from .sparse_batch import SparseBatch
from .token_elimination import Selection, gather_rows
from .token_informativeness import block_informativeness, block_scores
from .two_dimensional_sparsity import AttentionPattern, ShiftedGroups, choose_pairs


class BlockScoring:
    """Mixin of a decoder layer: scores of its blocks from what the methods give that name its modules."""

    layer_idx: int
    lemo_predictor: LayerPredictor

    def attention_norm(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def plain_norms(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The norms before attention and MLP where kernels may compute them with what stands around them: modules of a kind
        that they know, unpatched, and all that `attention_norm` and `mlp_norm` do; `None` where those have to be called.
        """
        return None, None

    def project_heads(self, rows: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(rows, heads, head_dim)`, keys and values `(rows, key_value_heads, head_dim)`, positions applied.

        Args:
            rows: Normalised rows.
            rotary: Position tensors by flat row and, where the rows are not all of them, the flat row of each.
        """
        raise NotImplementedError

    @property
    def attention_scale(self) -> float:
        """Factor on the dot products of `project_heads`' queries and keys."""
        raise NotImplementedError

    @property
    def attention_window(self) -> int | None:
        """Positions that a token sees, itself included; `None` if all earlier ones."""
        return None

    @torch.no_grad()
    def choose_pattern(
        self, residual: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch, selection: Selection
    ) -> AttentionPattern | None:
        """What the layer's kept rows see of each other, made once per batch; `None` for all earlier ones. As in `choose`."""
        name = "full" if batch.keeps_everything else batch.config.pattern_of(self.layer_idx, batch.num_layers)
        if name == "full":
            return None
        if self.layer_idx not in batch.patterns:
            pattern: AttentionPattern = ShiftedGroups(batch.config.group_size)
            if name == "block_sparse":
                scores, share = self.pair_scores(residual, rotary, batch), batch.config.pattern_share
                pattern = choose_pairs(scores, selection, batch.documents, share, self.attention_window)
            batch.patterns[self.layer_idx] = pattern
        return batch.patterns[self.layer_idx]

    def informativeness(self, residual: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch) -> list[Tensor]:
        """I of each document's blocks, predicted or true as the config says; arguments as in `choose`."""
        documents, size = batch.documents, batch.config.block_size
        if batch.config.score_source == "predicted":
            return self.lemo_predictor.informativeness_of(*self.block_features(residual, batch), documents)
        query, key = self.queries_and_keys(residual, rotary, documents)
        reduction = batch.config.block_reduction
        # Means are made of pooled queries and keys, which is one pass over them: no kernel has anything to save.
        if reduction == "max" and (fast := kernel("informativeness_by_document", query, query.shape[2], size)) is not None:
            return fast(query, key, documents.lengths, size, self.attention_scale, self.attention_window)
        parts = zip(query.split(documents.lengths), key.split(documents.lengths), strict=True)
        return [block_informativeness(self.block_scores(q, k, size, reduction)) for q, k in parts]

    def pair_scores(self, residual: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch) -> list[Tensor]:
        """S of each document, `(blocks, blocks)`, predicted or true as the config says; arguments as in `choose`."""
        documents = batch.documents
        if batch.config.score_source == "predicted":
            of_blocks = (documents.split_blocks(part) for part in self.block_features(residual, batch))
            distance = self.lemo_predictor.distance
            return [predicted_block_scores(q, k, distance.by_distance(len(q))) for q, k in zip(*of_blocks, strict=True)]
        heads = self.queries_and_keys(residual, rotary, documents)
        parts = zip(*(part.split(documents.lengths) for part in heads), strict=True)
        return [self.block_scores(q, k, batch.config.block_size, batch.config.block_reduction) for q, k in parts]

    def block_features(self, residual: Tensor, batch: SparseBatch) -> tuple[Tensor, Tensor]:
        """The predictor's query and key features of all blocks, `(blocks, p)` each; arguments as in `choose`."""
        if batch.features is None or batch.features[0] != self.layer_idx:
            documents = batch.documents
            predictor = self.lemo_predictor
            if isinstance(predictor, PatternPredictor):
                features = predicted_features(residual, documents, self.plain_norms[0], predictor)
                if features is None:
                    features = predictor(self.normed_rows(residual, documents), documents)
            else:
                rotary = block_rotary(batch.rotary, documents)
                features = predictor(self.normed_rows(residual, documents), documents, rotary)
            batch.features = self.layer_idx, features
        return batch.features[1]

    def queries_and_keys(self, residual: Tensor, rotary: tuple[Tensor, ...], documents: Documents) -> tuple[Tensor, Tensor]:
        """Those of all real rows, for true scores; arguments as in `choose`."""
        hidden = self.normed_rows(residual, documents)
        # A layer that is run again does not choose again, so choosing must not advance the dropout of what follows.
        with random_state_restored(random_state(hidden.device), hidden.device):
            query, key, _ = self.project_heads(hidden, rows_of(rotary, documents.rows))
        return query, key

    def normed_rows(self, residual: Tensor, documents: Documents) -> Tensor:
        """The layer's attention input of all real rows, `(real_rows, hidden)`."""
        return self.attention_norm(residual if documents.has_no_padding else gather_rows(residual, documents.rows))

    def block_scores(self, query: Tensor, key: Tensor, block_size: int, reduction: BlockReduction = "max") -> Tensor:
        """True S of one document, `(blocks, blocks)`, from its queries and keys as `project_heads` gives them."""
        return block_scores(query, key, block_size, self.attention_scale, self.attention_window, reduction=reduction)
