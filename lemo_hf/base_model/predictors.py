"""Fits the pattern predictors that ship with the embedded base model, at a context of 4096 tokens.

    python -m lemo_hf.base_model.predictors

Memory: `--documents` x layers x 2 MB (attention inputs in bfloat16 are recorded once and read in every pass), 4 GB by default.
Time: about 15 minutes of one core. Writes `lemo_predictors.safetensors` and `lemo_config.json` beside the model, and the recall on
text of other packages to `predictor_recall.json`.
"""

import argparse
import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from ..evaluation.block_recall import measure_recall
from ..evaluation.layer_scores import LayerScores, visit_layers
from ..hub.lemo_files import save_lemo_files
from ..models.lemo_config import LemoConfig
from ..models.sparse_decoder import sparse_backbone
from ..profiling.provenance import provenance
from ..quickstart.comparison import BASE, EVALUATION_PACKAGES, SEQ_LEN, context
from ..registry import AutoLemoModelForCausalLM
from ..text_data import pack_documents, python_sources, spread_samples
from ..training.phases.predictor_training import PredictorTraining, parameter_share

# The base's own text and other people's; the packages that recall is measured on are not among them.
PACKAGES = ("stdlib", "networkx", "accelerate", "peft", "sympy", "transformers")
RECALL_WINDOWS = 12


def record(backbone: Any, batch: dict[str, Any]) -> list[LayerScores]:
    """Every layer's attention input (bfloat16) and true scores on one batch."""
    layers: list[LayerScores] = []
    visit_layers(backbone, batch, lambda found: layers.append(dataclasses.replace(found, hidden=found.hidden.bfloat16())))
    return layers


def main(arguments_given: list[str] | None = None) -> None:
    """Records, fits, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=320, help="windows of 4096 tokens (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=4, help="passes over them (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak rate (default: %(default)s)")
    args = parser.parse_args(arguments_given)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lemo = LemoConfig()
    model = AutoLemoModelForCausalLM.from_pretrained(BASE, lemo=lemo, dtype=torch.float32, **context())
    backbone = sparse_backbone(model)
    text = spread_samples(pack_documents(tokenizer, python_sources(PACKAGES), SEQ_LEN), args.documents)
    for layer in backbone.layers:
        layer.lemo_predictor.reset_parameters(torch.Generator().manual_seed(layer.layer_idx))
    recorded = [record(backbone, default_data_collator([text[i]])) for i in tqdm(range(len(text)), desc="record", unit="doc")]
    training = PredictorTraining(backbone, len(recorded) * args.passes, steps=1, learning_rate=args.learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(args.passes), desc="fit", unit="pass"):
        for index in torch.randperm(len(recorded), generator=generator).tolist():
            training.fit_recorded(recorded[index])
    held_out = spread_samples(pack_documents(tokenizer, python_sources(EVALUATION_PACKAGES), SEQ_LEN), RECALL_WINDOWS)
    batches = [default_data_collator([held_out[i]]) for i in range(len(held_out))]
    report = measure_recall(backbone, batches, training.positions)
    save_lemo_files(model, BASE)
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {
            "tokens": SEQ_LEN,
            "packages": PACKAGES,
            "held_out": EVALUATION_PACKAGES,
            "keep_ratio": lemo.keep_ratio,
            **vars(args),
        },
        "recall": report.layers,
        "recall_of_positions": report.positions,
        "recall_of_chance": report.chance,
        "parameter_share": parameter_share(backbone),
    }
    (BASE / "predictor_recall.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"recall {report.mean:.3f}; positions only {report.position_mean:.3f}; chance {report.chance:.3f}")


if __name__ == "__main__":
    main()
