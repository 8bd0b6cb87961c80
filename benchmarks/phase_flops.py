"""What the phases, recall probes and refits cost of a normal run: counted FLOPs of the real ones, at the shape of an 8B model.

    python benchmarks/phase_flops.py

One layer runs with real tensors (the phases read values, so fake tensors will not do): a document of the predictor phase, a
forward of the calibrate phase, a training sample. All layers are alike, so shares of one layer are shares of the model, but for
embeddings and head, which are left out. Calibration runs 1 + 2 x layers x rounds forwards a document. A refit reads its documents
as the predictor phase does, is followed by a probe and, where there are thresholds, looks at the profile set before and after.
"""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from layer_arithmetic import LLAMA_3_8B, PREDICTOR, PROJECTIONS
from peft import LoraConfig, get_peft_model

from lemo_hf import LemoConfig, LemoLlamaConfig
from lemo_hf.evaluation.block_recall import measure_recall
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.flops import FlopCounter
from lemo_hf.profiling.provenance import provenance
from lemo_hf.training.arguments import LemoTrainingArguments
from lemo_hf.training.phases.phase_cost import estimate_cost, estimate_probe_cost
from lemo_hf.training.phases.predictor_training import PredictorTraining
from lemo_hf.training.phases.threshold_search import ThresholdSearch

# "any": exact counts are the same on every machine.
RESULT = Path(__file__).parent / "results" / "phase_flops--any.json"
LAYERS = 32
# A normal run: 1000 steps on batches of 16 samples.
STEPS = 1000
SAMPLES = 16 * STEPS
DOCUMENTS = 64
FORMS = {
    "sparse": LemoConfig(attention_forward="sparse", selection="threshold", **PREDICTOR),
    "kept_keys": LemoConfig(attention_forward="kept_keys", block_reduction="mean", selection="threshold", **PREDICTOR),
    "exact": LemoConfig(attention_forward="exact", selection="threshold", **PREDICTOR),
}


def layers(count: int, shape: dict[str, int], lemo: LemoConfig) -> Any:
    """A model of some layers with LoRA r=8 on q, k, v, o, in bfloat16 with bfloat16 adapters."""
    config = LemoLlamaConfig(**shape | {"num_hidden_layers": count}, lemo=lemo)
    with torch.device("meta"):
        model = LemoLlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for layer in model.model.layers:
        layer.lemo_predictor.reset_parameters()
    model = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS), autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    return model


def counted(model: Any, run: Callable[[], object]) -> int:
    """FLOPs of the layer while `run` runs; what belongs to no layer (the head) is left out."""
    with FlopCounter(model) as counter:
        run()
    total: int = counter.flops.total
    head: int = sum(amount for module, amount in counter.flops.by("module").items() if "lm_head" in str(module))
    return total - head


def measure(shape: dict[str, int], tokens: int, lemo: LemoConfig, steps: int) -> dict[str, int]:
    """FLOPs a layer of a predictor document, a probed one, a profile and a calibration forward, and a training sample."""
    model = layers(1, shape, lemo)
    backbone = sparse_backbone(model)
    ids = torch.randint(0, shape["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    training = PredictorTraining(backbone, documents=1, steps=steps, learning_rate=1e-2)
    search = ThresholdSearch(model, backbone, [batch], eta=0.25, epsilon=0.25)
    found = {"predictor_document": counted(model, lambda: training.fit(batch))}
    found["probe_document"] = counted(model, lambda: measure_recall(backbone, [batch]))
    found["profile_forward"] = counted(model, search.begin)
    search.keep_shares([lemo.ratio_of(0)])
    found["calibration_forward"] = counted(model, lambda: search.loss([batch]))
    found["training_sample"] = counted(model.train(), lambda: model(**batch).loss.backward())
    lemo.update(thresholds=None)
    return found


def shares(found: dict[str, int], lemo: LemoConfig, rounds: int, profile: int) -> dict[str, float]:
    """Shares of a normal run's FLOPs, in [0, 1]."""
    passes = 2 * LAYERS * rounds if lemo.attention_forward != "exact" else 0
    predictor = DOCUMENTS * found["predictor_document"]
    calibrate = profile * (found["profile_forward"] + passes * found["calibration_forward"])
    whole = predictor + calibrate + SAMPLES * found["training_sample"]
    return {"predictor": predictor / whole, "calibrate": calibrate / whole, "phases": (predictor + calibrate) / whole}


def probe_shares(found: dict[str, int], args: type[LemoTrainingArguments]) -> dict[str, float]:
    """Shares of a normal run's FLOPs that its probes take and all refits that it may make, in [0, 1]."""
    probes = STEPS // args.probe_steps * args.probe_documents * found["probe_document"]
    profile = 2 * args.calibrate_documents * found["profile_forward"]
    refit = args.refit_documents * found["predictor_document"] + args.probe_documents * found["probe_document"] + profile
    whole = probes + args.refit_limit * refit + SAMPLES * found["training_sample"]
    return {"probes": probes / whole, "refits": args.refit_limit * refit / whole}


def estimated_probe_share(lemo: LemoConfig, args: type[LemoTrainingArguments]) -> float:
    """The same as a run says it when it begins."""
    probed = STEPS // args.probe_steps * args.probe_documents
    refits = args.refit_limit, args.refit_documents, args.probe_documents, args.calibrate_documents
    return estimate_probe_cost(lemo, LAYERS, probed, *refits, SAMPLES).share


def main() -> None:
    """Counts every form and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a document and of a sample")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    own = LemoTrainingArguments  # its defaults are what a normal run uses
    steps, rounds, profile = own.predictor_steps, own.calibrate_rounds, own.calibrate_documents
    rows = []
    for form, lemo in FORMS.items():
        found = measure(LLAMA_3_8B, args.tokens, lemo, steps)
        estimate = estimate_cost(lemo, LAYERS, DOCUMENTS, profile, rounds, SAMPLES)
        row = {"form": form, "flops_a_layer": found, **shares(found, lemo, rounds, profile), "estimated": estimate.share}
        row |= {**probe_shares(found, own), "probes_and_refits_estimated": estimated_probe_share(lemo, own)}
        rows.append(row)
        print(f"{form}: phases {row['phases']:.2%} of a run's FLOPs (estimated {estimate.share:.2%}); {found}")
        print(f"  recall probes {row['probes']:.3%}, all refits {row['refits']:.3%}")
    config = {
        "shape": "Llama-3-8B",
        "tokens": args.tokens,
        "keep": 0.5,
        "samples": SAMPLES,
        "predictor_documents": DOCUMENTS,
        "predictor_steps": steps,
        "calibrate_documents": profile,
        "calibrate_rounds": rounds,
        "probe_steps": own.probe_steps,
        "probe_documents": own.probe_documents,
        "refit_documents": own.refit_documents,
        "refit_limit": own.refit_limit,
        "lora": "r=8 on q, k, v, o, bfloat16 adapters, no autocast",
    }
    document = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "config": config, "rows": rows}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
