"""The `lemo` command.

Bad input of any kind ends in one line on stderr, `fact; value; fix`, and exit code 2.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from .errors import LemoError
from .models.lemo_config import LemoConfigError
from .profiling.bench.command import bench

if TYPE_CHECKING:
    from .evaluation.perplexity import Perplexity

app = typer.Typer(
    help="Long-context LoRA fine-tuning that leaves uninformative tokens out of each layer's computation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: it reads the same in a pipe, a log and a narrow terminal
)


@app.callback()
def _lemo() -> None:
    """Long-context LoRA fine-tuning that leaves uninformative tokens out of each layer's computation."""


class _TrainCommand(TyperCommand):
    """Adds the recipe's fields to the help; they are read from dataclasses whose import takes seconds."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from .recipe import describe_fields

        super().format_epilog(ctx, formatter)
        formatter.write(f"\nRecipe fields, in the file as `field: value` and here as `--field value`:\n\n{describe_fields()}\n")


@app.command(cls=_TrainCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Flat YAML file, one `field: value` a line.", show_default=False)],
) -> None:
    """Fine-tune a model as a recipe says.

    Any field of the recipe can be overridden: --field value, or --field=value. A list is written with commas or as [a, b].

    \b
    Examples:
      lemo train recipes/llama_4m_python_4096.yaml
      lemo train recipes/llama_4m_python_4096.yaml --keep_ratio 0.3 --output_dir outputs/r03
      lemo train recipes/llama_4m_python_4096.yaml --resume_from_checkpoint last
      lemo train recipes/llama_4m_python_4096.yaml --resume_from_checkpoint auto     (in a job that may be requeued)

    \b
    Writes to output_dir (outputs/<recipe's name> if not given):
      adapter_model.safetensors, adapter_config.json   the PEFT adapter; loads without lemo_hf
      lemo_predictors.safetensors, lemo_config.json    for going on with LeMo from here
      README.md                                        the model card; what you add to it stays
      results.json, recipe.yaml                        what was measured; what gives this run again
    """  # noqa: D301 (\b is for the help formatter)
    from .recipe import read_recipe
    from .recipe.running import run_recipe
    from .training.scale_out.processes import Processes

    checked = read_recipe(recipe, _overrides(context.args))
    results = run_recipe(checked)
    if Processes().rank:
        return  # the first of several processes says it
    for label, measured in (("before", results.perplexity_before), ("after", results.perplexity_after)):
        if measured is not None:
            typer.echo(f"dense perplexity {label}: {measured}")
    typer.echo(f"{results.steps} steps in {results.train_seconds:.0f} s; adapter and card in {checked.output_dir}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Output folder of a run, or a checkpoint in it.", show_default=False)],
    to: Annotated[
        Literal["adapter", "merged", "remote-code"] | None,
        typer.Option(help="What to make of it; see above.", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The new folder; RUN-TO beside the run if not given.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to the Hub as USER/NAME, private.", metavar="USER/NAME")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: let everybody see it.")] = False,
    update: Annotated[bool, typer.Option("--update", help="With --push: replace what lies there, by a commit.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder of the base model, if not the one that the adapter names.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Float type to merge in and save; auto is the base checkpoint's."),
    ] = "auto",
) -> None:
    """Make something of a run that others can load, and upload it to the Hub.

    \b
    --to adapter       the PEFT adapter with LeMo's predictors and settings: small; loads in transformers + peft on its
                       base model, and LeMo training goes on from it
    --to merged        a stock checkpoint with the adapter added into the weights: needs nothing but transformers (or vLLM,
                       llama.cpp, ...)
    --to remote-code   the same weights as a LeMo model with its code and predictors: trains sparsely without lemo_hf, by
                       AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True); evaluates as the stock model does

    Each comes with tokenizer and model card, and appears whole or not at all. --push asks the Hub for permission before any work
    is done; log in with `hf auth login`, or set HF_TOKEN. A folder whose upload failed is pushed again without --to.

    \b
    Examples:
      lemo export outputs/r03 --to merged
      lemo export outputs/r03/checkpoint-200 --to adapter --output adapters/r03-early
      lemo export outputs/r03 --to remote-code --push me/llama-32k
      lemo export outputs/r03-remote-code --push me/llama-32k      (again, after the connection was lost)
    """  # noqa: D301
    if to is None and push is None:
        raise LemoError(f"nothing to do with the run; {str(run)!r}; add --to adapter, --to merged or --to remote-code")
    for name, given in (("--public", public), ("--update", update)):
        if given and push is None:
            raise LemoError(f"{name} is about the Hub; nothing is pushed; add --push USER/NAME")

    from .hub.export import export_run, exported_folder, local_base
    from .hub.push import push_folder, writable_repository

    repository = writable_repository(push, public, update) if push else None
    if to is None:
        folder = exported_folder(run)
    else:
        folder = export_run(run, to, output, base, dtype, repository.repo_id if repository else None)
        typer.echo(f"{to} in {folder}")
    if repository is not None:
        local = local_base(folder)
        if local is not None:
            typer.echo(f"base model {local} is not on the Hub: nobody else can load the adapter; push it with --to merged too")
        typer.echo(f"{push_folder(folder, repository)} ({'public' if repository.public else 'private'})")


@app.command()
def eval(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model or adapter.", show_default=False)],
    data: Annotated[list[str] | None, typer.Option(help="Text or .jsonl file, or a folder of them; may be repeated.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of a data set, instead of --data.")] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Its configuration.")] = None,
    split: Annotated[str, typer.Option(help="Its split.")] = "test",
    python: Annotated[
        list[str] | None, typer.Option(help="Installed Python package, instead of --data; may be repeated.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column or JSONL field that holds the text.")] = "text",
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample; the model's context, at most 4096, if not given.")
    ] = None,
    layout: Annotated[
        Literal["packed", "windows"], typer.Option(help="packed: documents one after the other; windows: one document a sample.")
    ] = "packed",
    max_samples: Annotated[int, typer.Option(help="Samples at most, taken evenly from the text.", min=1)] = 32,
    sparse: Annotated[bool, typer.Option("--sparse", help="Also the sparse forward's perplexity, which is optimistic.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON too.")] = None,
) -> None:
    """Perplexity of a model or adapter on text.

    The number that counts is the dense one: ordinary attention over every token, as the model is served. --sparse adds that of
    the training-time forward. It is optimistic, because a block is kept for what later tokens see in it, and is labelled so.
    The interval is a 95 % confidence interval over documents. Weights are float32 on a CPU, in the checkpoint's dtype elsewhere.

    \b
    Examples:
      lemo eval outputs/llama_4m_python_4096 --python accelerate
      lemo eval outputs/llama_4m_python_4096 --data notes.txt --data more/ --seq-len 2048 --sparse
      lemo eval meta-llama/Meta-Llama-3-8B --dataset emozilla/pg19 --split test --seq-len 8192
    """  # noqa: D301
    given = [name for name, value in (("--data", data), ("--dataset", dataset), ("--python", python)) if value]
    if len(given) != 1:
        raise LemoError(
            f"lemo eval reads one of --data, --dataset and --python; got {' and '.join(given) or 'none of them'}; "
            "give exactly one, such as --python accelerate"
        )

    from .evaluation.perplexity import dense_perplexity, sparse_perplexity
    from .hub.lemo_files import write_json
    from .loading import load_saved_model
    from .profiling.provenance import provenance
    from .recipe import DataFields
    from .recipe.samples import read_documents
    from .text_data import pack_documents, spread_samples

    text = DataFields(
        seq_len=seq_len or 0,
        data_files=data,
        dataset=dataset,
        dataset_config=dataset_config,
        dataset_split=split,
        python_packages=python,
        text_field=text_field,
    )
    documents = read_documents(text)
    loaded, tokenizer = load_saved_model(model, sparse)
    context = loaded.config.max_position_embeddings
    length = seq_len or min(context, 4096)
    if length > context:
        raise LemoError(f"seq_len {length} is longer than the model's context of {context}; {model!r}; lower --seq-len")
    samples = spread_samples(pack_documents(tokenizer, documents, length, layout), max_samples)
    dtype = str(loaded.dtype).removeprefix("torch.")
    shown, figures = _figures(dense_perplexity(loaded, samples, description="dense"))
    typer.echo(f"dense perplexity at {length} tokens, {dtype}: {shown}")
    if sparse:
        shown, sparse_figures = _figures(sparse_perplexity(loaded, samples, description="sparse"))
        figures |= sparse_figures
        typer.echo(f"sparse-forward perplexity, optimistic (selection looks ahead): {shown}")
    if output is not None:
        about = {"model": model, "data": text.source, "seq_len": length, "layout": layout, "dtype": dtype}
        write_json(output, {**about, **figures, "provenance": provenance()})


def _figures(measured: "Perplexity") -> tuple[str, dict[str, Any]]:
    """What the perplexity metric makes of measured losses, with its interval: for people, and as JSON types."""
    from .evaluation.perplexity_metric import PerplexityMetric
    from .hub.model_card import Interval

    metric, name = PerplexityMetric(measured.forward), f"{measured.forward}_perplexity"
    metric.add_batch(predictions=measured.nll_sums, references=measured.token_counts)
    found = metric.compute()
    interval = dataclasses.replace(Interval.of(measured), value=found[name], tokens=found["tokens"])
    return str(interval), {**found, name: dataclasses.asdict(interval)}


@app.command()
def estimate(
    model: Annotated[
        str,
        typer.Option(
            help="A shape's name such as Llama-3-8B, a config.json, a folder with one, or a Hub id.", show_default=False
        ),
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens of a sample.", min=1, show_default=False)],
    method: Annotated[
        str, typer.Option(help="stock, checkpointing, liger, liger+checkpointing or lemo; all of them side by side: all.")
    ] = "lemo",
    form: Annotated[Literal["exact", "kept_keys", "sparse"], typer.Option(help="LeMo's attention form.")] = "exact",
    keep: Annotated[str, typer.Option(help="LeMo's kept share of blocks, or auto: the largest that fits.")] = "0.5",
    checkpoint: Annotated[Literal["none", "kept_rows"], typer.Option(help="LeMo's checkpointing.")] = "none",
    selection: Annotated[Literal["sampled", "ratio"], typer.Option(help="LeMo's selection.")] = "sampled",
    offload: Annotated[
        Literal["none", "uniform", "sensitive"], typer.Option(help="LeMo's offload to host memory; needs --gpu.")
    ] = "none",
    offload_budget: Annotated[
        str | None, typer.Option(help="Bytes to offload, such as 40GiB, or all; what hides if empty.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of a step.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="Float type of the base model: bfloat16, float16 or float32.")] = "bfloat16",
    adapter_dtype: Annotated[str, typer.Option(help="Float type of the adapters; float32 is PEFT's default.")] = "float32",
    autocast: Annotated[bool, typer.Option("--autocast", help="The forward runs under bfloat16 autocast.")] = False,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 8,
    targets: Annotated[
        str, typer.Option(help="Adapted layers, with commas, or all-linear; attention's projections if empty.")
    ] = "",
    gpu: Annotated[str | None, typer.Option(help="Card to fit and to time, such as H100 or RTX-4090.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory to fit, such as 80GiB; the card's own if not given.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the estimate here as JSON too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw every method's memory by length here, as PNG.")] = None,
) -> None:
    """Memory, FLOPs and time of a training step, from a model's config alone: no weights, no GPU.

    With --gpu or --gpu-memory also whether it fits, the longest sequence that does, and the kept share that makes it fit. Runs
    the real code on fake tensors; docs/memory.md says what is exact and what is assumed.

    \b
    Examples:
      lemo estimate --model Llama-3-8B --seq-len 65536 --gpu H100
      lemo estimate --model Llama-3-8B --seq-len 65536 --checkpoint kept_rows --keep auto --gpu-memory 40GiB
      lemo estimate --model Qwen3-8B --seq-len 32768 --method all --gpu A100 --plot memory.png
    """  # noqa: D301
    from .profiling.estimate.command import run_estimate

    lemo: dict[str, str | None] = {
        "attention_forward": form,
        "keep_ratio": keep,
        "checkpoint": checkpoint,
        "selection": selection,
    }
    lemo |= {"offload": offload, "offload_budget": offload_budget}
    step = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "dtype": dtype,
        "adapter_dtype": adapter_dtype,
        "autocast": autocast,
        "lora_r": lora_r,
        "targets": tuple(name.strip() for name in targets.split(",") if name.strip()),
    }
    typer.echo(run_estimate(model, method, lemo, step, gpu, gpu_memory, json, plot))


app.command()(bench)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a run, finished or not.", show_default=False)],
    baseline: Annotated[Path | None, typer.Option(help="Output folder of a run to compare with.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page; report.html in the run's folder if not given.")] = None,
) -> None:
    """Show a run as one HTML page: losses, tokens kept, recall, block scores, memory, time.

    The page is one file without script; it loads nothing, prints well and can be sent. A baseline is a run on the same base model
    and sequence length, with LeMo or dense; losses are then paired at equal steps and at equal time. A run that was stopped, or
    still trains, is shown as far as it got.

    \b
    Examples:
      lemo report outputs/r03
      lemo report outputs/r03 --baseline outputs/dense --out r03.html
    """  # noqa: D301
    from .profiling.report.page import report_run

    typer.echo(f"report in {report_run(run, baseline, out)}")


def _overrides(arguments: list[str]) -> dict[str, str]:
    """`--field value` and `--field=value` pairs."""
    found: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name, given, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise LemoError(f"unexpected argument; {argument!r}; write overrides as --field value")
        if not given:
            following = next(rest, None)
            if following is None or (following.startswith("--") and len(following) > 2):
                raise LemoError(f"override has no value; {argument!r}; write {argument} value")
            value = following
        if name in found:
            raise LemoError(f"override is given twice; {name!r}; give it once")
        found[name] = value
    return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; bad input exits with code 2 after one line on stderr, a run that fails (memory, disk) with 1.

    A run that a signal stopped exits with 128 plus its number, when it has saved.
    """
    try:
        app(args=arguments)
    except (LemoError, LemoConfigError) as error:
        print(f"lemo: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", LemoError.exit_code)) from None


if __name__ == "__main__":
    main()
