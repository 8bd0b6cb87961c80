"""What docs/paper_figures.md says of Table 3 and Figures 4, 7, 16 and 17: captions with figures of the JSON, and the table."""

from collections.abc import Iterable, Mapping
from typing import Any

from paper_plots import tokens
from sparsity_plots import READINGS, Models


def with_predictors(models: Models) -> tuple[str, Mapping[str, Any]] | None:
    """The first model whose predictors were measured."""
    return next(((name, model) for name, model in models.items() if "prediction" in model), None)


def row_at(model: Mapping[str, Any], length: int) -> Mapping[str, Any]:
    """A model's row of Table 3."""
    return next(row for row in model["sparsity"] if row["length"] == length)


def table_3(models: Models, paper: Mapping[str, Any]) -> str:
    """Share below the criterion by length, ours by reading."""
    lengths = sorted({*paper["seq_len"], *(row["length"] for model in models.values() for row in model["sparsity"])})
    lines = ["| share below 0.3 of the maximum | " + " | ".join(tokens(length) for length in lengths) + " |"]
    lines.append("| --- " + "| ---: " * len(lengths) + "|")
    for key, words in (("llama2", "Llama-2-7B"), ("llama3", "Llama-3-8B")):
        known = dict(zip(paper["seq_len"], paper[key], strict=True))
        lines.append(_line(f"paper, {words}", (f"{known[length]:.3f}" if length in known else "-" for length in lengths)))
    for name, model in models.items():
        rows = {row["length"]: row for row in model["sparsity"]}
        for reading, words in READINGS.items():
            cells = (_spread(rows[length][reading]) if length in rows else "-" for length in lengths)
            lines.append(_line(f"ours, {name}, {words}", cells))
    return "\n".join(lines)


