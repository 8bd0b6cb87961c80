"""The README.md of a tuned model, rendered from its run's results, and the plot beside it.

Every number comes from `RunResults`, which a run fills from what it measured; what was not measured is left out, and said so where
a reader would look for it. The part between the two markers is written anew each time, everything outside them and metadata that
the run does not know are the reader's and stay.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from ..errors import LemoError
from ..evaluation.perplexity import Perplexity, paired_difference
from ..models.lemo_config import LemoConfig
from ..profiling.provenance import provenance
from .card_metadata import card_metadata, is_hub_id, merged_metadata, public_name
from .card_tables import cell, comparison_rows, cost_rows, decimals, introduction, literal, training_rows
from .lemo_files import atomic_path

logger = logging.getLogger(__name__)

BEGIN = "<!-- lemo_hf:begin (rewritten at each save; what stands above or below stays) -->"
END = "<!-- lemo_hf:end -->"
CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
PLOT_FILE = "kept_share.png"
_TEMPLATE = "card_template.md"
_ASSETS = Path(__file__).parents[1] / "assets"
# A phrase of the card that Trainer writes by itself, which asks a person who completes it to remove it.
_TRAINER_CARD = "generated automatically according to the information the Trainer had access to"

# What a folder holds: a PEFT adapter, a stock checkpoint with the adapter merged in, or a LeMo model with its code.
Kind = Literal["adapter", "merged", "remote-code"]


@dataclass
class Interval:
    """A perplexity with its 95 % confidence interval.

    Args:
        value: Perplexity per token.
        low, high: Ends of the interval; `None` where one document alone was measured.
        tokens: Tokens it was measured on; `None` where that was not recorded.
    """

    value: float
    low: float | None
    high: float | None
    tokens: int | None

    @classmethod
    def of(cls, measured: Perplexity) -> "Interval":
        """The perplexity `measured` with its interval over documents."""
        if len(measured.token_counts) < 2:
            return cls(measured.perplexity, None, None, measured.tokens)
        # Its difference to a model that predicts every token with certainty, paired by document, is the perplexity less 1.
        certain = Perplexity((0.0,) * len(measured.token_counts), measured.token_counts)
        difference = paired_difference(certain, measured)
        return cls(measured.perplexity, 1 + difference.low / 100, 1 + difference.high / 100, measured.tokens)

    def __str__(self) -> str:
        between = "one document, so no interval" if self.low is None else f"95 % interval {self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({between}; {self.tokens} tokens)"


@dataclass
class PerplexityComparison:
    """A run's dense perplexity beside that of stock LoRA, paired by document.

    Args:
        equal: What both had the same of: "steps", or "time" with the run's own phases counted in.
        steps, stock_steps: Optimizer steps of the run and of stock LoRA.
        perplexity, stock_perplexity: What they reached.
        percent: How much higher the run's is, percent; negative is better than stock.
        low, high: Ends of its 95 % confidence interval, percent.
    """

    equal: Literal["steps", "time"]
    steps: int
    stock_steps: int
    perplexity: float
    stock_perplexity: float
    percent: float
    low: float
    high: float


@dataclass
class StockRun:
    """Stock LoRA trained beside the run: the same base model, adapter, text and seed, the stock `Trainer`.

    Args:
        comparisons: Perplexities of the two.
        saved_bytes, step_flops, step_seconds: As in `RunResults`.
    """

    comparisons: list[PerplexityComparison] = field(default_factory=list)
    saved_bytes: float | None = None
    step_flops: float | None = None
    step_seconds: float | None = None


@dataclass
class RunResults:
    """What a run measured and was made of: the content of its `results.json`.

    Args:
        base_model: Hub id or folder of the base model.
        data: The training text, in words.
        seq_len: Tokens of a sample; 0 if not known.
        lemo: The `lemo` block, as `LemoConfig.to_dict` gives it.
        base_config: Config fields that whoever loads the base model for this adapter has to pass.
        datasets: Hub ids of the data sets read.
        recipe: The recipe as YAML, without secrets and local paths.
        adapter: The adapter in words, its method first ("LoRA r=8 on q_proj"); empty where all weights were trained.
        precision: Float types of base and adapter, and autocast, in words; empty if not known.
        steps: Optimizer steps done.
        train_seconds: Wall-clock time of training, with all phases before the first step.
        batch: Samples of one forward pass.
        saved_bytes: What one forward pass in training saves for backward, bytes.
        peak_gpu_bytes: The most that was allocated on the GPU while training, bytes.
        step_flops: Floating-point operations of one forward and backward pass.
        step_seconds: Median time of one forward and backward pass.
        kept_share: Per layer the share of tokens computed on, in [0, 1], mean over the steps.
        recall: Per layer the predictor's recall at the last probe, in [0, 1]; `None` for a layer without one.
        recall_chance, recall_positions: Recall of a choice at random, and of a predictor that knows positions only.
        perplexity_before, perplexity_after: Dense-forward perplexity on held-out text before and after training.
        evaluation_data: The held-out text, in words, where `data` does not say it.
        started_from: Hub id or folder of the adapter that training went on from; empty for a fresh one.
        stock: Stock LoRA trained beside the run.
        language: Codes of the text's languages as the Hub knows them: ISO 639, or "code".
        license: The licence of what was tuned, as the Hub calls it.
        provenance: Commit, package versions and machine.
    """

    base_model: str
    data: str
    seq_len: int
    lemo: dict[str, Any]
    base_config: dict[str, Any] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    recipe: str = ""
    adapter: str = "LoRA"
    precision: str = ""
    steps: int | None = None
    train_seconds: float | None = None
    batch: int | None = None
    saved_bytes: float | None = None
    peak_gpu_bytes: float | None = None
    step_flops: float | None = None
    step_seconds: float | None = None
    kept_share: list[float | None] | None = None
    recall: list[float | None] | None = None
    recall_chance: float | None = None
    recall_positions: float | None = None
    perplexity_before: Interval | None = None
    perplexity_after: Interval | None = None
    evaluation_data: str = ""
    started_from: str = ""
    stock: StockRun | None = None
    language: list[str] = field(default_factory=list)
    license: str | None = None
    provenance: dict[str, Any] = field(default_factory=provenance)

    def to_dict(self) -> dict[str, Any]:
        """The results as plain JSON types."""
        return asdict(self)

    @classmethod
    def read(cls, path: str | Path) -> "RunResults":
        """Reads a `results.json` that a run wrote.

        Raises:
            LemoError: If it is missing or something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            for name in ("perplexity_before", "perplexity_after"):
                if values.get(name) is not None:
                    values[name] = Interval(**values[name])
            if values.get("stock") is not None:
                comparisons = [PerplexityComparison(**each) for each in values["stock"]["comparisons"]]
                values["stock"] = StockRun(**{**values["stock"], "comparisons": comparisons})
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise LemoError(
                f"results of the run cannot be read ({reason}); {str(path)!r}; give a results.json that lemo train wrote"
            ) from error


