"""How well can any pattern predictor choose blocks on the embedded base model? Recall of oracles that know the exact scores in part.

    nice python benchmarks/predictor_ceiling.py

Windows of 4096 tokens of packages that neither base nor predictors have seen, keep ratio 0.5. By layer:

- `explained_needed`: the share of I's variance within a document that a prediction must explain for a recall of 0.95: true I plus
  Gaussian noise. Beside it `kurtosis` of I (3 is Gaussian, for which it is sin(0.45 pi)^2 = 0.976 in theory).
- `positions`: mean score of the other windows by block pair: reads nothing.
- `partners_<n>`: exact scores against n of the document's blocks, drawn at random, combined with `positions`: a quadratic method
  at n / 64 of the cost.
- `strangers`: exact queries and keys, no low rank, no training, but the partners are blocks of other documents at the same
  distances, combined with `positions`: about what any predictor can reach, whatever its size, that reads a block by itself and does
  not know the blocks it will meet. `strangers_half` has half as many strangers: what more of them would still add.
- `strangers_for_queries`, `strangers_for_keys`: the same with one half of I exact.
- `predictors`: the shipped ones, if they fit the model.

Linear combinations are fitted on the other windows. Memory 2 GB; a few minutes of one core.
"""

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig
from lemo_hf.evaluation.block_recall import document_recall
from lemo_hf.evaluation.layer_scores import LayerScores, visit_layers
from lemo_hf.hub.lemo_files import PREDICTORS_FILE, load_predictors, read_lemo_files
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_informativeness import block_informativeness, block_scores
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import BASE, EVALUATION_PACKAGES, SEQ_LEN, context
from lemo_hf.text_data import pack_documents, python_sources, spread_samples

RESULT = Path(__file__).parent / "results" / "predictor_ceiling--any.json"
PARTNERS = (4, 16, 32)
EXPLAINED = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)
GOAL = 0.95


def recall(true: Tensor, predicted: Tensor, keep_ratio: float) -> float:
    """Mean recall over documents; both `(documents, blocks)`."""
    return sum(document_recall(t, p, keep_ratio)[0] for t, p in zip(true, predicted, strict=True)) / len(true)


def centred(informativeness: Tensor) -> Tensor:
    """I of the free blocks less its mean in the document, `(documents, blocks - 2)`."""
    free = informativeness[:, 1:-1]
    return free - free.mean(1, keepdim=True)


def combined(true: Tensor, *predictions: Tensor) -> Tensor:
    """The best linear combination of the centred predictions, its weights fitted on all other documents."""
    target, inputs = centred(true), torch.stack([centred(each) for each in predictions], -1)
    result = torch.zeros_like(true)
    for document in range(len(true)):
        others = torch.arange(len(true)) != document
        weights = torch.linalg.lstsq(inputs[others].flatten(0, 1), target[others].flatten()[:, None]).solution
        result[document, 1:-1] = (inputs[document] @ weights)[:, 0]
    return result


def informativeness_of(scores: Tensor) -> Tensor:
    """I of every document, `(documents, blocks)`, from S, `(documents, blocks, blocks)`."""
    return torch.stack([block_informativeness(each) for each in scores])


def surprise_of_partners(scores: Tensor, expected: Tensor, partners: int, generator: torch.Generator) -> Tensor:
    """I's part from `partners` random blocks of each document, less what was to be expected of them, `(documents, blocks)`."""
    result = []
    for document, mean in zip(scores, expected, strict=True):
        known = torch.zeros(len(document))
        known[torch.randperm(len(document), generator=generator)[:partners]] = 1
        surprise = (document - mean).tril(-1)
        result.append(((surprise * known[:, None]).sum(0) + (surprise * known).sum(1)) / (len(document) - 1))
    return torch.stack(result)


def explained_needed(true: Tensor, keep_ratio: float, generator: torch.Generator) -> float:
    """Share of I's variance within documents that a prediction with Gaussian errors must explain for the recall of `GOAL`."""
    spread = centred(true).std(1, keepdim=True)
    below = (0.0, 0.0)
    for share in EXPLAINED:
        noisy = [true + torch.randn(true.shape, generator=generator) * spread * math.sqrt(1 / share - 1) for _ in range(32)]
        found = sum(recall(true, each, keep_ratio) for each in noisy) / len(noisy)
        if found >= GOAL:
            part = (GOAL - below[1]) / (found - below[1])
            return below[0] + part * (share - below[0])
        below = share, found
    return math.nan


