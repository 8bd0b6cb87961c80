"""How many rows a step needs before leaving tokens out pays: gradient noise of stock LoRA and of the forms that draw, row by row.

    nice python -m benchmarks.quality.noise_scale --base outputs/quality/base_small

A step of B rows moves along a gradient whose noise falls with B. With G the expected dense gradient, G_r and S_r mean and covariance of
a form's gradients of single rows, and the form's gradient scaled until it gains as much per step along G, its mean square is

    1 + bias + noise / B,      bias = |G_r|^2 |G|^2 / <G_r, G>^2 - 1,      noise = tr(S_r) |G|^2 / <G_r, G>^2   (in rows)

times that of G; for stock bias is 0 and noise the gradient noise scale of McCandlish et al. (arXiv 1812.06162, section 2). What a step of
the best length gains falls with it: so a form needs (1 + bias + noise / B) / (1 + stock's noise / B) of stock's steps, and wins at equal
time where that is less than stock's step takes of its own. This supposes that each takes steps of its own best length, and a curvature that
is alike in all weights once products are taken after division by the root of the root mean square of stock's gradients, as Adam
weighs them. Runs share one rate, and noise grows as they go on: a guide to which side wins, not a forecast of by how much.

Products of different rows are estimated without bias; their ratios are not, and are unsure where <G_r, G> is small. Errors are those of leaving
out one row at a time, the weights of the products found anew each time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.gradient_quality import flattened, gradient
from benchmarks.quality.arms import Arm, all_arms
from benchmarks.quality.extension import chosen_blocks
from benchmarks.quality.rows import TEXT, TEXTS, Rows
from benchmarks.quality.setting import Setting, identity, load
from lemo_hf.errors import LemoError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.provenance import provenance

RESULT = Path(__file__).parents[1] / "results" / "quality_noise--any.json"
FORMS = ("exact-0.5", "exact-0.3", "keys-0.5-random_shared")
WARM_UP_STEPS, WARM_UP_RATE = 8, 3e-3
LEAST_ROWS = 4
# Rows of a step that are asked about.
STEP_ROWS = (1, 4, 16, 64)


def mean_products(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Mean product of different rows, which is that of the expected gradients, and mean product of the same row in both.

    Args:
        first, second: Gradients of the same rows, `(rows, weights)`.
    """
    products = first.double() @ second.double().T
    rows = len(products)
    same = products.diagonal().mean().item()
    return (products.sum().item() - rows * same) / (rows * (rows - 1)), same


def step_cost(mine: Tensor, dense: Tensor) -> tuple[float, float]:
    """`bias` and `noise` (in rows) of a form, as the module says.

    Args:
        mine, dense: The form's gradients and stock's, of the same rows, `(rows, weights)`.
    """
    signal, _ = mean_products(dense, dense)
    own, own_square = mean_products(mine, mine)
    along, _ = mean_products(mine, dense)
    scale = signal / along**2
    return own * scale - 1, (own_square - own) * scale


def steps_needed(form: Sequence[float], stock: Sequence[float], rows: float) -> float:
    """Steps of `rows` rows that a form needs for one of stock's, from `step_cost` of both."""
    return (1 + form[0] + form[1] / rows) / (1 + stock[1] / rows)


def figures(mine: Tensor, dense: Tensor) -> list[float]:
    """`step_cost` of a form, and `steps_needed` for every number of rows in `STEP_ROWS`, products weighed by stock's gradients."""
    weigh = dense.square().mean(0).sqrt().sqrt().clamp_min(1e-12)
    mine, dense = mine / weigh, dense / weigh
    form, stock = step_cost(mine, dense), step_cost(dense, dense)
    return [*form, *(steps_needed(form, stock, rows) for rows in STEP_ROWS)]


def with_errors(mine: Tensor, dense: Tensor) -> dict[str, Any]:
    """A form's `bias`, `noise` and, by rows of a step, `steps` for one of stock's, each as (value, standard error).

    Args:
        mine, dense: The form's gradients and stock's, of the same rows, `(rows, weights)`.

    Raises:
        LemoError: If there are too few rows to leave one out.
    """
    rows = len(dense)
    if rows < LEAST_ROWS:
        raise LemoError(f"noise is told from rows that differ; {rows} rows; give {LEAST_ROWS} or more")
    found = figures(mine, dense)
    without = torch.tensor([figures(mine[kept], dense[kept]) for kept in (torch.arange(rows) != row for row in range(rows))])
    errors = ((without - without.mean(0)).square().sum(0) * (rows - 1) / rows).sqrt().tolist()
    bias, noise, *steps = zip(found, errors, strict=True)
    return {"bias": bias, "noise": noise, "steps": dict(zip(map(str, STEP_ROWS), steps, strict=True))}


def row_gradients(arm: Arm, setting: Setting, adapter: dict[str, Tensor] | None, rows: Sequence[Tensor]) -> Tensor:
    """LoRA gradients of single rows, each with a draw of its own, `(rows, weights)`.

    Args:
        arm, setting: What to load.
        adapter: Where LoRA stands; `None` for its start.
        rows: `(tokens,)` each.
    """
    model = load(arm, setting, 0)
    if adapter is not None:
        set_peft_model_state_dict(model, adapter)
    found = []
    for draw, tokens in enumerate(rows):
        if not arm.is_stock:
            sparse_backbone(model).lemo_draw = draw
        with chosen_blocks(arm, model):
            found.append(gradient(model, tokens))
    return flattened(found, sorted(found[0]))


def warmed_up(setting: Setting, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stock LoRA after a few steps of a row each: at its start half of its weights have no gradient."""
    model = load(all_arms()["stock"], setting, 0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=WARM_UP_RATE)
    model.train()
    for tokens in rows:
        model(input_ids=tokens[None], labels=tokens[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return state


def measure(setting: Setting, count: int) -> dict[str, dict[str, Any]]:
    """`with_errors` of stock and of every form of `FORMS`.

    Args:
        setting: Base, length and text.
        count: Rows that are compared.
    """
    texts = Rows(AutoTokenizer.from_pretrained(setting.base), setting)
    order = texts.training(0).orders[TEXT]
    if len(order) < count + WARM_UP_STEPS:
        raise LemoError(f"text has too few windows; {len(order)} for {count + WARM_UP_STEPS}; measure fewer --rows")
    rows = [texts.windows[TEXT][place] for place in order[: count + WARM_UP_STEPS]]
    adapter = warmed_up(setting, rows[count:])
    arms = all_arms()
    dense = row_gradients(arms["stock"], setting, adapter, rows[:count])
    found = {"stock": with_errors(dense, dense)}
    for name in FORMS:
        found[name] = with_errors(row_gradients(arms[name], setting, adapter, rows[:count]), dense)
        print(f"{setting.text} {name}: {found[name]}", flush=True)
    return found


def main(given: list[str] | None = None) -> int:
    """Measures every text that the result has not, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="rows compared (default: %(default)s)")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="(default: all)")
    parser.add_argument("--out", type=Path, default=RESULT, help="(default: %(default)s)")
    args = parser.parse_args(given)
    result: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "machine": "any", "texts": {}}
    result["config"] = {
        "base": Path(args.base).name,
        "weights": identity(args.base),
        "tokens": args.tokens,
        "rows": args.rows,
        "warm_up_steps": WARM_UP_STEPS,
        "warm_up_rate": WARM_UP_RATE,
        "dtype": "float32",
        "autocast": False,
    }
    try:
        for text in args.texts:
            result["texts"][text] = measure(Setting(args.base, args.tokens, text=text), args.rows)
    except LemoError as error:
        print(error, file=sys.stderr)
        return 2
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
