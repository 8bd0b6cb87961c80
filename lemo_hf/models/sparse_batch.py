"""What the layers of one sparse forward share: documents, settings, and what each layer has chosen."""

from torch import Tensor

from .documents import Documents
from .lemo_config import LemoConfig
from .token_elimination import Selection
from .two_dimensional_sparsity import AttentionPattern


class SparseBatch:
    """What the layers of one sparse forward share. It travels as a keyword argument of the layers, so a layer that is run again
    by activation checkpointing finds the selection of its first run. No dataclass: FSDP2 would hand each layer a copy, cast to
    16 bits.

    Args:
        documents: The batch's documents.
        config: The model's `LemoConfig`.
        num_layers: Layers of the model.
        draw: Number of this training forward, for sampled selection.
        keeps_everything: Whether no layer chooses: evaluation of packed documents.
        selections: What each layer chose, filled as the layers run.
        rotary: Position tensors by flat row, filled by the first layer.

    `patterns` holds the attention pattern of each layer that has one, found as the layer runs; `features` the predicted block
    features of the layer that ran last, for its selection and its pattern.
    """

    def __init__(
        self,
        documents: Documents,
        config: LemoConfig,
        num_layers: int,
        draw: int,
        keeps_everything: bool = False,
        selections: dict[int, Selection] | None = None,
        rotary: tuple[Tensor, ...] = (),
    ) -> None:
        self.documents = documents
        self.config = config
        self.num_layers = num_layers
        self.draw = draw
        self.keeps_everything = keeps_everything
        self.selections = {} if selections is None else selections
        self.rotary = rotary
        self.patterns: dict[int, AttentionPattern] = {}
        self.features: tuple[int, tuple[Tensor, Tensor]] | None = None
        # The documents' index tensors are made at their first use. That is here and in no layer: their copies to the device
        # are then behind us, and torch.compile (which cannot trace how they are remembered) breaks no layer's graph for them.
        if documents.lengths:
            _ = documents.rows, documents.block_of_row, documents.place_of_row
            if self.config.needs_predictors and not self.keeps_everything:
                _ = documents.block_spans

    def flat_rotary(self, rotary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Position tensors by flat row, laid out once for all layers; from `(batch or 1, seq_len, dim)` each."""
        if not self.rotary:
            rows = self.documents.num_rows
            self.rotary = tuple(part.expand(rows // part.shape[1], -1, -1).flatten(0, 1) for part in rotary)
        return self.rotary

    def forget(self, layer: int) -> None:
        """Has `layer` choose anew where it runs again on another input."""
        self.selections.pop(layer, None)
        self.patterns.pop(layer, None)
        if self.features is not None and self.features[0] == layer:
            self.features = None

    def drawn_already(self, layer: int) -> Selection | None:
        """The selection of an earlier layer that draws what `layer` does: shared draws, uniform, the same share."""
        config = self.config
        if config.selection != "sampled" or config.draws != "shared" or config.needs_scores:
            return None
        for other, selection in self.selections.items():
            if config.ratio_of(other) == config.ratio_of(layer) and not config.is_dense(other, self.num_layers):
                return selection
        return None
