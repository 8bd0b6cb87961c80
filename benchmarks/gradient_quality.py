"""How good is a restricted gradient? LoRA gradients of the exact form by choice of blocks, against the dense ones of the same text.

    nice python benchmarks/gradient_quality.py

The quickstart's model, adapter and training text (windows of 4096 tokens), kept share 0.5, at the start and after some steps of
the stock arm. A variant's gradient g of a window stands against the dense gradient d of that window, and against p, the mean
dense gradient of other windows, which is as near as one comes to the gradient of the task:

- `cosine`: of g with d; `norm`: |g| / |d|; `by_layer`: that cosine in each layer. They show what restricting costs on top of the
  window's own noise.
- `cosine_task`: of g with p; for the dense gradient itself it is what a window knows of the task.
- `progress`: sum of p_i E[g_i] / sqrt(E[g_i ** 2]), expectations over windows and draws, divided by the same sum for the dense
  gradient: to first order the share of stock's progress that a step of Adam makes, whose normaliser makes a gradient's scale
  irrelevant and its noise expensive. `spread`: standard error of that share, by leaving out one window at a time.

`half of the labels` is the dense gradient of a loss on half of the blocks: the noise of having half of the tokens, without
any error of the restriction. `reweighted` scales what enters a branch at a drawn row by one over the chance to be kept, so that
every path through k branches counts fully on average instead of r ** k; `kept keys alone` leaves out what dropped keys add to the
gradient of kept queries. The same blocks are drawn for variants of one kind. Memory 2 GB; about 15 minutes of one core.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Trainer, default_data_collator

from lemo_hf import LemoConfig
from lemo_hf.models import kept_and_rest_rows
from lemo_hf.models.documents import find_documents
from lemo_hf.models.sparse_decoder import SparseBatch, sparse_backbone
from lemo_hf.models.token_elimination import choose_blocks
from lemo_hf.profiling.provenance import provenance
from lemo_hf.quickstart.comparison import ARMS, BASE, SEQ_LEN, TRAIN_PACKAGES, arguments, load
from lemo_hf.quickstart.report import Arm
from lemo_hf.text_data import pack_documents, python_sources

RESULT = Path(__file__).parent / "results" / "gradient_quality--any.json"
Gradient = dict[str, Tensor]


@dataclass
class Variant:
    """One way to restrict the gradient.

    Args:
        name: What the result calls it.
        lemo: Fields of its `LemoConfig`.
        reweighted: Whether branches are entered with one over the chance to be kept.
        kept_alone: Whether dropped keys are left out of the gradient of kept queries.
        labels_only: Whether the gradient is the dense one and only the labels are those of kept blocks.
    """

    name: str
    lemo: dict[str, Any] = field(default_factory=dict)
    reweighted: bool = False
    kept_alone: bool = False
    labels_only: bool = False


VARIANTS = (
    Variant("drawn by layer, kept keys alone", {"draws": "by_layer"}, kept_alone=True),
    Variant("drawn by layer", {"draws": "by_layer"}),
    Variant("drawn by layer, reweighted", {"draws": "by_layer"}, reweighted=True),
    Variant("shared draws, kept keys alone", kept_alone=True),
    Variant("shared draws"),
    Variant("shared draws, blocks of 16", {"block_size": 16}),
    Variant("shared draws, blocks of 256", {"block_size": 256}),
    Variant("shared draws, last layer dense", {"dense_layers": [-1]}),
    Variant("half of the labels", labels_only=True),
)


def chance_to_be_kept(kept_blocks: Tensor) -> Tensor:
    """By block of one document whose first and last blocks are always kept, `(blocks,)`: 1 for these, their share for the others."""
    chance = torch.ones(len(kept_blocks))
    chance[1:-1] = kept_blocks[1:-1].float().mean()
    return chance


@contextmanager
def branches_reweighted(model: Any) -> Iterator[None]:
    """Scales the gradient that enters attention and MLP at kept rows by one over the row's chance to be kept; one document a batch."""
    handles, batches = [], {}

    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batches["now"] = kwargs["sparse_batch"]

    def reweight(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            batch: SparseBatch = batches["now"]
            if output.requires_grad:
                selection = batch.selections[layer]
                blocks = batch.documents.block_of_row[selection.real_kept]
                weights = 1 / chance_to_be_kept(selection.kept_blocks)[blocks]
                output.register_hook(lambda grad: grad * weights[:, None])

        return hook

    for number, layer in enumerate(sparse_backbone(model).layers):
        handles.append(layer.register_forward_pre_hook(remember, with_kwargs=True))
        handles += [part.register_forward_hook(reweight(number)) for part in (layer.self_attn.o_proj, layer.mlp)]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def kept_keys_alone() -> Iterator[None]:
    """Runs the exact form's backward pass without what dropped keys add to the gradient of kept queries."""
    whole = kept_and_rest_rows.with_rest_keys
    kept_and_rest_rows.with_rest_keys = lambda attended, *rest: attended
    try:
        yield
    finally:
        kept_and_rest_rows.with_rest_keys = whole


def gradient(model: Any, tokens: Tensor, labels: Tensor | None = None) -> Gradient:
    """LoRA gradient of the mean loss of one window, by name; B matrices and, once these are not zero, A matrices."""
    model.zero_grad()
    model.train()
    model(input_ids=tokens[None], labels=(tokens if labels is None else labels)[None]).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def labels_of_drawn_blocks(tokens: Tensor, draw: int) -> Tensor:
    """Labels that only the rows of the blocks drawn by `draw` predict."""
    documents = find_documents(1, len(tokens), LemoConfig().block_size, tokens.device, input_ids=tokens[None])
    kept = torch.zeros(len(tokens), dtype=torch.bool)
    kept[choose_blocks(None, documents, LemoConfig(), 0, draw).kept_rows] = True
    labels = tokens.clone()
    labels[1:][~kept[:-1]] = -100
    return labels


def flattened(gradients: list[Gradient], names: list[str]) -> Tensor:
    """`(samples, weights)` from each sample's gradients by name."""
    return torch.stack([torch.cat([each[name].flatten() for name in names]) for each in gradients])


def adam_progress(gradients: Tensor, task: Tensor) -> float:
    """First-order gain of a step of Adam with stationary gradients `(samples, weights)` along the task's `(weights,)`."""
    spread = gradients.square().mean(0).sqrt().clamp_min(torch.finfo(gradients.dtype).tiny)
    return (task * gradients.mean(0) / spread).sum().item()


def quality(gradients: list[Gradient], dense: list[Gradient], task: Gradient) -> dict[str, Any]:
    """A variant's entry of the result.

    Args:
        gradients: The variant's, one per window.
        dense: The dense ones of the same windows.
        task: Mean dense gradient of other windows.
    """
    names = [name for name, grad in task.items() if grad.any()]
    mine, theirs, goal = flattened(gradients, names), flattened(dense, names), flattened([task], names)[0]
    shares = []
    for left_out in (None, *range(len(mine))):
        used = torch.arange(len(mine)) != (-1 if left_out is None else left_out)
        shares.append(adam_progress(mine[used], goal) / adam_progress(theirs[used], goal))
    others = torch.tensor(shares[1:])
    layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})
    in_layer = [[name for name in names if f".layers.{layer}." in name] for layer in layers]
    cosine = torch.cosine_similarity
    return {
        "cosine": cosine(mine, theirs).mean().item(),
        "norm": (mine.norm(dim=1) / theirs.norm(dim=1)).mean().item(),
        "cosine_task": cosine(mine, goal[None]).mean().item(),
        "progress": shares[0],
        "spread": ((others - others.mean()).square().sum() * (len(others) - 1) / len(others)).sqrt().item(),
        "by_layer": [cosine(flattened(gradients, part), flattened(dense, part)).mean().item() for part in in_layer],
    }