def _line(head: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join((head, *cells)) + " |"


def _spread(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.3f}" + ("" if found["spread"] is None else f" ± {found['spread']:.3f}")


def about(result: Mapping[str, Any]) -> str:
    """Where the figures come from."""
    config, texts = result["config"], []
    for name, model in result["models"].items():
        texts.append(
            f"{name} ({model['layers']} layers, trained at {tokens(model['own_context'])}; {model['date']}, commit {model['commit']})"
        )
    windows = {row["length"]: row["windows"] for row in next(iter(result["models"].values()))["sparsity"]}
    return (
        f"Our models: {'; '.join(texts)}. Text: {len(next(iter(result['models'].values()))['documents'])} long files of "
        f"{' and '.join(config['packages'])}, on which neither base nor predictors were trained, in "
        f"{', '.join(f'{count} windows of {tokens(length)}' for length, count in windows.items())}. Mean over layers and documents, ± the "
        "standard deviation over documents. Longer contexts than a model's own are reached by YaRN, without training. The paper's models "
        "are more than a thousand times larger; on which text is not on record. Repeat: `python benchmarks/sparsity_figures.py`."
    )


def sparsity_by_length(result: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The caption of Table 3, and the table."""
    models, paper = result["models"], figures["table3_sparsity_ratio"]
    texts = [
        about(result),
        f"On record of the paper's table is: {paper['definition']}; which scores they are, and the maximum of what, is not. So ours are "
        "every reading that we know of: each head's softmax probabilities against the largest of their query; token scores s, mean over "
        "heads of the positive part, and their maxima S over pairs of blocks of 64, against the largest of a layer's map; informativeness "
        "of tokens (mean s over partners) and of blocks (I), against the document's largest.",
    ]
    shown = result["config"]["shown_length"]
    for name, model in models.items():
        first, last = row_at(model, shown), model["sparsity"][-1]
        low, high = tokens(shown), tokens(last["length"])
        layers = last["block_scores"]["by_layer"]
        before = f"go from {first['block_scores']['mean']:.3f} at {low} to" if last is not first else "are"
        texts.append(
            f"**{name}.** Block scores below the criterion {before} {last['block_scores']['mean']:.3f} at {high} (by layer {min(layers):.2f} to {max(layers):.2f}), where the paper's models go "
            f"from {paper['llama2'][0]:.3f} to {paper['llama2'][-1]:.3f} and from {paper['llama3'][0]:.3f} to {paper['llama3'][-1]:.3f}. Of "
            f"softmax probabilities {last['probabilities']['mean']:.1%}, of token scores {last['token_scores']['mean']:.1%} are below at {high}: "
            f"attention is sparse by token pairs. But summed over a token's partners it is nearly even: {first['tokens']['mean']:.1%} of tokens and "
            f"{first['blocks']['mean']:.1%} of blocks are below at {low}; I varies by {first['relative_spread']['mean']:.1%} of its mean within a "
            f"document (standard deviation; by layer {min(first['relative_spread']['by_layer']):.1%} to "
            f"{max(first['relative_spread']['by_layer']):.1%}). That tokens themselves are uninformative, which is what the paper builds on, "
            "this model does not show."
        )
    texts.append(table_3(models, paper))
    return "\n\n".join(texts)


def score_maps(result: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The caption of Figure 4."""
    texts = [
        "S of blocks of 64, one window of 4K of two files, three layers; each map has a scale of its own. Bright diagonals are distances, "
        "which the rotary positions make: the same in every input. Bright columns, blocks that many later ones attend to, are what differs between inputs."
    ]
    for name, model in result["models"].items():
        found = model["agreement"]
        between = found["between_documents"]
        others = [value for a, row in enumerate(found["between_layers"]) for b, value in enumerate(row) if a != b]
        texts.append(
            f"**{name}.** Of the half of the blocks that a layer keeps on one input, it keeps {sum(between) / len(between):.2f} on another input "
            f"(by layer {min(between):.2f} to {max(between):.2f}), and another layer keeps {sum(others) / len(others):.2f} on the same input "
            f"({min(others):.2f} to {max(others):.2f}); chance is 0.48. The paper's claim, that tokens matter differently by input and by "
            "layer, holds in part: a good deal is the place in the document."
        )
    return "\n\n".join(texts)


def unimportant_blocks(result: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The caption of Figure 7."""
    texts = [
        "What the paper calls important is not on record. By Table 3's criterion a token is important here if its score s with some other token "
        "reaches 0.3 of the layer's largest. In the picture the tokens of a window with the highest informativeness are, so many per cent "
        "of them; the thick line is what blocks would lack if they lay anywhere."
    ]
    for name, model in result["models"].items():
        found = model["unimportant_blocks"]
        sizes = ", ".join(f"{size}: {each['mean']:.1%}" for size, each in found["by_criterion"].items())
        five, ten = (found["by_share"][share] for share in ("0.05", "0.1"))
        texts.append(
            f"**{name}.** By the criterion {found['important_tokens']['mean']:.1%} of tokens are important, and of blocks are without any, by block "
            f"size: {sizes}. With 5 % of tokens called important {five['mean']:.0%} ± {five['spread']:.0%} of blocks of 64 hold none, with 10 % "
            f"{ten['mean']:.0%} ± {ten['spread']:.0%}; thrown anywhere {found['by_chance']['0.05']:.1%} and {found['by_chance']['0.1']:.1%}. So important tokens "
            "lie together, but blocks without any are a minority unless few tokens count."
        )
    return "\n\n".join(texts)


def predicted_maps(result: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The caption of Figure 16."""
    found = with_predictors(result["models"])
    if found is None:
        return ""
    name, model = found
    return (
        f"The predictors shipped with the {name}, on {model['maps'][0]['document']}, which they were not fitted on; each map has a scale of its own. They follow the diagonals (their distance "
        "profile) and much of the columns, and smooth single pairs away. Only the order of blocks by row and column sums decides what is kept."
    )


def predicted_informativeness(result: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The caption of Figure 17."""
    found = with_predictors(result["models"])
    if found is None:
        return ""
    name, model = found
    recall, positions, chance = (model["prediction"][key] for key in ("recall", "recall_of_positions", "recall_of_chance"))
    without = [other for other in result["models"] if "prediction" not in result["models"][other]]
    rest = f" No predictors are fitted to: {', '.join(without)}." if without else ""
    return (
        f"Recall at kept share 0.5, first and last block left out: {_spread(recall)} (by layer {min(recall['by_layer']):.2f} to "
        f"{max(recall['by_layer']):.2f}); positions alone, mean I by place in the other documents, find {_spread(positions)}, chance {chance:.3f}. The paper "
        f"reports {figures['predictor_recall']:.2%}: ours miss it. Below: I along one window of 4K by the {name}; it varies by a few per cent, so that half of the blocks "
        f"lie close to the cut ([experiments](experiments/predictors.md) has what any predictor could reach).{rest}"
    )
