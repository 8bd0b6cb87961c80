"""Which choice's gradient is worth most? Every choice of `choices.py` against the dense gradient of the same text.

    nice python -m benchmarks.quality.gradients

Exact form: LoRA gradients of the quickstart's model after some steps of its stock arm, window by window, as in
`benchmarks/gradient_quality.py`, which defines `cosine` (with the window's dense gradient; `cosine_spread` is its standard
error over windows) and `progress` (of Adam, in shares of the dense gradient's; `spread` by leaving out one window at a time).
`beyond` compares progress with that of the uniform shared draw, and `beyond_spread` is the spread of that difference on the
same windows. A choice that looks at all scores or at the gradient itself is measured as if that were free.

Sparse form, first layer dense: `nats`, how much higher the sparse forward's loss is than the dense one's, without training.

`predicted` is measured with `--block-size 64` only, which the shipped predictors are for. Choices that are measured already are
not measured again: the result file is written after each one. `bytes` says what a choice keeps of a Llama-3-8B layer, in rows of
H per token: 4.5 per token kept by attention, 8 per token kept by the MLP, 0.5 for keys and values of a token that attention drops.
"""

import argparse
import json
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks import gradient_quality
from benchmarks.quality.choices import CHOICES, chosen_by
from lemo_hf import LemoConfig
from lemo_hf.hub.lemo_files import load_predictors
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import ARMS, BASE, SEQ_LEN, TRAIN_PACKAGES, load
from lemo_hf.quickstart.report import Arm
from lemo_hf.text_data import pack_documents, python_sources

RESULT = Path(__file__).parents[1] / "results" / "quality_gradient--any.json"
DEFAULT = "random_shared"
SPARSE = [name for name, choice in CHOICES.items() if not choice.is_emulated or choice.nearby]
EXACT = [name for name, choice in CHOICES.items() if not choice.nearby]


def rows_kept(name: str, share: float) -> float:
    """Rows of H that a Llama-3-8B layer saves per token of the text, fused, bf16 adapters on attention."""
    choice = CHOICES[name]
    attention, mlp = min(1, choice.attention_factor * share), min(1, choice.mlp_factor * share)
    # All rows' keys and values, and for their weights' gradients the rows that they were projected from.
    others = {"kept": 0.0, "centred": 0.0, "all": 0.5, "weights": 1.5}[choice.keys]
    return round(4.5 * attention + 8 * mlp + others * (1 - attention), 3)


def leave_one_out(values: Tensor) -> float:
    """Standard error from what is found without each window, `(windows,)`."""
    return ((values - values.mean()).square().sum() * (len(values) - 1) / len(values)).sqrt().item()


def progress(mine: Tensor, dense: Tensor, task: Tensor) -> Tensor:
    """Share of the dense gradient's progress, of all windows and without each, `(1 + windows,)`."""
    found = []
    for left_out in range(-1, len(mine)):
        used = torch.arange(len(mine)) != left_out
        found.append(gradient_quality.adam_progress(mine[used], task) / gradient_quality.adam_progress(dense[used], task))
    return torch.tensor(found)


def entry(mine: Tensor, dense: Tensor, task: Tensor, default: Tensor | None) -> dict[str, Any]:
    """A choice's figures.

    Args:
        mine, dense: Gradients `(windows, weights)`.
        task: Mean dense gradient of other windows, `(weights,)`.
        default: `progress` of the uniform shared draw.
    """
    cosines, gains = torch.cosine_similarity(mine, dense), progress(mine, dense, task)
    found = {
        "cosine": cosines.mean().item(),
        "cosine_spread": (cosines.std() / len(cosines) ** 0.5).item(),
        "norm": (mine.norm(dim=1) / dense.norm(dim=1)).mean().item(),
        "progress": gains[0].item(),
        "spread": leave_one_out(gains[1:]),
        "cosines": cosines.tolist(),
        "progress_without_each": gains.tolist(),
    }
    if default is not None:
        found |= {"beyond": (gains - default)[0].item(), "beyond_spread": leave_one_out((gains - default)[1:])}
    return found


