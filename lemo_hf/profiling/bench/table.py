"""Results of `lemo bench` as tables. Memory and speed never stand alone: every row says its dense perplexity, or that it was not
measured for the configuration; rows of different commits or machines stand in one table only if that is asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import LemoError
from ...models.lemo_config import LemoConfig

NOT_MEASURED = "perplexity not measured for this configuration"
_COLUMNS = ("method", "adapters", "peak memory", "saved for backward", "TFLOP", "dense perplexity")
_TIMES = ("s a step [fastest, slowest]", "tokens/s")


def with_perplexity(row: Mapping[str, Any], result: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """The dense perplexity of a row's configuration from a quickstart's result; `None` if that is not its configuration.

    One configuration: model, tokens, batch, float types, rank and targets of the adapters, and for LeMo every field of its
    config. A baseline is none of the quickstart's.

    Args:
        row: A row of `lemo bench`.
        result: The quickstart's result file.
        source: Its name, for the reader.
    """
    config, settings = result.get("config", {}), row.get("settings") or {}
    same = settings and (
        str(row["model"]).rpartition("/")[2] == config.get("base")
        and settings["seq_len"] == config.get("tokens")
        and settings["batch_size"] == config.get("batch")
        and config.get("dtype") == "float32 base and adapters, no autocast"
        and settings["dtype"] == settings["adapter_dtype"] == "float32"
        and not settings["autocast"]
        and config.get("lora") == f"r={settings['lora_r']} on q, k, v, o"
        and not settings["targets"]
        and settings["baseline"] is None
        and settings["method"] in ("stock", "lemo")
    )
    if not same:
        return None
    wanted = LemoConfig.from_dict(settings["lemo"]) if settings["method"] == "lemo" else None
    for arm, block in config.get("arms", {}).items():
        if (None if block is None else LemoConfig.from_dict(block)) == wanted:
            return {
                "dense": result["arms"][arm]["perplexity"]["equal_steps"],
                "source": f"{source}, commit {result.get('commit') or 'unknown'}, arm {arm}, {config['steps']} steps",
            }
    return None


def merged(documents: Sequence[dict[str, Any]], mixed: bool = False) -> list[dict[str, Any]]:
    """The rows of several results.

    Args:
        documents: Result files of `lemo bench`.
        mixed: Whether commits, machines, batch sizes, float types and devices may differ.

    Raises:
        LemoError: If a document is no such result, or they differ and `mixed` is not set.
    """
    for document in documents:
        if document.get("kind") != "lemo bench" or "rows" not in document:
            raise LemoError(f"file is no result of lemo bench; it has {sorted(document)[:6]}; give what --out wrote")
    for name in ("commit", "machine"):
        found = list(dict.fromkeys(str(document.get(name)) for document in documents))
        if len(found) > 1 and not mixed:
            raise LemoError(f"results of different {name}s in one table; {' and '.join(found)}; measure anew, or add --mixed")
    for name in ("batch_size", "dtype", "device"):
        found = list(
            dict.fromkeys(str(said) for document in documents if (said := document.get("config", {}).get(name)) is not None)
        )
        if len(found) > 1 and not mixed:
            raise LemoError(f"results of another {name} in one table; {' and '.join(found)}; measure anew, or add --mixed")
    return [row | {"commit": document["commit"]} for document in documents for row in document["rows"]]


def peak_bytes(row: Mapping[str, Any]) -> int | None:
    """A row's peak: allocated on CUDA, the most bytes of tensors alive on a CPU, or as estimated."""
    for name in ("peak_allocated_bytes", "live_peak_bytes", "estimated_bytes"):
        found = row.get(name) or row.get("summary", {}).get(name)
        if found:
            return int(found)
    return None


def is_estimated(row: Mapping[str, Any]) -> bool:
    """Whether a row's peak is an estimate."""
    return peak_bytes(row) is not None and peak_bytes({**row, "estimated_bytes": None}) is None