def trained_adapter(windows: Any, steps: int) -> Gradient:
    """The stock arm's adapter after `steps` of its steps."""
    model = load(ARMS[0])
    if steps:
        with tempfile.TemporaryDirectory() as folder:
            settings = arguments(ARMS[0], Path(folder), steps)
            Trainer(model=model, args=settings, train_dataset=windows, data_collator=default_data_collator).train()
    return get_peft_model_state_dict(model)


def measure(adapter: Gradient, windows: list[Tensor], other_windows: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Every variant's quality at one adapter, and the dense gradient's own."""

    def loaded(arm: Arm) -> Any:
        model = load(arm)
        set_peft_model_state_dict(model, adapter)
        return model

    stock = loaded(ARMS[0])
    dense = [gradient(stock, tokens) for tokens in tqdm(windows, desc="dense", unit="window")]
    others = [gradient(stock, tokens) for tokens in tqdm(other_windows, desc="task", unit="window")]
    task = {name: torch.stack([each[name] for each in others]).mean(0) for name in others[0]}
    found = {"dense": quality(dense, dense, task)}
    for variant in VARIANTS:
        gradients = []
        model = stock if variant.labels_only else loaded(Arm(variant.name, variant.name, LemoConfig(**variant.lemo)))
        for draw, tokens in enumerate(tqdm(windows, desc=variant.name, unit="window")):
            if variant.labels_only:
                gradients.append(gradient(stock, tokens, labels_of_drawn_blocks(tokens, draw)))
                continue
            sparse_backbone(model).lemo_draw = draw
            with ExitStack() as changes:
                if variant.reweighted:
                    changes.enter_context(branches_reweighted(model))
                if variant.kept_alone:
                    changes.enter_context(kept_keys_alone())
                gradients.append(gradient(model, tokens))
        found[variant.name] = quality(gradients, dense, task)
    return found


def main(given: list[str] | None = None) -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=12, help="windows whose gradients are compared (default: %(default)s)")
    parser.add_argument("--others", type=int, default=24, help="windows of the task's gradient (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[0, 25], help="steps of stock LoRA before measuring (default: 0 25)"
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    args = parser.parse_args(given)
    text = pack_documents(AutoTokenizer.from_pretrained(BASE), python_sources(TRAIN_PACKAGES), SEQ_LEN)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()[: args.windows + args.others]
    tokens = [torch.as_tensor(text[index]["input_ids"]) for index in order]
    result: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {
            "text": TRAIN_PACKAGES,
            "tokens": SEQ_LEN,
            "windows": args.windows,
            "other_windows": args.others,
            "variants": [asdict(variant) for variant in VARIANTS],
        },
        "after_steps": {},
    }
    for steps in args.steps:
        found = measure(trained_adapter(text, steps), tokens[: args.windows], tokens[args.windows :])
        result["after_steps"][str(steps)] = found
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nafter {steps} steps        cosine   norm   task   progress")
        for name, entry in found.items():
            numbers = f"{entry['cosine']:7.3f}{entry['norm']:7.3f}{entry['cosine_task']:7.3f}{entry['progress']:8.3f}"
            print(f"{name:32s}{numbers} +- {entry['spread']:.3f}")


if __name__ == "__main__":
    main()