class Layer:
    """What one layer showed on every document."""

    def __init__(self, block_size: int, scale: float) -> None:
        self.block_size, self.scale = block_size, scale
        self.scores: list[Tensor] = []
        self.predicted: list[Tensor] = []
        self.query: list[Tensor] = []
        self.key: list[Tensor] = []

    def strangers(self, count: int) -> tuple[Tensor, Tensor]:
        """I's halves, as keys and as queries, against each of the `count` next documents, `(count, documents, blocks)` each."""
        documents, blocks = len(self.scores), len(self.scores[0])
        as_key, as_query = torch.zeros(count, documents, blocks), torch.zeros(count, documents, blocks)
        for document in range(documents):
            for step in range(count):
                other = (document + step + 1) % documents
                crossed = block_scores(self.query[other], self.key[document], self.block_size, self.scale).tril(-1)
                as_key[step, document] = crossed.sum(0) / (blocks - 1)
                as_query[step, other] = crossed.sum(1) / (blocks - 1)
        return as_key, as_query

    def ceilings(self, keep_ratio: float, count: int) -> dict[str, float]:
        """The layer's entries of the result."""
        generator = torch.Generator().manual_seed(0)
        scores = torch.stack(self.scores).tril(-1)
        true = informativeness_of(scores)
        expected = (scores.sum(0) - scores) / (len(scores) - 1)
        positions = informativeness_of(expected)
        standard = centred(true) / centred(true).std(1, keepdim=True)
        exact_key, exact_query = (scores.sum(axis) / (scores.shape[1] - 1) for axis in (1, 2))
        strangers = self.strangers(count)
        as_key, as_query = (half.mean(0) for half in strangers)
        fewer = sum(half[: count // 2].mean(0) for half in strangers)
        estimates = {
            "positions": positions,
            **{
                f"partners_{n}": combined(true, surprise_of_partners(scores, expected, n, generator), positions) for n in PARTNERS
            },
            "strangers_half": combined(true, fewer, positions),
            "strangers": combined(true, as_key + as_query, positions),
            "strangers_for_queries": combined(true, exact_key, as_query, positions),
            "strangers_for_keys": combined(true, as_key, exact_query, positions),
        }
        if self.predicted:
            estimates["predictors"] = torch.stack(self.predicted)
        spread = centred(true).std(1) / true[:, 1:-1].mean(1)
        return {
            "relative_spread": spread.mean().item(),
            "kurtosis": standard.pow(4).mean().item(),
            "explained_needed": explained_needed(true, keep_ratio, generator),
            **{name: recall(true, each, keep_ratio) for name, each in estimates.items()},
        }


@torch.no_grad()
def record(backbone: Any, batches: list[dict[str, Any]], with_predictors: bool) -> list[Layer]:
    """Every layer's scores, queries and keys on every batch."""
    layers = [Layer(backbone.config.lemo.block_size, layer.attention_scale) for layer in backbone.layers]
    rotary = backbone.rotary_emb(torch.zeros(1, SEQ_LEN, 1), torch.arange(SEQ_LEN)[None])

    def visit(found: LayerScores) -> None:
        query, key, _ = found.module.project_heads(found.hidden, tuple(part[0] for part in rotary))
        layer = layers[found.layer]
        layer.query.append(query)
        layer.key.append(key)
        layer.scores.append(found.scores[0])
        if with_predictors:
            layer.predicted.append(found.predicted()[0])

    for batch in tqdm(batches, desc="record", unit="window"):
        visit_layers(backbone, batch, visit)
    return layers


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=12, help="windows of 4096 tokens (default: %(default)s)")
    parser.add_argument("--strangers", type=int, default=6, help="other documents a document meets (default: %(default)s)")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the base model (default: the embedded one)")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    with_predictors = (Path(args.base) / PREDICTORS_FILE).is_file()
    lemo = read_lemo_files(args.base)[0] if with_predictors else LemoConfig()
    model = AutoLemoModelForCausalLM.from_pretrained(args.base, lemo=lemo, dtype=torch.float32, **context())
    backbone: Any = sparse_backbone(model)
    if with_predictors:
        load_predictors(backbone, args.base)
    text = spread_samples(pack_documents(tokenizer, python_sources(EVALUATION_PACKAGES), SEQ_LEN), args.windows)
    layers = record(backbone, [default_data_collator([text[index]]) for index in range(len(text))], with_predictors)
    found = [layer.ceilings(lemo.keep_ratio, args.strangers) for layer in tqdm(layers, desc="oracles", unit="layer")]
    mean = {name: sum(layer[name] for layer in found) / len(found) for name in found[0]}
    config = {"held_out": EVALUATION_PACKAGES, "tokens": SEQ_LEN, "windows": args.windows, "strangers": args.strangers}
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {**config, "keep_ratio": lemo.keep_ratio},
        "mean": mean,
        "layers": found,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(mean, indent=1))


if __name__ == "__main__":
    main()