def bench_table(rows: Sequence[Mapping[str, Any]], against: str | None = None) -> str:
    """Rows as Markdown, one table a model and length, with ratios against the table's first method. Rows whose adapters have another
    float type are held against the stock row with such adapters, or against nothing: a float type is no merit of a method.

    Args:
        rows: Of one result, or as [`merged`] gives them.
        against: Name of the method that comes first; as the rows have it if `None`, or if there is no such row.
    """
    tables = []
    for model, seq_len in dict.fromkeys((row["model"], row["seq_len"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["seq_len"]) == (model, seq_len)]
        chosen.sort(key=lambda row: row["method"] != against)
        references = {chosen[0]["adapters"]: chosen[0]}
        for row in chosen:
            if row["method"] in ("stock", "stock-bf16"):
                references.setdefault(row["adapters"], row)
        notes = list(dict.fromkeys(row["perplexity"]["source"] for row in chosen if row.get("perplexity")))
        lines = [f"{model}, {seq_len} tokens; in parentheses against {_in_words(chosen, references)}", ""]
        timed = any(row.get("summary") for row in chosen)
        reserved = any(row.get("summary", {}).get("peak_reserved_bytes") for row in chosen)
        columns = [*_COLUMNS[:3], *(("reserved",) if reserved else ()), *_COLUMNS[3:-1], *(_TIMES if timed else ()), _COLUMNS[-1]]
        lines += ["| " + " | ".join(columns) + " |", "| --- | --- " + "| ---: " * (len(columns) - 2) + "|"]
        both = len({is_estimated(row) for row in chosen if peak_bytes(row)}) > 1
        unit = (
            30
            if max((size for row in chosen for size in (peak_bytes(row), row.get("saved_bytes")) if size), default=0)
            >= 10 * 2**30
            else 20
        )
        for row in chosen:
            cells = [row["words"], row["adapters"], *_costs(row, references.get(row["adapters"], {}), unit, both, reserved)]
            cells += _times(row, references.get(row["adapters"], {})) if timed else []
            lines.append("| " + " | ".join([*cells, _perplexity(row, notes)]) + " |")
        said = [f"[{number}] {note}." for number, note in enumerate(notes, 1)]
        said += (
            ["Not measured: no training run of exactly this configuration."]
            if any(not row.get("perplexity") for row in chosen)
            else []
        )
        said += [] if timed else ["No step was run, so nothing here says how fast one is."]
        tables.append("\n".join([*lines, "", " ".join(said)]))
    return "\n\n".join(tables)


def _in_words(rows: Sequence[Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]) -> str:
    """What ratios are against, by the float type of the adapters where there are several."""
    text = str(rows[0]["words"])
    for adapters in dict.fromkeys(row["adapters"] for row in rows if row["adapters"] != rows[0]["adapters"]):
        found = references.get(adapters)
        against = f"against {found['words']}" if found else "against nothing, for want of a stock row with such adapters"
        text += f"; rows with {adapters} adapters {against}"
    return text


def _perplexity(row: Mapping[str, Any], notes: Sequence[str]) -> str:
    found = row.get("perplexity")
    return "not measured" if not found else f"{found['dense']:.3f} [{notes.index(found['source']) + 1}]"


def _fell_out(row: Mapping[str, Any]) -> bool:
    return "out_of_memory" in row or "failed" in row


def _costs(row: Mapping[str, Any], first: Mapping[str, Any], unit: int, both: bool, reserved: bool) -> list[str]:
    """Memory and FLOPs.

    Args:
        row: Of the table.
        first: What it is held against.
        unit: Power of two of the table's unit of memory.
        both: Whether the table has measured and estimated peaks, so that each estimate must say so.
        reserved: Whether it shows what CUDA's allocator held beside what it had given out.
    """
    if _fell_out(row):
        return ["out of memory" if "out_of_memory" in row else "failed", "-", "-", *(["-"] if reserved else [])]
    cells = []
    held = [(one.get("summary", {}).get("peak_reserved_bytes") for one in (row, first))] if reserved else []
    for value, base, of_peak in (
        (peak_bytes(row), peak_bytes(first), True),
        *((*pair, False) for pair in held),
        (row.get("saved_bytes"), first.get("saved_bytes"), False),
    ):
        shown = "-" if value is None else f"{value / 2**30:.1f} GiB" if unit == 30 else f"{value / 2**20:.0f} MiB"
        shown += " est." if of_peak and both and is_estimated(row) else ""
        cells.append(shown + (f" ({value / base:.2f})" if value and base else ""))
    flops, base_flops = row.get("flops"), first.get("flops")
    cells.append("-" if not flops else f"{flops / 1e12:.3g}" + (f" ({flops / base_flops:.2f})" if base_flops else ""))
    return cells


def _times(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    timed, base_timed = row.get("summary"), first.get("summary")
    if not timed or _fell_out(row):
        return ["-", "-"]
    times = f"{timed['median_seconds']:.3g} [{timed['fastest_seconds']:.3g}, {timed['slowest_seconds']:.3g}]"
    if base_timed:
        times += f" ({base_timed['median_seconds'] / timed['median_seconds']:.2f}x)"
    return [times, f"{timed['tokens_per_second']:.0f}"]


def phase_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of a step by phase as Markdown; empty if nothing was timed.

    Timing every operator slows a step: its sum is larger than the time in [`bench_table`].
    """
    timed = [row for row in rows if row.get("summary", {}).get("phases")]
    if not timed:
        return ""
    # Results of other versions may have other phases.
    phases = list(dict.fromkeys(phase for row in timed for phase in row["summary"]["phases"]))
    heads = [{"between": "between operators"}.get(phase, phase) for phase in phases]
    lines = ["| method, tokens | " + " | ".join(heads) + " |", "| --- " + "| ---: " * len(phases) + "|"]
    for row in timed:
        spent = row["summary"]["phases"]
        cells = (f"{spent[phase]:.3f}" if phase in spent else "-" for phase in phases)
        lines.append(f"| {row['words']}, {row['seq_len']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def source_line(document: Mapping[str, Any]) -> str:
    """Where a result comes from and how to repeat it: by the document's `repeat`, or by `lemo bench` with its config."""
    machine, config, versions = document["machine"], document["config"], document["versions"]
    where = machine if isinstance(machine, str) else f"{machine.get('gpu') or machine['processor']}, {machine['threads']} threads"
    options = f"--model {config['model']} --seq-len {','.join(map(str, config['seq_lens']))} --methods {config['methods']}"
    counted = (
        " --counts-only"
        if config["device"].startswith("estimated")
        else f" --steps {config['steps']} --repeats {config['repeats']}"
    )
    command = document.get("repeat") or f"lemo bench {options}{counted}"
    peak = {"cpu": "the most bytes of tensors alive", "cuda": "the allocator's"}.get(config["device"], "as estimated")
    return (
        f"{document['date']}, commit {document['commit']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}, machine: {where}; batch {config['batch_size']}, {config['dtype']} base, no autocast, LoRA "
        f"{config['lora']}, random weights; peak memory: {peak}. Repeat: `{command}`."
    )
