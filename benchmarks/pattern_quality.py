"""What an attention pattern among kept tokens costs in perplexity: LeMo sparse with and without one, the quickstart's model and text.

    nice python benchmarks/pattern_quality.py --out outputs/pattern_quality            # again and again, until it says that all is there

Every arm starts from the same adapter and takes the same windows of 4096 tokens in the same order (another order for each seed),
at the quickstart's constant rate, kept share 0.5 chosen by the shipped predictors, first layer dense. Measured at the end:
dense perplexity on held-out windows, which the arms share, and the difference to the arm without a pattern, paired by window, with
its 95 % interval over windows. One JSON per arm and seed in `--out`; an arm that is there is not run again. `--summarise` lays them
together into benchmarks/results. About 3 minutes of one core an arm.
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
from lemo_hf.evaluation.perplexity import Perplexity, dense_perplexity, paired_difference
from lemo_hf.hub.lemo_files import load_predictors
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import BASE, EVALUATION_PACKAGES, LEARNING_RATE, SEQ_LEN, TRAIN_PACKAGES, load
from lemo_hf.quickstart.report import Arm
from lemo_hf.text_data import pack_documents, python_sources, spread_samples

RESULT = Path(__file__).parent / "results" / "pattern_quality--amd-epyc-2-cores.json"
PLAIN: dict[str, Any] = {"attention_forward": "sparse", "selection": "ratio", "keep_ratio": 0.5, "dense_layers": [0]}
ARMS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "shifted_groups": PLAIN | {"attention_pattern": "shifted_groups"},
    "block_sparse": PLAIN | {"attention_pattern": "block_sparse", "pattern_share": 0.25},
}
WARM_UP = 3


def run_arm(fields: dict[str, Any], windows: Any, evaluation: Any, steps: int, seed: int) -> dict[str, Any]:
    """Trains an arm and evaluates it densely.

    Args:
        fields: Those of its `LemoConfig`.
        windows: Training windows.
        evaluation: Held-out windows.
        steps: Steps of one window each.
        seed: Decides the order of the windows.
    """
    model = load(Arm("arm", "arm", LemoConfig(**fields)))
    load_predictors(sparse_backbone(model), BASE)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()[:steps]
    losses = []
    model.train()
    for step, window in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP)
        loss = model(**default_data_collator([windows[window]])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1} of {steps}: {losses[-1]:.3f}", flush=True)
    found = dense_perplexity(model, evaluation)
    return {
        "fields": fields,
        "steps": steps,
        "seed": seed,
        "sparse_losses": losses,
        "dense": asdict(found),
        "perplexity": found.perplexity,
    }


def summarise(folder: Path) -> dict[str, Any]:
    """Each pattern beside the plain arm of its seed."""
    arms = [json.loads(path.read_text()) for path in sorted(folder.glob("*_seed*.json"))]
    plain = {arm["seed"]: arm for arm in arms if arm["arm"] == "plain"}
    rows = []
    for arm in arms:
        row = {name: arm[name] for name in ("arm", "seed", "steps", "fields", "perplexity", "sparse_losses")}
        if arm["arm"] != "plain" and arm["seed"] in plain:
            reference = plain[arm["seed"]]
            pair = [
                Perplexity(tuple(part["dense"]["nll_sums"]), tuple(part["dense"]["token_counts"])) for part in (reference, arm)
            ]
            difference = paired_difference(*pair)
            row["percent_to_plain"] = asdict(difference)
            print(f"{arm['arm']}, seed {arm['seed']}: {difference}")
        rows.append(row)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "trained_with": sorted({str(arm["provenance"].get("commit")) for arm in arms}),
        "config": {
            "base": BASE.name, "tokens": SEQ_LEN, "batch": 1, "learning_rate": LEARNING_RATE, "lora": "r=8 on q, k, v, o",
            "dtype": "float32", "train": TRAIN_PACKAGES, "evaluation": EVALUATION_PACKAGES,
            "evaluation_windows": len(arms[0]["dense"]["token_counts"]),
        },
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    """Runs the arms that are missing, or writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/pattern_quality"), help="folder of the arms")
    parser.add_argument("--steps", type=int, default=24, help="training steps (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="orders of the data (default: %(default)s)")
    parser.add_argument("--summarise", action="store_true", help=f"write {RESULT.name} from the arms that are there")
    args = parser.parse_args()
    if args.summarise:
        RESULT.write_text(json.dumps(summarise(args.out), indent=1) + "\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    windows = pack_documents(tokenizer, python_sources(TRAIN_PACKAGES), SEQ_LEN)
    evaluation = spread_samples(pack_documents(tokenizer, python_sources(EVALUATION_PACKAGES), SEQ_LEN), args.windows)
    for seed in range(args.seeds):
        for name, fields in ARMS.items():
            path = args.out / f"{name}_seed{seed}.json"
            if not path.exists():
                print(f"{name}, seed {seed}", flush=True)
                found = run_arm(fields, windows, evaluation, args.steps, seed)
                path.write_text(json.dumps({"arm": name, "provenance": provenance(), **found}, indent=1) + "\n")
    print("all arms are there: --summarise writes the result")


if __name__ == "__main__":
    main()
