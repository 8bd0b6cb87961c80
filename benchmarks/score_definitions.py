"""Definitions of block informativeness: how far blocks differ, what foretells them, and whether they agree.

    nice python benchmarks/score_definitions.py

Windows of 4096 tokens of packages that neither base nor predictors have seen, keep ratio 0.5, always-kept blocks left out, mean over
layers. Scores of block pairs S (from s, the scaled dot products of queries and keys by head, p their softmax over keys):

- `max`: maximum over token pairs of the mean over heads of max(0, s): the paper's, and `block_reduction="max"`
- `mean of positive`: mean over token pairs of the same
- `max over queries`, `max over keys`: mean over the block's keys (queries) of the maximum over the other's queries (keys)
- `max by head`, `max over heads`: maximum over token pairs by head, then mean (maximum) over heads
- `mean`: mean over token pairs and heads of s with its sign: `block_reduction="mean"`
- `pooled positive`: mean over heads of max(0, mean of s over token pairs)
- `mass`: mean over heads and queries of p, summed over keys

I is S summed over a block's partners on both sides (`both`) or over later blocks only (`as keys`). By definition: `spread`, the
standard deviation of I within a document over its mean; recall of the best half by `positions` (mean S of the other windows by block
pair: reads nothing), by `pooled` (I of `mean` and positions, combined linearly on the other windows: what pooled queries and keys
tell, partners known), and recall of the best half of `max` by this I, `finds_max`.

Memory 2 GB; about 5 minutes of one core.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from predictor_ceiling import centred, combined, recall
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig
from lemo_hf.evaluation.layer_scores import LayerScores, visit_layers
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_informativeness import block_informativeness, block_scores
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import BASE, EVALUATION_PACKAGES, SEQ_LEN, context
from lemo_hf.text_data import pack_documents, python_sources, spread_samples

RESULT = Path(__file__).parent / "results" / "score_definitions--any.json"
RATIO = 0.5
_STRIP = 256


def pair_scores(query: Tensor, key: Tensor, block_size: int, scale: float) -> dict[str, Tensor]:
    """S by every definition, `(blocks, blocks)` each, of one document of whole blocks.

    Args:
        query, key: Positions applied, `(tokens, heads, head_dim)` and `(tokens, key_value_heads, head_dim)`.
        block_size: Tokens of a block.
        scale: Factor on the dot products.
    """
    tokens, heads, _ = query.shape
    blocks, found = tokens // block_size, {}
    keys = key.repeat_interleave(heads // key.shape[1], 1).permute(1, 2, 0) * scale

    def put(name: str, first: int, values: Tensor) -> None:
        whole = found.setdefault(name, torch.zeros(blocks, blocks))
        whole[first : first + len(values), : values.shape[1]] = values

    for start in range(0, tokens, max(block_size, _STRIP // block_size * block_size)):
        stop = min(start + max(block_size, _STRIP // block_size * block_size), tokens)
        signed = query[start:stop].transpose(0, 1) @ keys[:, :, :stop]
        seen = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
        first, shape = start // block_size, ((stop - start) // block_size, block_size, stop // block_size, block_size)
        probabilities = signed.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
        put("mass", first, probabilities.view(shape).sum((1, 3)) / block_size)
        positive = (signed.relu_() * seen).view(heads, *shape)
        by_head, mean = positive.amax((2, 4)), positive.mean(0)
        put("max by head", first, by_head.mean(0))
        put("max over heads", first, by_head.amax(0))
        put("max", first, mean.amax((1, 3)))
        put("mean of positive", first, mean.mean((1, 3)))
        put("max over queries", first, mean.amax(1).mean(2))
        put("max over keys", first, mean.amax(3).mean(1))
    found["mean"] = block_scores(query, key, block_size, scale, reduction="mean")
    pooled = [part.view(blocks, block_size, *part.shape[1:]).mean(1) for part in (query, key)]
    by_head = torch.einsum("mhd,nhd->hmn", pooled[0], pooled[1].repeat_interleave(heads // key.shape[1], 1)) * scale
    found["pooled positive"] = by_head.relu().mean(0)
    return {name: scores.tril() for name, scores in found.items()}


def informativeness(scores: Tensor, side: str) -> Tensor:
    """I of one document, `(blocks,)`, over partners on `"both"` sides or `"as keys"` of later blocks."""
    if side == "both":
        return block_informativeness(scores)
    return scores.tril(-1).sum(0) / max(len(scores) - 1, 1)


def describe(scores: dict[str, list[Tensor]], side: str) -> dict[str, dict[str, float]]:
    """One layer's entries by definition, from S of every document."""
    found = {}

    def of(values: Any) -> Tensor:
        return torch.stack([informativeness(each, side) for each in values])

    largest, signed = of(scores["max"]), of(scores["mean"])
    for name, documents in scores.items():
        true, whole = of(documents), torch.stack(documents)
        positions = of((whole.sum(0) - whole) / (len(whole) - 1))
        found[name] = {
            "spread": (centred(true).std(1) / true[:, 1:-1].mean(1).abs()).mean().item(),
            "positions": recall(true, positions, RATIO),
            "pooled": recall(true, combined(true, signed, positions), RATIO),
            "finds_max": recall(largest, true, RATIO),
        }
    return found


def main(given: list[str] | None = None) -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="windows of 4096 tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    args = parser.parse_args(given)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lemo = LemoConfig(block_reduction="mean")
    backbone: Any = sparse_backbone(AutoLemoModelForCausalLM.from_pretrained(BASE, lemo=lemo, dtype=torch.float32, **context()))
    text = spread_samples(pack_documents(tokenizer, python_sources(EVALUATION_PACKAGES), SEQ_LEN), args.windows)
    rotary = backbone.rotary_emb(torch.zeros(1, SEQ_LEN, 1), torch.arange(SEQ_LEN)[None])
    layers: list[dict[str, list[Tensor]]] = [{} for _ in backbone.layers]

    def visit(found: LayerScores) -> None:
        query, key, _ = found.module.project_heads(found.hidden, tuple(part[0] for part in rotary))
        for name, scores in pair_scores(query, key, lemo.block_size, found.module.attention_scale).items():
            layers[found.layer].setdefault(name, []).append(scores)

    for index in tqdm(range(len(text)), desc="score", unit="window"):
        visit_layers(backbone, default_data_collator([text[index]]), visit)
    result: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {"held_out": EVALUATION_PACKAGES, "tokens": SEQ_LEN, "windows": args.windows, "keep_ratio": RATIO},
    }
    for side in ("both", "as keys"):
        by_layer = [describe(scores, side) for scores in layers]
        result[side] = {
            name: {key: sum(layer[name][key] for layer in by_layer) / len(by_layer) for key in entry}
            for name, entry in by_layer[0].items()
        }
        for name, entry in result[side].items():
            print(f"{side:8s} {name:20s}" + "".join(f"  {key} {value:.3f}" for key, value in entry.items()))
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