def values_by_layer(
    history: list[dict[str, Any]], name: str, layers: int, combine: Callable[[list[float]], float]
) -> list[float | None] | None:
    """A metric of each layer over a trainer's log; `None` for a layer, or altogether, where there is none.

    Args:
        history: The log.
        name: The metric, logged as `<name>/layer_<i>`.
        layers: Layers of the model.
        combine: Makes one number of all that were logged.
    """
    # Dense layers have no recall, and a dense run has nothing.
    found = [[logs[key] for logs in history if (key := f"{name}/layer_{layer}") in logs] for layer in range(layers)]
    return [combine(values) if values else None for values in found] if any(found) else None


def template_path() -> Path:
    """The card's template: in the package where it was installed from a wheel, in `model_cards/` of a checkout.

    Raises:
        LemoError: If it is in neither.
    """
    places = [folder / "model_cards" / _TEMPLATE for folder in Path(__file__).parents[1:3]]
    for path in places:
        if path.is_file():
            return path
    raise LemoError(f"template of the model card is missing; {str(places[0])!r}; install lemo_hf again")


def render_card(
    results: RunResults,
    title: str,
    existing: str | None = None,
    adapter: str | None = None,
    kind: Kind = "adapter",
    plot: str | None = None,
) -> str:
    """The card as text.

    Args:
        results: The run's results.
        title: Heading of the card.
        existing: The card that was there before; its text outside the markers and its other metadata are kept.
        adapter: How a reader names the adapter or model in the loading example, a Hub id or a folder; a placeholder if not given.
        kind: What lies beside the card.
        plot: The plot of kept shares, as a link relative to the card; without one the numbers stand in the open.
    """
    on_hub = is_hub_id(results.base_model)
    name = public_name(results.base_model)
    base_link = f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{name}`"
    shares, recall = results.kept_share or [], results.recall or []
    length = max(len(shares), len(recall))
    layers = list(zip([*shares, *[None] * length][:length], [*recall, *[None] * length][:length], strict=True))
    known = [value for value in recall if value is not None]
    started = "Before this run, with the adapter it started from" if results.started_from else "Base model, same config"
    labels = started, "With this adapter" if kind == "adapter" else "This model"
    pairs = zip(labels, (results.perplexity_before, results.perplexity_after), strict=True)
    perplexities = [(label, found) for label, found in pairs if found is not None]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": cell, "decimals": decimals, "literal": literal}
    text = environment.from_string(template_path().read_text(encoding="utf-8")).render(
        run=results,
        title=title,
        kind=kind,
        begin=BEGIN,
        end=END,
        introduction=introduction(results, kind, base_link),
        base_name=name,
        ships_with_package=(_ASSETS / name).is_dir() and not on_hub,
        base_path=json.dumps(name if on_hub else f"path/to/{name}"),
        own_path=json.dumps(adapter or f"path/to/this/{'adapter' if kind == 'adapter' else 'model'}"),
        training=training_rows(results, base_link),
        perplexities=perplexities,
        has_interval=any(found.low is not None or found.tokens is not None for _, found in perplexities),
        has_tokens=any(found.tokens is not None for _, found in perplexities),
        comparisons=comparison_rows(results),
        costs=cost_rows(results),
        layers=layers,
        plot=plot,
        plot_description=plot_description(results),
        has_recall=bool(known),
        recall_mean=sum(known) / len(known) if known else None,
        lemo=LemoConfig.from_dict(results.lemo),
    )
    metadata = card_metadata(results, title, kind)
    if existing:
        before, body = _parsed(existing)
        metadata = merged_metadata(before, metadata, kind, BEGIN in body)
        text = _around(body, text)
    ModelCardData(**metadata)  # raises where the Hub would refuse the card
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000).strip()}\n---\n\n{text.strip()}\n"


def plot_description(results: RunResults) -> str:
    """What the plot of kept shares shows, for who cannot see it."""
    shares = [share for share in results.kept_share or [] if share is not None]
    if not shares:
        return ""
    low, high, mean = min(shares), max(shares), sum(shares) / len(shares)
    values = f"{mean:.2f} in every layer" if high - low < 0.005 else f"{low:.2f} to {high:.2f}, mean {mean:.2f}"
    return f"Share of tokens that each of the {len(shares)} layers computed on in training: {values}"


def _parsed(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text; metadata that are no YAML mapping become text, so that nothing is lost."""
    card = card.lstrip("\ufeff")
    if not card.startswith("---\n"):
        return {}, card
    block, closed, body = card[4:].partition("\n---\n")
    if not closed:
        return {}, card
    try:
        metadata = yaml.safe_load(block) or {}
        if isinstance(metadata, dict):
            return metadata, body
        reason = "no mapping"
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    logger.warning(
        "the card's metadata is not YAML (%s); it stays in the card as text; correct it and put it back on top", reason
    )
    return {}, f"{body.rstrip()}\n\n```yaml\n{block}\n```\n"


def _around(before: str, ours: str) -> str:
    # Our part of `before` replaced by that of `ours`; the rest of `before` stays.
    region = ours[ours.index(BEGIN) : ours.index(END) + len(END)]
    if BEGIN in before and END in before[before.index(BEGIN) :]:
        start = before.index(BEGIN)
        end = before.index(END, start) + len(END)
        return before[:start] + region + _without_peft_footer(before[end:])
    if _is_generated(before):
        return region
    return f"{region}\n\n{_without_peft_footer(before).strip()}\n"


def _is_generated(text: str) -> bool:
    """Whether a card's text is what PEFT or Trainer write by themselves, and holds nothing of a person."""
    if _TRAINER_CARD in text:
        return True
    stock = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(line in stock for line in _without_peft_footer(text).splitlines() if line.strip())


def _without_peft_footer(text: str) -> str:
    # PEFT appends this to any card it finds at each save; our versions section says it already.
    heading, _, tail = text.rpartition("### Framework versions")
    lines = [line for line in tail.splitlines() if line.strip()]
    if heading and all(line.startswith("- PEFT ") for line in lines):
        return heading.rstrip() + "\n"
    return text


def write_model_card(
    results: RunResults,
    folder: str | Path,
    title: str,
    existing: str | None = None,
    adapter: str | None = None,
    kind: Kind = "adapter",
) -> None:
    """Renders the card into `folder`'s README.md, keeping what a person added to the one that is there, and draws its plot.

    Without matplotlib the card shows the kept shares as numbers only.

    Args:
        results, title, adapter, kind: As in `render_card`.
        folder: The folder of the adapter or model.
        existing: The card from before PEFT's own save touched it; the README.md in `folder` if not given.
    """
    path = Path(folder) / CARD_FILE
    if existing is None and path.is_file():
        existing = path.read_text(encoding="utf-8")
    plot = _draw_plot(results, path.with_name(PLOT_FILE))
    text = render_card(results, title, existing, adapter, kind, plot)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _draw_plot(results: RunResults, path: Path) -> str | None:
    if not results.kept_share or all(share is None for share in results.kept_share):
        return None
    try:
        from ..profiling.plots import plot_kept_by_layer
    except ImportError as error:
        logger.warning(
            "card has no plot of kept shares (%s); %r; pip install matplotlib, and write the card again", error, str(path)
        )
        return None
    with atomic_path(path) as partial:
        plot_kept_by_layer(results.kept_share, partial, results.recall, results.recall_chance, plot_description(results))
    return path.name
