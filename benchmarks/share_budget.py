"""Shares by layer against one share for all, at as many kept blocks: what the share search finds, and what it is worth.

    nice python benchmarks/share_budget.py
    nice python benchmarks/share_budget.py --train 30        adds short runs

The quickstart's model, adapter and training text. The search measures some windows and solves (lemo_hf/training/phases); other
windows then judge what it found, beside one share for all layers and a hand-made ramp, all with equally many kept blocks:

- `damage`: in the exact form the error of the LoRA gradient, in the sparse form the loss of the training-time forward, one number
  a window; `less` is the mean difference to one share for all, with its standard error over windows.
- `progress`: the share of stock's progress that a step of Adam makes (benchmarks/gradient_quality.py), and its difference to one
  share for all, with the standard error from leaving out one window at a time.
- `trained`: dense perplexity on other packages' text after some steps, by seed.

`found dense` measures every layer with all others dense, `found` with all others at the share they have, `found twice` goes on from
what `found` found. A difference of less than two standard errors is called a tie.
"""

import argparse
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gradient_quality import Gradient, adam_progress, flattened
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from lemo_hf import LemoConfig, LemoTrainer
from lemo_hf.evaluation.perplexity import dense_perplexity
from lemo_hf.hub.lemo_files import load_predictors
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_elimination import kept_block_count
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import BASE, EVALUATION_PACKAGES, SEQ_LEN, TRAIN_PACKAGES, arguments, load
from lemo_hf.quickstart.report import Arm
from lemo_hf.text_data import pack_documents, python_sources, spread_samples
from lemo_hf.training.phases.share_sensitivity import ShareSensitivity, mean_error
from lemo_hf.training.phases.share_solver import solve_shares

RESULT = Path(__file__).parent / "results" / "quality_budget--any.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "exact 0.5": {"keep_ratio": 0.5},
    "exact 0.3": {"keep_ratio": 0.3},
    "kept keys 0.5": {"keep_ratio": 0.5, "attention_forward": "kept_keys", "selection": "ratio"},
    "sparse 0.5": {"keep_ratio": 0.5, "attention_forward": "sparse", "selection": "ratio", "dense_layers": [0]},
}


class Setting:
    """One form and share on the quickstart's model.

    Args:
        name: Its name in the result.
        seq_len: Tokens of a window.
    """

    def __init__(self, name: str, seq_len: int) -> None:
        self.name = name
        self.lemo = LemoConfig(**SETTINGS[name])
        self.model = load(Arm(name, name, self.lemo))
        self.backbone = sparse_backbone(self.model)
        if self.lemo.needs_predictors:
            load_predictors(self.backbone, str(BASE))
        self.blocks = -(-seq_len // self.lemo.block_size)
        self.layers = len(self.backbone.layers)
        self.kept = kept_block_count(self.blocks, self.lemo.ratio_of(0))
        self.chosen = [layer for layer in range(self.layers) if not self.lemo.is_dense(layer, self.layers)]
        self.uniform = [self.kept / self.blocks] * self.layers

    def ramp(self) -> list[float]:
        """Shares that rise evenly from half to one and a half of the share, first to last layer that chooses."""
        last = len(self.chosen) - 1
        counts = [round(self.kept * (0.5 + place / last)) for place in range(len(self.chosen))]
        counts[-1] += self.kept * len(self.chosen) - sum(counts)
        return self._shares(dict(zip(self.chosen, counts, strict=True)))

    def _shares(self, counts: dict[int, int]) -> list[float]:
        return [counts.get(layer, self.kept) / self.blocks for layer in range(self.layers)]

    def search(self, start: list[float], others: list[float], windows: list[torch.Tensor]) -> dict[str, Any]:
        """What the search finds from `start`, every layer measured with the others at `others`."""
        tried = [
            sorted({min(max(round(factor * share * self.blocks), 2), self.blocks) / self.blocks for factor in (0.5, 1.0, 1.5)})
            if layer in self.chosen
            else [share]
            for layer, share in enumerate(start)
        ]
        known = others == start  # the damage at the start is then that of the whole
        probes = [
            [share for share in shares if not (known and share == start[layer])] if layer in self.chosen else []
            for layer, shares in enumerate(tried)
        ]
        measured = ShareSensitivity(self.model, self.backbone)
        found = []
        for draw, tokens in enumerate(tqdm(windows, desc=f"{self.name}: measuring", unit="window")):
            batch = {"input_ids": tokens[None], "labels": tokens[None]}
            base, probed, _ = measured.measure(batch, others, probes, draw)
            at = [dict(zip(shares, values, strict=True)) for shares, values in zip(probes, probed, strict=True)]
            found.append([[values.get(share, base) for share in shares] for values, shares in zip(at, tried, strict=True)])
        # By layer and share: mean over windows and its standard error, beside the layer's smallest share.
        damages, errors = [], []
        for layer in range(self.layers):
            of_layer = torch.tensor([each[layer] for each in found])
            damages.append(of_layer.mean(0).tolist())
            errors.append(((of_layer - of_layer[:, :1]).std(0) / len(found) ** 0.5).tolist())
        shares = solve_shares(tried, damages, tried, sum(start))
        counts = {layer: int(shares[layer] * self.blocks + 1e-6) for layer in self.chosen}
        return {"shares": self._shares(counts), "tried": tried, "damages": damages, "standard_errors": errors}

    def gradients(self, shares: list[float], windows: list[torch.Tensor]) -> tuple[list[Gradient], list[float]]:
        """LoRA gradient and training loss of every window at some shares."""
        self.backbone.config.lemo.update(keep_ratio=shares)
        found = []
        for draw, tokens in enumerate(tqdm(windows, desc=f"{self.name}: judging", unit="window")):
            self.backbone.lemo_draw = 1000 + draw
            found.append(gradient_and_loss(self.model, tokens))
        self.backbone.config.lemo.update(keep_ratio=self.lemo.keep_ratio)
        return [gradient for gradient, _ in found], [loss for _, loss in found]


def gradient_and_loss(model: Any, tokens: torch.Tensor) -> tuple[Gradient, float]:
    """LoRA gradient of the mean loss of one window, by name, and that loss."""
    model.zero_grad()
    model.train()
    loss = model(input_ids=tokens[None], labels=tokens[None]).loss
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}, loss.item()


