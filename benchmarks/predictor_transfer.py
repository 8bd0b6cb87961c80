"""Pattern predictors at other lengths and on other text than they were fitted on, and what pruning leaves of them.

    nice python benchmarks/predictor_transfer.py

On the embedded base model, keep ratio 0.5, always-kept blocks left out, beside chance and a position-only predictor (each window
by the mean of the others). Two kinds of predictors: `mean` (`block_reduction="mean"`), fitted here on a few documents, and `max`, those
that ship with the model, fitted at 4096 tokens.

- `lengths`: fitted at 1024 or 4096 tokens, used at 1024 to 65536 (`max`, whose true scores are quadratic, to 16384) on packages that
  neither model nor predictors have seen. The context is extended by YaRN with the factor that the length needs.
- `text`: fitted on Python at 4096 tokens, used on what else lies on the machine: documentation, JSON, C headers.
- `pruning`: parameters and recall before and after pruning at some shares.

Writes one result for each kind, after each part, and leaves out the parts that its result has already, so a run that was ended goes on
where it was. Memory 3 GB; about 10 minutes of one core for each kind, and as much again for the window of 65536 tokens.
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import sysconfig
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cached_property
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
WINDOWS = {1024: 12, 4096: 8, 16384: 3, 65536: 1}
# A window of 65536 tokens takes the true scores of `max` an hour.
LENGTHS = {"mean": (1024, 4096, 16384, 65536), "max": (1024, 4096, 16384)}
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
    several = len(by_window) > 1
    return {
        "recall": statistics.mean(by_window),
        "standard_error": statistics.stdev(by_window) / math.sqrt(len(by_window)) if several else None,
        "positions": statistics.mean(positions_of_others(true, [0.5] * len(true))) if several else None,
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


class Transfer:
    """The measurements of one kind of predictors; what several of them need is made when the first one asks for it.

    Args:
        kind: "mean" or "max".
        tokenizer: The model's.
        documents: How many `mean` is fitted on.
        features: Features p of `mean`.
    """

    def __init__(self, kind: str, tokenizer: Any, documents: int, features: int) -> None:
        self.kind, self.tokenizer, self.documents, self.features = kind, tokenizer, documents, features
        self.held_out, self.sources = python_sources(EVALUATION_PACKAGES), python_sources(FITTED_ON)
        self._recorded: dict[int, Recorded] = {}

    def backbone(self, length: int) -> Any:
        """The base at a length, without fitted predictors."""
        return backbone_at(length, self.kind, self.features)

    def record(self, documents: list[TextDocument], length: int, count: int, description: str) -> Recorded:
        """`count` windows of these documents, evenly from all of them."""
        windows = spread_samples(pack_documents(self.tokenizer, documents, length), count)
        return record(self.backbone(length), windows, f"{self.kind}, {description}")

    def recorded(self, length: int) -> Recorded:
        """The held-out windows of a length."""
        if length not in self._recorded:
            self._recorded[length] = self.record(self.held_out, length, WINDOWS[length], f"used at {length}")
        return self._recorded[length]

    @cached_property
    def calibration(self) -> Recorded:
        """The documents at 4096 tokens that `mean` is fitted on, and that say what pruning may remove."""
        return self.record(self.sources, 4096, self.documents, "fit at 4096")

    @cached_property
    def fits(self) -> dict[int, Any]:
        """Backbones with predictors, by the length that these were fitted at."""
        at_4096 = self.backbone(4096)
        if self.kind == "max":
            load_predictors(at_4096, BASE)
            return {4096: at_4096}
        fitted(at_4096, self.calibration)
        at_1024 = self.backbone(1024)
        fitted(at_1024, self.record(self.sources, 1024, self.documents, "fit at 1024"))
        return {1024: at_1024, 4096: at_4096}

    def missing(self, result: dict[str, Any], lengths: Iterable[int]) -> Iterator[tuple[str, str]]:
        """Section and name of the parts that `result` lacks."""
        for length in lengths:
            used = [at.get(str(length)) for at in result["lengths"].values()]
            if not used or None in used:
                yield "lengths", str(length)
        yield from (("pruning", str(share)) for share in SHARES[self.kind] if str(share) not in result["pruning"])
        yield from (("text", name) for name in KINDS if name not in result["text"])

    def measure(self, result: dict[str, Any], section: str, name: str) -> None:
        """Adds one part to `result`."""
        if section == "lengths":
            used = self.backbone(int(name))
            for length, fit in self.fits.items():
                found = recall(with_predictors_of(used, fit), self.recorded(int(name)))
                result["lengths"].setdefault(f"fitted at {length}", {})[name] = found
        elif section == "pruning":
            smaller = with_predictors_of(self.backbone(4096), self.fits[4096])
            result["pruning"][name] = pruned(smaller, self.calibration, self.recorded(4096), float(name))
        else:
            windows = self.record(other_text(KINDS[name]), 4096, TEXT_WINDOWS, name)
            result["text"][name] = recall(self.fits[4096], windows)


def earlier_result(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The result that is there already, if it was made under this config."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return result if result.get("config") == config else None


def main(given: list[str] | None = None) -> None:
    """Measures what is missing and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8, help="documents that `mean` is fitted on (default: %(default)s)")
    parser.add_argument("--features", type=int, default=40, help="features p of `mean` (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=["mean", "max"], help="kinds of predictors (default: mean max)")
    parser.add_argument("--lengths", type=int, nargs="+", help="lengths used (default: all of the kind)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    args = parser.parse_args(given)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = {
        "held_out": list(EVALUATION_PACKAGES),
        "fitted_on": list(FITTED_ON),
        "keep_ratio": 0.5,
        "documents": args.documents,
        "features": args.features,
    }
    about: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance()}
    for kind in args.kinds:
        output = args.output / f"predictor_transfer_{kind}--any.json"
        earlier = earlier_result(output, config)
        result = earlier or {**about, "config": config, "lengths": {}, "text": {}, "pruning": {}}
        transfer = Transfer(kind, tokenizer, args.documents, args.features)
        added: list[str] = []
        for section, name in list(transfer.missing(result, args.lengths or LENGTHS[kind])):
            transfer.measure(result, section, name)
            result["parameter_share"] = parameter_share(transfer.fits[4096])
            if earlier and not added:
                result.setdefault("continued", []).append({**about, "parts": added})
            added.append(f"{section} {name}")
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
