"""`lemo bench` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from ...errors import LemoError


def bench(
    model: Annotated[
        str, typer.Option(help="A shape's name such as Llama-3-8B or python-llama-4m, a config.json, a folder, or a Hub id.")
    ] = "python-llama-4m",
    seq_len: Annotated[str, typer.Option(help="Tokens of a sample; several with commas.")] = "4096",
    methods: Annotated[
        str, typer.Option(help="Methods with commas, NAME or NAME@SHARE; all of them: all. They are listed above.")
    ] = "stock-bf16,lemo-exact,lemo-sparse",
    steps: Annotated[int, typer.Option(help="Timed steps in each process.")] = 3,
    repeats: Annotated[int, typer.Option(help="Processes of each method, taking turns.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Samples of a step.")] = 1,
    dtype: Annotated[str, typer.Option(help="Float type of the base model; bfloat16 on CUDA, float32 on a CPU if empty.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; CUDA where there is one if empty.")] = "",
    counts_only: Annotated[
        bool, typer.Option("--counts-only", help="Bytes and FLOPs from fake tensors; nothing is run, nothing is timed.")
    ] = False,
    perplexity: Annotated[
        Path | None, typer.Option(help="A quickstart's result: its dense perplexities go beside rows of the same configuration.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON; an unfinished one is gone on with.")] = None,
    table: Annotated[list[Path] | None, typer.Option(help="Run nothing; a table of this result; may be repeated.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="With --table: commits, machines and settings may differ.")] = False,
) -> None:
    """Memory, FLOPs and speed of training methods side by side, on random weights of a model's shape.

    Each method runs in a process of its own; they take turns, and medians are quoted with the fastest and the slowest step. Memory
    is the allocator's peak on CUDA and the most bytes of tensors alive on a CPU. A row without a measured dense perplexity says so.

    \b
    Methods (SHARE: share of tokens kept, 0.5 if not given):
      stock                        LoRA as PEFT makes it: float32 adapters
      stock-bf16                   adapters in the base model's type, as in all that follow but lemo-artifact
      checkpointing                stock with activation checkpointing
      liger, liger-checkpointing   with Liger's kernels (CUDA)
      liger-checkpointing-offload  and saved activations in host memory (CUDA)
      longlora                     shifted sparse attention; longlora-float32
      lemo-artifact                LeMo as the paper's artifact has it
      random-ltd[@SHARE]           layers that drop random blocks
      tokentune[@SHARE]            gradients of random tokens only
      lemo-exact[@SHARE], lemo-sparse[@SHARE]
                                   ours; with -rows: kept-row checkpointing, -offload: trl's offload (CUDA),
                                   -uniform-offload, -sensitive-offload: ours,
                                   -float32: PEFT's default adapters
      lemo-keys[@SHARE]            every token sees kept ones and the 256 latest; also -rows, -float32
      lemo-sparse-nearby           dropped tokens see the 128 before them; also -rows, -float32
      lemo-sparse-groups, lemo-sparse-blocks
                                   with a pattern among kept tokens; also -rows

    \b
    Examples:
      lemo bench --methods stock,longlora,lemo-exact@0.3
      lemo bench --model Llama-3-8B --seq-len 8192,65536 --methods all --out results.json
      lemo bench --model Llama-3-8B --seq-len 65536 --methods all --counts-only
      lemo bench --table results.json
    """  # noqa: D301 (\b is for the help formatter)
    from ...hub.lemo_files import read_json
    from .table import bench_table, merged, phase_table, source_line

    if table:
        documents = [read_json(path) for path in table]
        rows = merged(documents, mixed)
    else:
        from .run import BenchOptions, run_bench

        lengths = _lengths(seq_len)
        options = BenchOptions(model, lengths, methods, steps, repeats, batch_size, dtype, device, counts_only, perplexity)
        documents = [run_bench(options, out, lambda line: typer.echo(line, err=True))]
        rows = documents[0]["rows"]
    typer.echo(bench_table(rows))
    if phases := phase_table(rows):
        typer.echo(f"\nSeconds by phase of a step that is slowed by timing every operator:\n\n{phases}")
    for document in documents:
        typer.echo(f"\n{source_line(document)}")
    if any("failed" in row for row in rows):
        raise typer.Exit(1)


def _lengths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 1 for part in parts):
        raise LemoError(f"not a list of lengths; {text!r}; write --seq-len 4096,8192")
    return tuple(int(part) for part in parts)
