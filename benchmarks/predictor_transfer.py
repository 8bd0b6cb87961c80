"""Pattern predictors at other lengths and on other text than they were fitted on, and what pruning leaves of them.

    nice python benchmarks/predictor_transfer.py

On the embedded base model, keep ratio 0.5, always-kept blocks left out, beside chance and a position-only predictor (each window
by the mean of the others). Two kinds of predictors: `mean` (`block_reduction="mean"`), fitted here on a few documents, and `max`, those
that ship with the model, fitted at 4096 tokens.

- `lengths`: fitted at 1024 or 4096 tokens, used at 1024, 4096 and 16384 on packages that neither model nor predictors have seen.
  The context is extended by YaRN with the factor that the length needs.
- `text`: fitted on Python at 4096 tokens, used on what else lies on the machine: documentation, JSON, C headers.
- `pruning`: parameters and recall before and after pruning at some shares.

Writes one result for each kind, after each part. Memory 2 GB; about 10 minutes of one core.
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import sysconfig
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig
from lemo_hf.evaluation.block_recall import document_recall, positions_of_others
from lemo_hf.evaluation.layer_scores import LayerScores, visit_layers
from lemo_hf.hub.lemo_files import load_predictors
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import BASE, BASE_CONTEXT, EVALUATION_PACKAGES
from lemo_hf.text_data import PackedDocuments, TextDocument, drop_duplicates, pack_documents, python_sources, spread_samples
from lemo_hf.training.phases.predictor_training import PredictorTraining, parameter_share

RESULTS = Path(__file__).parent / "results"
FITTED_ON = ("stdlib", "networkx", "sympy", "peft")
# The windows of each length; few files are long enough for the longest.
WINDOWS = {1024: 12, 4096: 8, 16384: 3}
TEXT_WINDOWS = 6
KINDS = {"documentation": (".rst", ".md", ".txt"), "JSON": (".json",), "C headers": (".h",)}
SHARES = {"max": (0.999, 0.99, 0.95), "mean": (0.9999, 0.999, 0.99)}
Recorded = list[list[LayerScores]]


def context(length: int) -> dict[str, Any]:
    """Config fields for windows of `length` tokens: YaRN by as much as they exceed what the base was trained on."""
    if length <= BASE_CONTEXT:
        return {}
    yarn = {"rope_type": "yarn", "factor": length / BASE_CONTEXT, "original_max_position_embeddings": BASE_CONTEXT}
    return {"rope_parameters": {**yarn, "rope_theta": 10000.0}, "max_position_embeddings": length}


def backbone_at(length: int, reduction: str, features: int) -> Any:
    """The base at a length, its predictors as they are drawn."""
    lemo = LemoConfig(block_reduction=reduction, **({"predictor_features": features} if reduction == "mean" else {}))
    return sparse_backbone(AutoLemoModelForCausalLM.from_pretrained(BASE, lemo=lemo, dtype=torch.float32, **context(length)))


def record(backbone: Any, windows: PackedDocuments, description: str) -> Recorded:
    """Every layer's attention input (bfloat16) and true scores on every window."""
    recorded: Recorded = []
    for index in tqdm(range(len(windows)), desc=description, unit="window"):
        layers: list[LayerScores] = []
        visit_layers(
            backbone,
            default_data_collator([windows[index]]),
            lambda found, layers=layers: layers.append(dataclasses.replace(found, hidden=found.hidden.bfloat16())),
        )
        recorded.append(layers)
    return recorded


def recall(backbone: Any, recorded: Recorded) -> dict[str, Any]:
    """Recall of the backbone's predictors on recorded windows, its spread over them, and what to compare it with."""
    by_window, chances = [], []
    for layers in recorded:
        found = []
        for layer in layers:
            own = dataclasses.replace(layer, module=backbone.layers[layer.layer])
            value, chance = document_recall(own.informativeness()[0], own.predicted()[0], 0.5)
            found.append(value)
            chances.append(chance)
        by_window.append(statistics.mean(found))
    true = [[layers[number].informativeness()[0] for layers in recorded] for number in range(len(backbone.layers))]
    return {
        "recall": statistics.mean(by_window),
        "standard_error": statistics.stdev(by_window) / math.sqrt(len(by_window)),
        "positions": statistics.mean(positions_of_others(true, [0.5] * len(true))),
        "chance": statistics.mean(chances),
        "windows": len(by_window),
    }


