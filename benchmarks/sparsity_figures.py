"""Measures what the paper's Table 3 and Figures 4, 7, 16 and 17 show, on models of this repository; no GPU.

    nice python benchmarks/sparsity_figures.py                                          # the embedded base: 5 minutes of one core
    nice python benchmarks/sparsity_figures.py --model "small base=outputs/quality/base_small"    # adds or renews one model

Text is Python of packages that no base was trained on: of each of `--documents` files the first 16384 tokens, cut into windows of
each length, at most 2 a length. A longer context than the model's is reached by YaRN, as in the quickstart, without training.
Spreads are standard deviations over documents. Writes benchmarks/results/sparsity--any.json, from which alone
benchmarks/paper_figures.py draws. What is measured: benchmarks/sparsity_measures.py.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sparsity_measures import (
    CRITERION,
    READINGS,
    LayerWindow,
    best,
    blocks_without,
    blocks_without_by_chance,
    measure_window,
    overlap,
    relative_spread,
)
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig
from lemo_hf.errors import LemoError
from lemo_hf.evaluation.block_recall import document_recall
from lemo_hf.hub.lemo_files import PREDICTORS_FILE, load_predictors, read_lemo_files
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import BASE, EVALUATION_PACKAGES
from lemo_hf.text_data import python_sources, tokenize_documents

RESULT = Path(__file__).parent / "results" / "sparsity--any.json"
EMBEDDED = "embedded base"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
# Everything but the sparsity by length is shown at the length that the shipped predictors were fitted at.
SHOWN_LENGTH = 4096
MOST_WINDOWS = 2
BLOCK_SIZES = (16, 32, 64, 128)
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
MAPPED_DOCUMENTS = (0, 3)
Windows = list[list[list[LayerWindow]]]  # by document, window and layer


def texts(tokenizer: Any, count: int, tokens: int) -> dict[str, Tensor]:
    """The first `tokens` tokens of `count` files, evenly from those that are long enough, by name.

    Raises:
        LemoError: If fewer are.
    """
    files = python_sources(EVALUATION_PACKAGES)
    long = [
        (file.name, torch.tensor(ids[:tokens]))
        for file, ids in zip(files, tokenize_documents(tokenizer, files), strict=True)
        if len(ids) >= tokens
    ]
    if len(long) < count:
        raise LemoError(f"too few files of {tokens} tokens; {len(long)} of {count}; lower --documents, or --lengths")
    return dict(long[place * len(long) // count] for place in range(count))


def windows_of(tokens: Tensor, length: int) -> list[Tensor]:
    """At most `MOST_WINDOWS` windows of a document, evenly from all of them."""
    whole = len(tokens) // length
    count = min(MOST_WINDOWS, whole)
    starts = [place * whole // count * length for place in range(count)]
    return [tokens[start : start + length] for start in starts]


def extended(folder: Path, length: int) -> dict[str, Any]:
    """Config fields that extend a base to `length` by YaRN; none within its own context."""
    config = AutoConfig.from_pretrained(folder)
    own = config.max_position_embeddings
    if length <= own:
        return {}
    theta = config.rope_parameters["rope_theta"]
    rope = {"rope_type": "yarn", "factor": length / own, "original_max_position_embeddings": own, "rope_theta": theta}
    return {"rope_parameters": rope, "max_position_embeddings": length}


def load(folder: Path, length: int) -> tuple[Any, bool]:
    """The model's backbone at a length, and whether it has fitted predictors."""
    fitted = (folder / PREDICTORS_FILE).is_file()
    lemo = read_lemo_files(folder)[0] if fitted else LemoConfig()
    model = AutoLemoModelForCausalLM.from_pretrained(folder, lemo=lemo, dtype=torch.float32, **extended(folder, length))
    backbone: Any = sparse_backbone(model)
    if fitted:
        load_predictors(backbone, folder)
    return backbone, fitted


