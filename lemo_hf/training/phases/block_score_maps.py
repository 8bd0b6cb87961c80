"""True block scores of one document beside their predictions, from the last probe: what `lemo report` draws.

`lemo_block_scores.safetensors` holds `true.<layer>` and `predicted.<layer>`, S in float32 `(cells, cells)`, for a few layers that
choose blocks. A cell is a block, or in a long document the mean of several, so the file stays below 300 KiB.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from ...evaluation.layer_scores import LayerScores
from ...hub.lemo_files import write_tensors
from ...models.pattern_predictor import predicted_block_scores
from ..lemo_run import LemoRun

logger = logging.getLogger(__name__)

MAPS_FILE = "lemo_block_scores.safetensors"
MAP_LAYERS = 4
MAP_CELLS = 96


class BlockScoreMaps:
    """Gathers the maps while recall is measured; called with every layer of every document.

    Args:
        run: The run; training has begun.
    """

    def __init__(self, run: LemoRun) -> None:
        self._run = run
        layers = len(run.backbone.layers)
        choosing = [layer for layer in range(layers) if not run.lemo.is_dense(layer, layers)]
        count = min(MAP_LAYERS, len(choosing))
        self._layers = [choosing[place * (len(choosing) - 1) // max(count - 1, 1)] for place in range(count)]
        self._maps: dict[str, Tensor] = {}
        self._blocks = 0

    @torch.no_grad()
    def __call__(self, found: LayerScores) -> None:
        """Keeps the first document's maps of a chosen layer."""
        if found.layer not in self._layers or f"true.{found.layer}" in self._maps:
            return
        predictor: Any = found.module.lemo_predictor
        query, key = (found.documents.split_blocks(part)[0] for part in found.features())
        predicted = predicted_block_scores(query, key, predictor.distance.by_distance(len(query)))
        self._blocks = len(query)
        self._maps |= {f"true.{found.layer}": cells(found.scores[0]), f"predicted.{found.layer}": cells(predicted)}

    def save(self) -> None:
        """Writes the file, in place of an earlier probe's."""
        run = self._run
        if not run.writes or not self._maps:
            return
        about = {"step": str(run.step), "blocks": str(self._blocks), "block_size": str(run.lemo.block_size)}
        path = run.folder / MAPS_FILE
        try:
            write_tensors(path, self._maps, about)
        except OSError as error:
            logger.warning("block scores are not written (%s); %s; training goes on, `lemo report` will lack them", error, path)


def cells(scores: Tensor) -> Tensor:
    """Causal block scores on a grid of at most `MAP_CELLS` cells a side, float32 on the CPU; 0 above the diagonal.

    Args:
        scores: S of one document, `(blocks, blocks)`.
    """
    lower = scores.float().tril()
    if len(lower) > MAP_CELLS:
        # On the diagonal a cell has fewer causal pairs: their mean, not that of all.
        parts = lower, torch.ones_like(lower).tril()
        sums, counts = (torch.nn.functional.adaptive_avg_pool2d(part[None, None], MAP_CELLS)[0, 0] for part in parts)
        lower = sums / counts.clamp_min(1e-9)
    return lower.cpu()
