"""The tables of docs/paper_figures.md that have no picture."""

from collections.abc import Iterable, Mapping

from paper_data import Results

from lemo_hf.errors import LemoError
from lemo_hf.profiling.baselines.artifact_lemo import KEPT_CHANNELS
from lemo_hf.profiling.bench.table import NOT_MEASURED

TABLE_1 = {"llama2-7b": "Llama-2-7B", "llama3-8b": "Llama-3-8B", "mistral-7b": "Mistral-7B", "opt-6.7b": "OPT-6.7B"}
ATTENTION, MLP = ("q,k,v", "attention", "o_proj"), ("mlp",)
MEMORY_ALONE = f"Memory alone: {NOT_MEASURED}, nor is speed."
TIME_ALONE = f"Time alone: {NOT_MEASURED}, nor is memory."


def table_1(results: Results) -> str:
    """Memory at 4096 tokens: the paper's table, its logs, and ours."""
    paper = results.paper["paper"]["table1_memory_gb_at_4k"]
    lines = ["| GB at 4096 tokens | " + " | ".join(TABLE_1.values()) + " |", "| --- " + "| ---: " * len(TABLE_1) + "|"]
    for name in ("full", "lora", "longlora", "lemo"):
        lines.append(f"| paper, {name} | " + " | ".join(f"{value:.1f}" for value in paper[name]) + " |")
    for name in ("lora", "longlora", "lemo"):
        logged = {
            r["model"]: r["peak_allocated_mib"] for r in results.paper["memory"] if (r["method"], r["seq_len"]) == (name, 4096)
        }
        cells = [f"{logged[model] * 2**20 / 1e9:.1f}" if logged.get(model) else "-" for model in TABLE_1.values()]
        lines.append(f"| artifact's logs, {name} | " + " | ".join(cells) + " |")
    for method, words in results.words.items():
        found = [results.memory(model, 4096, method) for model in TABLE_1.values()]
        cells = ["-" if one is None else f"{one[0] / 1e9:.1f}{'' if one[1] else ' (est.)'}" for one in found]
        lines.append(f"| ours, {words} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"est.: estimated, no GPU run. {MEMORY_ALONE} {paper['note']}."])


def table_8(results: Results) -> str:
    """Parameters of a layer's predictor."""
    sizes = results.paper["paper"]["predictor_params_per_layer_m"]
    after = sum(sizes["after"]) / len(sizes["after"])
    lines = ["| predictor of a layer of width 4096 | parameters, millions |", "| --- | ---: |"]
    lines += [f"| paper, before pruning | {sizes['before']:.2f} |", f"| paper, after pruning, mean of 7 layers | {after:.2f} |"]
    lines += [f"| ours, {name} | {count / 1e6:.2f} |" for name, count in results.estimates["predictor_parameters"].items()]
    return "\n".join([*lines, "", "Ours after pruning at this width: unmeasured (needs the model's weights)."])


def savings(results: Results) -> str:
    """Average saving of attention's and the MLP's saved bytes, as the paper reports it with its Figure 14."""
    paper = results.paper["paper"]
    lines = ["| saved bytes less than stock LoRA | attention | MLP |", "| --- | ---: | ---: |"]
    for theirs, model in (("llama2-7b", "Llama-2-7B"), ("opt-6.7b", "OPT-6.7B")):
        attention, mlp = paper["avg_attention_memory_saving"][theirs], paper["avg_mlp_memory_saving"][theirs]
        lines.append(f"| paper, {model}, average | {attention:.1%} | {mlp:.1%} |")
        stock = results.estimate(model, 8192, "stock")["saved_by_part"]
        for method, words in [*results.words.items()][1:]:
            parts = results.estimate(model, 8192, method)["saved_by_part"]
            cells = [1 - _sum(parts, of) / _sum(stock, of) for of in (ATTENTION, MLP)]
            lines.append(f"| ours, {model} at 8192, {words} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |")
    return "\n".join(lines)


def mlp_in_words(results: Results) -> str:
    """Why the artifact saves more of the MLP than the paper reports, and unlike on the two models.

    Stock saves whole rows of the MLP's width a token: on Llama gate, its activation and up, on OPT the ReLU's output. The artifact
    saves a share of the channels of each of Llama's three, and on OPT of the ReLU's input and output.
    """
    rows = {"Llama-2-7B": (3, 3), "OPT-6.7B": (1, 2)}
    llama, opt = (1 - KEPT_CHANNELS * theirs / stock for stock, theirs in rows.values())
    lengths = {model: {row["seq_len"] for row in results.estimates["rows"] if row["model"] == model} for model in rows}
    for model, expected in zip(rows, (llama, opt), strict=True):
        for seq_len in lengths[model]:
            stock, theirs = (
                results.estimate(model, seq_len, name)["saved_by_part"]["mlp"] for name in ("stock", "lemo-artifact")
            )
            if abs(1 - theirs / stock - expected) > 0.002:
                raise LemoError(
                    f"the page's account of the artifact's MLP does not fit the estimates; {1 - theirs / stock:.1%} on {model} at {seq_len}, "
                    f"{expected:.1%} expected; correct paper_tables.mlp_in_words"
                )
    paper = results.paper["paper"]["avg_mlp_memory_saving"]
    return (
        f"The artifact's MLP row: its code caches a fifth of the *channels*, of all tokens. Stock LoRA saves three rows of Llama's MLP "
        f"a token (gate, its activation, up), of which a fifth each stays: {llama:.0%} less. Of OPT's it saves one (the ReLU's output), where "
        f"the artifact saves a fifth of the ReLU's input and of its output: {opt:.0%} less. Neither depends on the length, so no mean over "
        f"lengths gives the paper's {paper['llama2-7b']:.1%} and {paper['opt-6.7b']:.1%}: what these are an average of is not on record. Ours keep "
        "half of the *tokens*, and of Llama's MLP only gate and up (the activation is computed again): a third of the bytes; of OPT's half."
    )


def _sum(parts: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(parts.get(name, 0) for name in names)