def fitted(backbone: Any, recorded: Recorded) -> PredictorTraining:
    """Fits the backbone's predictors on recorded documents in one pass, as the phase of a run does by default."""
    for layer in backbone.layers:
        layer.lemo_predictor.reset_parameters(torch.Generator().manual_seed(layer.layer_idx))
    training = PredictorTraining(backbone, len(recorded), steps=4, learning_rate=3e-3)
    for layers in recorded:
        training.fit_recorded(layers)
    return training


def with_predictors_of(backbone: Any, other: Any) -> Any:
    """`backbone` with copies of the predictors of `other`."""
    for layer, theirs in zip(backbone.layers, other.layers, strict=True):
        layer.lemo_predictor = copy.deepcopy(theirs.lemo_predictor)
    return backbone


def other_text(suffixes: Iterable[str]) -> list[TextDocument]:
    """Files of these kinds that come with the interpreter and its packages."""
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "include", "stdlib")}
    paths = sorted({path for root in roots for suffix in suffixes for path in root.rglob(f"*{suffix}")})
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if 8_000 < len(text) < 2_000_000:
            documents.append(TextDocument(str(path), text))
    return drop_duplicates(documents)


def pruned(backbone: Any, calibration: Recorded, windows: Recorded, share: float) -> dict[str, Any]:
    """What pruning at `share` leaves, by what units and pairs do on the calibration windows."""
    training = PredictorTraining(backbone, 1, steps=1, learning_rate=0.0, prune_share=share, fresh=False)
    for layers in calibration:
        for fit, found in zip(training._fits, layers, strict=True):
            fit.observe(found)
    removed = sum(fit.prune(share) for fit in training._fits)
    sizes = [layer.lemo_predictor.sizes for layer in backbone.layers]
    return {"removed": removed, "sizes": sizes, "parameter_share": parameter_share(backbone), **recall(backbone, windows)}


def main(given: list[str] | None = None) -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8, help="documents that `mean` is fitted on (default: %(default)s)")
    parser.add_argument("--features", type=int, default=40, help="features p of `mean` (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=["mean", "max"], help="kinds of predictors (default: mean max)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(WINDOWS), help="lengths used (default: all three)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    args = parser.parse_args(given)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    held_out, sources = python_sources(EVALUATION_PACKAGES), python_sources(FITTED_ON)
    own = {"held_out": EVALUATION_PACKAGES, "fitted_on": FITTED_ON, "keep_ratio": 0.5, "documents": args.documents}
    about: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {**own, "features": args.features},
    }

    def windows_of(documents: list[TextDocument], length: int, count: int) -> PackedDocuments:
        return spread_samples(pack_documents(tokenizer, documents, length), count)

    for kind in args.kinds:
        part: dict[str, Any] = about | {"lengths": {}, "text": {}, "pruning": {}}
        output = args.output / f"predictor_transfer_{kind}--any.json"
        fits: dict[str, Any] = {}
        calibration = record(backbone_at(4096, kind, args.features), windows_of(sources, 4096, args.documents), "fit at 4096")
        at_4096 = backbone_at(4096, kind, args.features)
        if kind == "mean":
            short = backbone_at(1024, kind, args.features)
            fitted(short, record(short, windows_of(sources, 1024, args.documents), "fit at 1024"))
            fitted(at_4096, calibration)
            fits["1024"] = short
        else:
            load_predictors(at_4096, BASE)
        fits["4096"] = at_4096
        part["parameter_share"] = parameter_share(at_4096)
        recorded: dict[int, Recorded] = {}
        for length in args.lengths:
            used = backbone_at(length, kind, args.features)
            recorded[length] = record(used, windows_of(held_out, length, WINDOWS[length]), f"{kind} at {length}")
            for name, fit in fits.items():
                found = recall(with_predictors_of(used, fit), recorded[length])
                part["lengths"].setdefault(f"fitted at {name}", {})[str(length)] = found
                print(kind, f"fitted at {name}, used at {length}", found, flush=True)
            output.write_text(json.dumps(part, indent=1) + "\n")
        for share in SHARES[kind]:
            smaller = with_predictors_of(backbone_at(4096, kind, args.features), at_4096)
            part["pruning"][str(share)] = found = pruned(smaller, calibration, recorded[4096], share)
            print(kind, f"pruned at {share}", found, flush=True)
        for name, suffixes in KINDS.items():
            windows = record(at_4096, windows_of(other_text(suffixes), 4096, TEXT_WINDOWS), f"{kind}, {name}")
            part["text"][name] = found = recall(at_4096, windows)
            print(kind, name, found, flush=True)
            output.write_text(json.dumps(part, indent=1) + "\n")


if __name__ == "__main__":
    main()