def averaged(by_document: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Mean, standard deviation over documents, and mean by layer, of a number by document, window and layer."""
    documents = [statistics.mean(statistics.mean(layers) for layers in windows) for windows in by_document]
    windows = [layers for windows in by_document for layers in windows]
    return {
        "mean": statistics.mean(documents),
        "spread": statistics.stdev(documents) if len(documents) > 1 else None,
        "by_layer": [statistics.mean(column) for column in zip(*windows, strict=True)],
    }


def by_layer(windows: Windows, value: Any) -> dict[str, Any]:
    """`averaged` of what `value` makes of every layer of every window."""
    return averaged([[[value(layer) for layer in window] for window in document] for document in windows])


def sparsity(windows: Windows, length: int) -> dict[str, Any]:
    """A row of Table 3, by reading, and how much I varies."""
    found = {name: by_layer(windows, lambda layer, name=name: layer.below[name]) for name in READINGS}
    spread = by_layer(windows, lambda layer: relative_spread(layer.informativeness))
    return {"length": length, "windows": sum(map(len, windows)), **found, "relative_spread": spread}


def unimportant_blocks(windows: Windows) -> dict[str, Any]:
    """Figure 7: share of blocks without important tokens, by block size, and at 64 by how many tokens are called important."""

    def without_peaks(layer: LayerWindow, size: int) -> float:
        return blocks_without(layer.token_peak >= CRITERION * layer.token_peak.max(), size)

    def without_best(layer: LayerWindow, share: float) -> float:
        tokens = layer.token_informativeness
        return blocks_without(best(tokens, int(share * len(tokens))), 64)

    return {
        "by_criterion": {
            str(size): by_layer(windows, lambda layer, size=size: without_peaks(layer, size)) for size in BLOCK_SIZES
        },
        "important_tokens": by_layer(
            windows, lambda layer: (layer.token_peak >= CRITERION * layer.token_peak.max()).float().mean().item()
        ),
        "by_share": {str(share): by_layer(windows, lambda layer, share=share: without_best(layer, share)) for share in SHARES},
        "by_chance": {str(share): blocks_without_by_chance(SHOWN_LENGTH, int(share * SHOWN_LENGTH), 64) for share in SHARES},
    }


def agreement(windows: Windows) -> dict[str, Any]:
    """Figure 4 in numbers: of the half of the free blocks that one layer on one input keeps, how many another keeps too.

    Returns:
        `between_documents`, by layer: windows of different documents; `between_layers`, layer by layer: the same window.
    """
    layers = range(len(windows[0][0]))
    others = [
        [overlap(one[layer].informativeness, other[layer].informativeness) for layer in layers]
        for place, document in enumerate(windows)
        for later in windows[place + 1 :]
        for one in document
        for other in later
    ]
    kept = [
        [
            statistics.mean(
                overlap(window[a].informativeness, window[b].informativeness) for document in windows for window in document
            )
            for b in layers
        ]
        for a in layers
    ]
    return {"between_documents": [statistics.mean(column) for column in zip(*others, strict=True)], "between_layers": kept}


def prediction(windows: Windows) -> dict[str, Any]:
    """Figure 17: recall by layer at kept share 0.5, beside what positions (mean I by place in the other documents) find."""
    recalls, places, chances = [], [], []
    for number, document in enumerate(windows):
        others = [window for place, other in enumerate(windows) if place != number for window in other]
        profiles = [torch.stack([window[layer].informativeness for window in others]).mean(0) for layer in range(len(others[0]))]
        recalls.append(
            [
                [document_recall(each.informativeness, each.predicted_informativeness, 0.5)[0] for each in window]
                for window in document
            ]
        )
        found = [
            [document_recall(each.informativeness, profile, 0.5) for each, profile in zip(window, profiles, strict=True)]
            for window in document
        ]
        places.append([[recall for recall, _ in window] for window in found])
        chances.append(found[0][0][1])
    return {"recall": averaged(recalls), "recall_of_positions": averaged(places), "recall_of_chance": statistics.mean(chances)}


def rounded(values: Tensor) -> list[float]:
    """Numbers for the file, four significant digits."""
    return [float(f"{value:.4g}") for value in values.flatten().tolist()]


def lower_triangle(scores: Tensor) -> list[float]:
    """S, its entries on and below the diagonal, row by row."""
    return rounded(scores[torch.ones_like(scores, dtype=torch.bool).tril()])


def maps(windows: Windows, names: Sequence[str]) -> list[dict[str, Any]]:
    """Figures 4, 16 and 17: S and I of some layers on the first window of some documents, and what predictors say."""
    last = len(windows[0][0]) - 1
    found = []
    for place in MAPPED_DOCUMENTS:
        for layer in (0, last // 2, last):
            each = windows[place][0][layer]
            entry: dict[str, Any] = {"document": names[place], "layer": layer, "blocks": len(each.scores)}
            entry |= {"scores": lower_triangle(each.scores), "informativeness": rounded(each.informativeness)}
            if each.predicted_scores is not None and each.predicted_informativeness is not None:
                entry["predicted_scores"] = lower_triangle(each.predicted_scores)
                entry["predicted_informativeness"] = rounded(each.predicted_informativeness)
            found.append(entry)
    return found


def measure_model(folder: Path, documents: int, lengths: Sequence[int]) -> dict[str, Any]:
    """A model's entry of the result."""
    text = texts(AutoTokenizer.from_pretrained(folder), documents, max(lengths))
    names, rows, shown, fitted = list(text), [], {}, False
    for length in tqdm(lengths, desc=str(folder), unit="length"):
        backbone, fitted = load(folder, length)
        at_shown = length == SHOWN_LENGTH
        windows = [
            [measure_window(backbone, ids, fitted and at_shown) for ids in windows_of(tokens, length)] for tokens in text.values()
        ]
        rows.append(sparsity(windows, length))
        if at_shown:
            shown = {
                "unimportant_blocks": unimportant_blocks(windows),
                "agreement": agreement(windows),
                "maps": maps(windows, names),
            }
            shown |= {"prediction": prediction(windows)} if fitted else {}
    own = AutoConfig.from_pretrained(folder).max_position_embeddings
    about = {"own_context": own, "layers": len(backbone.layers), "documents": names, "predictors": fitted}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), **about, "sparsity": rows, **shown}


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=f"{EMBEDDED}={BASE}", metavar="NAME=FOLDER", help="what to measure (default: the embedded base)"
    )
    parser.add_argument("--documents", type=int, default=4, help="files (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    args = parser.parse_args(arguments)
    name, _, folder = args.model.partition("=")
    if not name or not folder or not Path(folder).is_dir():
        raise LemoError(f"no such model; {args.model!r}; write --model NAME=FOLDER with the folder of a base model")
    if args.documents <= max(MAPPED_DOCUMENTS):
        raise LemoError(f"too few documents; {args.documents}; use at least {max(MAPPED_DOCUMENTS) + 1}")
    if SHOWN_LENGTH not in args.lengths:
        raise LemoError(f"the length of maps and predictors is missing; {args.lengths}; add {SHOWN_LENGTH}")
    measured = measure_model(Path(folder), args.documents, args.lengths)
    # Read only now: another model's measurement may have ended meanwhile.
    result = json.loads(args.output.read_text()) if args.output.exists() else {"kind": "sparsity", "models": {}}
    result["config"] = {
        "criterion": CRITERION,
        "packages": EVALUATION_PACKAGES,
        "shown_length": SHOWN_LENGTH,
        "most_windows": MOST_WINDOWS,
        "block_size": LemoConfig().block_size,
    }
    result["models"][name] = measured
    args.output.write_text(compact(result))
    print(f"wrote {args.output}")


def compact(result: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line each."""
    lists: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: marked(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            if all(isinstance(each, (int, float)) for each in value):
                lists.append(json.dumps(value))
                return f"\x00{len(lists) - 1}\x00"
            return [marked(each) for each in value]
        return value

    text = json.dumps(marked(result), indent=1)
    parts = text.split('"\\u0000')
    return (
        parts[0] + "".join(lists[int(part.split('\\u0000"', 1)[0])] + part.split('\\u0000"', 1)[1] for part in parts[1:]) + "\n"
    )


if __name__ == "__main__":
    main()
