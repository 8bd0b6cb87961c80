"""What local attention of dropped tokens brings: LeMo sparse with `nearby_tokens` 0 and 128 beside stock LoRA, the quickstart's model and text.

    nice python benchmarks/nearby_tokens.py --steps 25 --seed 0

`lemo-sparse-nearby` of `lemo bench` (the most informative half by signed means, first layer dense) but for the scores, which are true ones
instead of predicted, so that nothing is fitted first, and for shorter windows. The arms step in turns: the same adapter, the same
windows in the same order, the quickstart's constant rate. Measured: the sparse forward's loss before training above the
dense one, dense perplexity on held-out windows after it, paired by window with 95 % intervals, FLOPs and saved bytes of a step.
"""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, default_data_collator

from lemo_hf import LemoConfig
from lemo_hf.evaluation.perplexity import dense_perplexity, paired_difference, sparse_perplexity
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import BASE, EVALUATION_PACKAGES, LEARNING_RATE, TRAIN_PACKAGES, load, profile_step
from lemo_hf.quickstart.report import Arm, Measured
from lemo_hf.text_data import pack_documents, python_sources, spread_samples

RESULT = Path(__file__).parent / "results" / "nearby_tokens--amd-epyc-2-cores.json"
SPARSE: dict[str, Any] = {
    "attention_forward": "sparse",
    "selection": "ratio",
    "keep_ratio": 0.5,
    "dense_layers": [0],
    "block_reduction": "mean",
    "score_source": "true",
}
ARMS: dict[str, dict[str, Any] | None] = {"stock": None, "nearby_0": SPARSE, "nearby_128": {**SPARSE, "nearby_tokens": 128}}
WARM_UP = 3


def train(models: dict[str, Any], windows: list[Any]) -> dict[str, list[float]]:
    """Trains the arms on the same windows, a step of each in turn; their losses."""
    weights = {name: [weight for weight in model.parameters() if weight.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(each, lr=LEARNING_RATE, weight_decay=0.0) for name, each in weights.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    for step, window in enumerate(windows):
        for name, model in models.items():
            model.train()
            for group in optimizers[name].param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP)
            loss = model(**default_data_collator([window])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights[name], 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses[name].append(loss.item())
        shown = ", ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items())
        print(f"step {step + 1} of {len(windows)}: {shown}", flush=True)
    return losses


def run(steps: int, seed: int, tokens: int, held_out: int) -> dict[str, Any]:
    """Trains and measures every arm.

    Args:
        steps: Steps of one window each.
        seed: Decides which windows are trained on, and their order.
        tokens: Length of a window.
        held_out: Windows for evaluation.
    """
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    # Every eighth file is text enough, and tokenised sooner.
    data = pack_documents(tokenizer, python_sources(TRAIN_PACKAGES)[::8], tokens)
    evaluation = spread_samples(pack_documents(tokenizer, python_sources(EVALUATION_PACKAGES)[::8], tokens), held_out)
    models = {name: load(Arm(name, name, None if lemo is None else LemoConfig(**lemo))) for name, lemo in ARMS.items()}
    print(f"{len(data)} windows to train on, {len(evaluation)} to evaluate on", flush=True)
    arms: dict[str, dict[str, Any]] = {}
    before = dense_perplexity(models["stock"], evaluation)
    for name, model in models.items():
        measured = Measured(name)
        profile_step(model, evaluation[0], measured)
        arms[name] = {"fields": ARMS[name], "flops": measured.flops, "saved_bytes": sum(measured.saved_bytes.values())}
        if ARMS[name] is not None:
            arms[name]["sparse_forward_extra_nats"] = sparse_perplexity(model, evaluation).loss - before.loss
        print(name, arms[name], flush=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()[:steps]
    losses = train(models, [data[window] for window in order])
    after = {name: dense_perplexity(model, evaluation) for name, model in models.items()}
    for name, found in after.items():
        arms[name] |= {"perplexity": found.perplexity, "loss": found.loss, "losses": losses[name]}
        if name != "stock":
            arms[name]["versus_stock"] = asdict(paired_difference(after["stock"], found))
    pair = asdict(paired_difference(after["nearby_0"], after["nearby_128"]))
    return {"seed": seed, "before": before.perplexity, "arms": arms, "nearby_128_versus_nearby_0": pair}


def main() -> None:
    """Measures one seed and adds it to the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="training steps of one window each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="windows and their order (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="length of a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=12, help="held-out windows (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON to write or to add the seed to (default: %(default)s)")
    args = parser.parse_args()
    found = run(args.steps, args.seed, args.tokens, args.windows)
    config = {
        "base": BASE.name,
        "tokens": args.tokens,
        "batch": 1,
        "steps": args.steps,
        "held_out_windows": args.windows,
        "learning_rate": LEARNING_RATE,
        "warm_up": WARM_UP,
        "dtype": "float32 base and adapters, no autocast",
        "lora": "r=8 on q, k, v, o",
        "train": TRAIN_PACKAGES,
        "evaluation": EVALUATION_PACKAGES,
    }
    seeds = []
    if args.out.exists():
        known = json.loads(args.out.read_text())
        if known["config"] != json.loads(json.dumps(config)):
            raise SystemExit(f"{args.out} was measured with another config; got {config}; give another --out")
        seeds = [each for each in known["seeds"] if each["seed"] != args.seed]
    result = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "config": config, "seeds": [*seeds, found]}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: arm.get("versus_stock") for name, arm in found["arms"].items()}))


if __name__ == "__main__":
    main()