def by_layer(gradient: Gradient, layers: int) -> list[torch.Tensor]:
    """A gradient as one vector per layer."""
    return [
        torch.cat([grad.flatten() for name, grad in gradient.items() if f".layers.{layer}." in name]) for layer in range(layers)
    ]


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean of paired differences and its standard error."""
    return {"mean": statistics.mean(values), "standard_error": statistics.stdev(values) / len(values) ** 0.5}


def verdict(difference: dict[str, float], better: int) -> str:
    """What a difference says: `better` is the sign of an improvement."""
    if abs(difference["mean"]) < 2 * difference["standard_error"]:
        return "tie"
    return "better" if difference["mean"] * better > 0 else "worse"


def judge(setting: Setting, candidates: dict[str, list[float]], windows: list[torch.Tensor], task: Gradient) -> dict[str, Any]:
    """Damage and progress of every candidate on windows that were not measured, beside one share for all, named "uniform"."""
    exact = setting.lemo.attention_forward == "exact"
    dense, _ = setting.gradients([1.0] * setting.layers, windows)
    names = [name for name, grad in task.items() if grad.any()]
    goal, whole = flattened([task], names)[0], flattened(dense, names)
    damages, flat = {}, {}
    for name, shares in candidates.items():
        gradients, losses = setting.gradients(shares, windows)
        pairs = zip(gradients, dense, strict=True)
        errors = [mean_error(by_layer(mine, setting.layers), by_layer(theirs, setting.layers)) for mine, theirs in pairs]
        damages[name], flat[name] = (errors if exact else losses), flattened(gradients, names)

    def progress(name: str, left_out: int | None) -> float:
        used = torch.arange(len(windows)) != (-1 if left_out is None else left_out)
        return adam_progress(flat[name][used], goal) / adam_progress(whole[used], goal)

    result: dict[str, Any] = {}
    for name, shares in candidates.items():
        entry = {"shares": shares, "damage": damages[name], "progress": progress(name, None)}
        if name != "uniform":
            less = [mine - theirs for mine, theirs in zip(damages[name], damages["uniform"], strict=True)]
            left_out = [progress(name, place) - progress("uniform", place) for place in range(len(windows))]
            spread = statistics.pstdev(left_out) * (len(windows) - 1) ** 0.5
            more = {"mean": progress(name, None) - progress("uniform", None), "standard_error": spread}
            entry |= {"less": mean_and_error(less), "more_progress": more}
            entry |= {"verdict_damage": verdict(entry["less"], -1), "verdict_progress": verdict(more, 1)}
        result[name] = entry
    return result


def trained(name: str, shares: list[float], text: Any, evaluation: Any, steps: int, seed: int) -> dict[str, Any]:
    """A short run at some shares and the dense perplexity after it."""
    lemo = LemoConfig(**{**SETTINGS[name], "keep_ratio": shares})
    arm = Arm(name, name, lemo)
    model = load(arm)
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(arm, Path(folder), steps)
        settings.seed = settings.data_seed = seed
        settings.disable_tqdm = True
        LemoTrainer(model=model, args=settings, train_dataset=text, data_collator=default_data_collator).train()
    return {"seed": seed, "perplexity": dense_perplexity(model, evaluation).perplexity}


def main(given: list[str] | None = None) -> None:
    """Measures and writes the result, setting by setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=SEQ_LEN, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--measured", type=int, default=4, help="windows that the search measures (default: %(default)s)")
    parser.add_argument("--judged", type=int, default=8, help="windows that judge what it found (default: %(default)s)")
    parser.add_argument("--task", type=int, default=12, help="windows of the task's gradient (default: %(default)s)")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="which of them (default: all)")
    parser.add_argument("--more", action="store_true", help="also search with the other layers dense, and twice")
    parser.add_argument("--train", type=int, default=0, help="steps of short runs, two seeds each (default: none)")
    parser.add_argument("--evaluated", type=int, default=12, help="windows of perplexity (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULT, help="result file, to which settings are added (default: %(default)s)"
    )
    args = parser.parse_args(given)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = pack_documents(tokenizer, python_sources(TRAIN_PACKAGES), args.tokens)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [torch.as_tensor(text[index]["input_ids"]) for index in order[: args.measured + args.judged + args.task]]
    measured, judged = drawn[: args.measured], drawn[args.measured : args.measured + args.judged]
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {"settings": {}}
    task = None
    for name in args.settings:
        setting = Setting(name, args.tokens)
        if task is None:
            gradients, _ = setting.gradients([1.0] * setting.layers, drawn[args.measured + args.judged :])
            task = {weight: torch.stack([each[weight] for each in gradients]).mean(0) for weight in gradients[0]}
        found = setting.search(setting.uniform, setting.uniform, measured)
        searches = {"found": found}
        if args.more:
            searches["found dense"] = setting.search(setting.uniform, [1.0] * setting.layers, measured)
            searches["found twice"] = setting.search(found["shares"], found["shares"], measured)
        candidates = {"uniform": setting.uniform, "ramp": setting.ramp(), **{key: one["shares"] for key, one in searches.items()}}
        entry = {"lemo": SETTINGS[name], "measured": searches, "judged": judge(setting, candidates, judged, task)}
        if args.train:
            windows = pack_documents(tokenizer, python_sources(EVALUATION_PACKAGES), args.tokens)
            evaluation = spread_samples(windows, args.evaluated)
            entry["trained"] = {
                key: [trained(name, candidates[key], text, evaluation, args.train, seed) for seed in (0, 1)]
                for key in ("uniform", "found")
            }
        result |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "config": {**vars(args), "output": None}}
        result["config"] |= {"train_text": TRAIN_PACKAGES, "evaluation_text": EVALUATION_PACKAGES, "base": BASE.name}
        result["settings"][name] = entry
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        for key, one in entry["judged"].items():
            shares = " ".join(f"{share:.2f}" for share in one["shares"])
            words = (
                ""
                if key == "uniform"
                else "; ".join(
                    f"{one[what]['mean']:+.4f} +- {one[what]['standard_error']:.4f} {one[verdict_of]}"
                    for what, verdict_of in (("less", "verdict_damage"), ("more_progress", "verdict_progress"))
                )
            )
            print(
                f"{name:10s} {key:12s} {shares}  damage {statistics.mean(one['damage']):.4f} progress {one['progress']:.3f}  {words}"
            )


if __name__ == "__main__":
    main()
