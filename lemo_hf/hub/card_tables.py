"""The tables and sentences of a model card, from a run's results; a row whose value was not measured is not there."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..models.lemo_config import LemoConfig
from .card_metadata import public_name

if TYPE_CHECKING:
    from .model_card import Kind, RunResults

Row = tuple[str, str]
_PAPER = "[LeMo](https://arxiv.org/abs/2501.09767)"


def introduction(results: "RunResults", kind: "Kind", base: str) -> str:
    """What the model is and what using it takes, as one paragraph.

    Args:
        results: The run's results.
        kind: What lies beside the card.
        base: The base model as Markdown.
    """
    method, lemo = results.adapter.partition(" ")[0], LemoConfig.from_dict(results.lemo)
    if kind == "adapter":
        article = "An" if method[:1] in "AEIO" else "A"
        what = f"{article} {method} adapter of {base}, fine-tuned"
    else:
        what = f"{base}, fine-tuned by {method}" if method else f"{base}, all of its weights fine-tuned"
    how = f"which leaves tokens out of each layer's computation during training ({_PAPER})"
    how = f"lemo_hf, {how}." if lemo.enabled else "lemo_hf as a dense baseline."
    where = f"at a context of {results.seq_len} tokens " if results.seq_len else ""
    sentences = [f"{what} {where}with {how}"]
    if kind != "adapter" and method:
        sentences.append("The adapter is merged into the weights.")
    if kind == "remote-code":
        sentences.append("The repository carries its own code: it loads without lemo_hf, and evaluates and generates")
        sentences[-1] += " exactly as the stock model does, with ordinary dense attention."
        if lemo.enabled:
            sentences.append("Trained further, it leaves tokens out again.")
    else:
        plain = "plain PEFT adapter" if kind == "adapter" else "stock checkpoint"
        sentences.append(f"It is a {plain}: nothing of lemo_hf is needed to use it, and it runs with ordinary dense attention.")
    return " ".join(sentences)


def training_rows(results: "RunResults", base: str) -> list[Row]:
    """How the model was trained."""
    machine = results.provenance["machine"]
    threads = machine["threads"]
    where = f"{machine.get('gpu') or machine['processor']}, {threads} thread{'s' if threads != 1 else ''}"
    rows = [("Base model", base), ("Text", results.data)]
    if results.seq_len:
        rows.append(("Context", f"{results.seq_len} tokens"))
    if results.adapter:
        rows.append(("Adapter", results.adapter))
    if results.started_from:
        rows.append(("Went on from", f"adapter `{public_name(results.started_from)}`"))
    if results.precision:
        rows.append(("Precision", results.precision))
    if results.steps is not None:
        rows.append(("Optimizer steps", str(results.steps)))
    if results.train_seconds is not None:
        rows.append(("Training time", f"{duration(results.train_seconds)} on {where}"))
    return rows + selection_rows(LemoConfig.from_dict(results.lemo))


def selection_rows(lemo: LemoConfig) -> list[Row]:
    """Which tokens the layers computed on, in words."""
    if not lemo.enabled:
        return [("Block selection", "none: every token was computed on")]
    if lemo.selection == "sampled":
        temperature = lemo.sampling_temperature
        drawn = "uniformly" if temperature is None else f"by informativeness, temperature {temperature:g}"
        chosen = f"sampled: drawn anew at each step{' and layer' if lemo.draws == 'by_layer' else ''}, {drawn}"
    elif lemo.selection == "ratio":
        chosen = "ratio: the most informative ones"
    else:
        chosen = "threshold: those at least as informative as the layer's threshold"
    if lemo.needs_scores:
        chosen += ", by the layer's own queries and keys" if lemo.score_source == "true" else ", as the pattern predictors see it"
    rows = [("Block selection", chosen)]
    ratio = lemo.keep_ratio
    kept = f"{ratio:g}" if isinstance(ratio, int | float) else f"{min(ratio):g} to {max(ratio):g}, by layer"
    label = "Budget of the thresholds" if lemo.selection == "threshold" else "Blocks kept"
    rows.append((label, f"{kept} of a document's blocks, {lemo.block_size} tokens each"))
    if lemo.dense_layers:
        rows.append(("Layers that keep every token", ", ".join(str(layer) for layer in lemo.dense_layers)))
    rows.append(("Attention in training", f"{lemo.attention_forward}: {forward_words(lemo)}, gradient of the kept tokens"))
    if pattern := pattern_words(lemo):
        rows.append(("Attention pattern", pattern))
    if lemo.checkpoint == "kept_rows":
        rows.append(("Checkpointing", "a layer stores its kept rows and recomputes the rest of them"))
    if lemo.offload != "none":
        how = "as many bytes of each as hide behind computation" if lemo.offload == "sensitive" else "the same bytes of each"
        much = {None: "", "all": ", all of it"}.get(lemo.offload_budget, f", {lemo.offload_budget} in all")
        rows.append(("Offload", f"what layers save lies in host memory, {how}{much}"))
    return rows


def forward_words(lemo: LemoConfig) -> str:
    """Which tokens attend to which in a training step, in words."""
    if lemo.attention_forward == "exact":
        seen = "" if lemo.nearby is None else f", kept queries' gradients by kept keys and the last {lemo.nearby} tokens'"
        return f"dense forward pass{seen}"
    if lemo.attention_forward == "kept_keys":
        return f"every token attends to the kept tokens and to the last {lemo.nearby}"
    others = f", dropped ones to the last {lemo.nearby} tokens" if lemo.nearby else ""
    return f"kept tokens attend to kept tokens{others}"


def pattern_words(lemo: LemoConfig) -> str | None:
    """Which kept tokens attend to which, in words; `None` where all earlier ones do in every layer."""
    names = lemo.attention_pattern if isinstance(lemo.attention_pattern, list) else [lemo.attention_pattern]
    group = "a quarter of a document's" if lemo.group_size is None else f"{lemo.group_size}"
    words = {
        "shifted_groups": f"shifted groups of {group} kept tokens",
        "block_sparse": f"the {lemo.pattern_share:g} of the pairs of kept blocks that score highest",
    }
    found = [words[name] for name in words if name in names]
    by_layer = ", by layer" if len(set(names)) > 1 else " in every layer but the dense ones" if lemo.dense_layers else ""
    return f"{' and '.join(found)}{by_layer}" if found else None


def cost_rows(results: "RunResults") -> list[tuple[str, ...]]:
    """Memory and time: what they are, this run's and, where it has stock LoRA beside it, that one's and their ratio."""
    batch = f" of {results.batch} × {results.seq_len} tokens" if results.batch and results.seq_len else ""
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        (f"Saved for the backward pass by one forward pass{batch}", "saved_bytes", size),
        ("FLOPs of a forward and backward pass", "step_flops", flops),
        ("Time of a forward and backward pass, median", "step_seconds", "{:.2f} s".format),
        ("Peak GPU memory while training, weights included", "peak_gpu_bytes", size),
    ]
    rows: list[tuple[str, ...]] = []
    for label, name, shown in measures:
        own, stock = getattr(results, name), getattr(results.stock, name, None)
        if own is not None:
            beside = (shown(stock), f"{own / stock:.2f} of stock") if stock else ("", "") if results.stock else ()
            rows.append((label, shown(own), *beside))
    return rows


def comparison_rows(results: "RunResults") -> list[tuple[str, ...]]:
    """Perplexity: this run's, stock LoRA's and their difference."""
    rows: list[tuple[str, ...]] = []
    for each in results.stock.comparisons if results.stock else []:
        where = f"{each.steps} steps each" if each.equal == "steps" else f"{each.steps} steps against {each.stock_steps}"
        difference = f"{each.percent:+.2f} % ({each.low:+.2f} to {each.high:+.2f})"
        label = f"Perplexity at equal {each.equal}, {where} (difference with its 95 % interval)"
        rows.append((label, decimals(each.perplexity), decimals(each.stock_perplexity), difference))
    return rows


def flops(count: float) -> str:
    """Floating-point operations for people."""
    return f"{count / 1e9:.0f} G" if count < 1e13 else f"{count / 1e12:.0f} T"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 180:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def decimals(value: float | None) -> str:
    """Three decimals; nothing where nothing was measured."""
    return "" if value is None else f"{value:.3f}"


def cell(text: str) -> str:
    """Text that fits into one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "/")


def literal(value: Any) -> str:
    """A plain value as formatted Python code writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