class Bench:
    """Model, adapter and text of the measurements.

    Args:
        windows: Windows compared, `(windows, tokens)`.
        others: Windows of the task's gradient.
        adapter: Where LoRA stands.
        block_size: Tokens per block.
    """

    def __init__(self, windows: Tensor, others: Tensor, adapter: dict[str, Tensor], block_size: int) -> None:
        self.windows, self.others, self.adapter, self.block_size = windows, others, adapter, block_size

    @property
    def knows_predictors(self) -> bool:
        """Whether the shipped predictors pool blocks of this size."""
        return self.block_size == LemoConfig().block_size

    def model(self, lemo: LemoConfig | None) -> Any:
        """The quickstart's model with the adapter."""
        model = load(Arm("measured", "measured", lemo))
        if lemo is not None and self.knows_predictors:
            load_predictors(sparse_backbone(model), BASE)
        set_peft_model_state_dict(model, self.adapter)
        return model

    @cached_property
    def dense(self) -> tuple[list[str], Tensor, Tensor]:
        """Names of the weights with a gradient, dense gradients of the windows, and the task's."""
        stock = self.model(None)
        gradients = [gradient_quality.gradient(stock, tokens) for tokens in tqdm(self.windows, desc="dense", leave=False)]
        others = [gradient_quality.gradient(stock, tokens) for tokens in tqdm(self.others, desc="task", leave=False)]
        names = [name for name in gradients[0] if any(grad[name].any() for grad in others)]
        return names, gradient_quality.flattened(gradients, names), gradient_quality.flattened(others, names).mean(0)

    def gradients(self, name: str, share: float, names: list[str]) -> Tensor:
        """A choice's gradients of the windows in the exact form; each window is another draw, the same for every choice."""
        model = self.model(LemoConfig(keep_ratio=share, block_size=self.block_size))
        found = []
        with chosen_by(model, name):
            for draw, tokens in enumerate(tqdm(self.windows, desc=f"{share:g} {name}", leave=False)):
                sparse_backbone(model).lemo_draw = draw
                found.append(gradient_quality.gradient(model, tokens))
        return gradient_quality.flattened(found, names)

    @torch.no_grad()
    def losses(self, name: str | None, share: float) -> Tensor:
        """Loss of each window, `(windows,)`: of a choice's sparse forward, or the dense one."""
        lemo = LemoConfig(keep_ratio=share, block_size=self.block_size, attention_forward="sparse", dense_layers=[0])
        model = self.model(lemo).train(name is not None)
        found = []
        for draw, tokens in enumerate(self.windows):
            sparse_backbone(model).lemo_draw = draw
            if name is None:
                found.append(model(input_ids=tokens[None], labels=tokens[None]).loss)
            else:
                with chosen_by(model, name):
                    found.append(model(input_ids=tokens[None], labels=tokens[None]).loss)
        return torch.stack(found)


def adapter_after(steps: int, text: Any) -> dict[str, Tensor]:
    """The stock arm's adapter, trained once and kept in `outputs/quality/`."""
    path = Path("outputs/quality") / f"quickstart_stock_{steps}_steps.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        trained = gradient_quality.trained_adapter(text, steps)
        save_file({name: weight.contiguous() for name, weight in trained.items()}, path)
    return load_file(path)


def measure(bench: Bench, result: dict[str, Any], shares: list[float], only: list[str], write: Any) -> None:
    """Adds to `result` what it lacks."""
    names, dense, task = bench.dense
    if not bench.knows_predictors:
        only = [name for name in only or CHOICES if name != "predicted"]
    for share in shares:
        exact = result["exact"].setdefault(f"{share:g}", {})
        for name in (each for each in EXACT if each == DEFAULT or not only or each in only):
            if name not in exact:
                default = torch.tensor(exact[DEFAULT]["progress_without_each"]) if DEFAULT in exact else None
                exact[name] = {
                    "bytes": rows_kept(name, share),
                    **entry(bench.gradients(name, share, names), dense, task, default),
                }
                write(f"{share:g} exact {name}: {shown(exact[name])}")
        sparse = result["sparse"].setdefault(f"{share:g}", {})
        missing = [each for each in SPARSE if each not in sparse and (not only or each in only)]
        if missing:
            plain = bench.losses(None, share)
        for name in missing:
            nats = bench.losses(name, share) - plain
            sparse[name] = {
                "nats": nats.mean().item(),
                "spread": (nats.std() / len(nats) ** 0.5).item(),
                "windows": nats.tolist(),
            }
            write(f"{share:g} sparse {name}: {sparse[name]['nats']:.3f} +- {sparse[name]['spread']:.3f} nats")


def shown(found: dict[str, Any]) -> str:
    """An entry on one line."""
    beyond = f", {found['beyond']:+.3f} +- {found['beyond_spread']:.3f}" if "beyond" in found else ""
    return f"cosine {found['cosine']:.3f} +- {found['cosine_spread']:.3f}, progress {found['progress']:.3f} +- {found['spread']:.3f}{beyond}"


def main(given: list[str] | None = None) -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3, 0.1], help="kept shares (default: 0.5 0.3 0.1)")
    parser.add_argument("--choices", nargs="*", default=[], help="names of choices (default: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="windows compared (default: %(default)s)")
    parser.add_argument("--others", type=int, default=8, help="windows of the task's gradient (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="steps of stock LoRA before measuring (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    args = parser.parse_args(given)
    text = pack_documents(AutoTokenizer.from_pretrained(BASE), python_sources(TRAIN_PACKAGES), SEQ_LEN)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()[: args.windows + args.others]
    tokens = torch.stack([torch.as_tensor(text[index]["input_ids"])[: args.tokens] for index in order])
    bench = Bench(tokens[: args.windows], tokens[args.windows :], adapter_after(args.steps, text), args.block_size)
    config = {
        "base": BASE.name,
        "text": TRAIN_PACKAGES,
        "adapter": f"{ARMS[0].title}, {args.steps} steps of {SEQ_LEN} tokens",
        "tokens": args.tokens,
        "block_size": args.block_size,
        "windows": args.windows,
        "other_windows": args.others,
        "seed": 0,
    }
    result: dict[str, Any] = {"config": config, "exact": {}, "sparse": {}}
    if args.output.exists():
        result = json.loads(args.output.read_text())
        if result["config"] != json.loads(json.dumps(config)):
            raise SystemExit(f"{args.output} has another config; got {config}; remove it, or name another file by --output")

    def write(line: str) -> None:
        head = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance()}
        args.output.write_text(
            json.dumps({**head, **{key: result[key] for key in ("config", "exact", "sparse")}}, indent=1) + "\n"
        )
        print(line, flush=True)

    measure(bench, result, args.shares, args.choices, write)


if __name__ == "__main__":
    main()
