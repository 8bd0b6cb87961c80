"""The README.md of an adapter, rendered from its run's results.

Every number comes from `RunResults`, which a run fills from what it measured; what was not measured is left out. The part
between the two markers is written anew each time, everything outside them and unknown metadata are the reader's and stay.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from ..errors import LemoError
from ..evaluation.perplexity import Perplexity, paired_difference
from ..profiling.provenance import provenance
from .lemo_files import atomic_path

BEGIN = "<!-- lemo_hf:begin (rewritten at each save; what stands above or below stays) -->"
END = "<!-- lemo_hf:end -->"
CARD_FILE = "README.md"
TAGS = ("lemo", "lora", "long-context")
# What a folder holds: a PEFT adapter, a stock checkpoint with the adapter merged in, or a LeMo model with its code.
Kind = Literal["adapter", "merged", "remote-code"]
_TEMPLATE = Path(__file__).with_name("card_template.md")
# Phrases of the cards that PEFT and Trainer write by themselves: such a card holds nothing a person wrote.
_GENERATED = ("[More Information Needed]", "generated automatically according to the information the Trainer had access to")


@dataclass
class Interval:
    """A perplexity with its 95 % confidence interval.

    Args:
        value: Perplexity per token.
        low, high: Ends of the interval; `None` where one document alone was measured.
        tokens: Tokens it was measured on.
    """

    value: float
    low: float | None
    high: float | None
    tokens: int

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
class RunResults:
    """What a run measured and was made of: the content of its `results.json`.

    Args:
        base_model: Hub id or folder of the base model.
        data: The training text, in words.
        seq_len: Tokens of a sample.
        lemo: The `lemo` block, as `LemoConfig.to_dict` gives it.
        base_config: Config fields that whoever loads the base model for this adapter has to pass.
        datasets: Hub ids of the data sets read.
        recipe: The recipe as YAML, without secrets and local paths.
        steps: Optimizer steps done.
        train_seconds: Wall-clock time of training.
        kept_share: Per layer the share of tokens computed on, in [0, 1], mean over the steps.
        recall: Per layer the predictor's recall at the last probe, in [0, 1]; `None` for a layer without one.
        recall_chance: Recall of a choice at random.
        perplexity_before, perplexity_after: Dense-forward perplexity on held-out text without and with the adapter.
        provenance: Commit, package versions and machine.
    """

    base_model: str
    data: str
    seq_len: int
    lemo: dict[str, Any]
    base_config: dict[str, Any] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    recipe: str = ""
    steps: int | None = None
    train_seconds: float | None = None
    kept_share: list[float | None] | None = None
    recall: list[float | None] | None = None
    recall_chance: float | None = None
    perplexity_before: Interval | None = None
    perplexity_after: Interval | None = None
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
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
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


def render_card(
    results: RunResults,
    title: str,
    existing: str | None = None,
    adapter: str | None = None,
    kind: Kind = "adapter",
) -> str:
    """The card as text.

    Args:
        results: The run's results.
        title: Heading of the card.
        existing: The card that was there before; its text outside the markers and its other metadata are kept.
        adapter: How a reader names the adapter or model in the loading example, a Hub id or a folder; a placeholder if not given.
        kind: What lies beside the card.
    """
    on_hub = _is_hub_id(results.base_model)
    shares = results.kept_share or []
    recall = results.recall or []
    layers = [
        {"kept": shares[i] if i < len(shares) else None, "recall": recall[i] if i < len(recall) else None}
        for i in range(max(len(shares), len(recall)))
    ]
    name = results.base_model if on_hub else Path(results.base_model).name
    card = ModelCard.from_template(
        ModelCardData(
            library_name="peft" if kind == "adapter" else "transformers", pipeline_tag="text-generation", tags=list(TAGS)
        ),
        template_path=str(_TEMPLATE),
        run=results,
        title=title,
        begin=BEGIN,
        end=END,
        base_link=f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{name}`",
        base_path=json.dumps(name if on_hub else f"path/to/{name}"),
        adapter_path=json.dumps(adapter or f"path/to/this/{'adapter' if kind == 'adapter' else 'model'}"),
        layers=layers,
        has_recall=any(layer["recall"] is not None for layer in layers),
    )
    text = card.text
    metadata = card.data.to_dict()
    if on_hub:
        metadata["base_model"] = results.base_model
    if results.datasets:
        metadata["datasets"] = list(results.datasets)
    if existing:
        before = ModelCard(existing, ignore_metadata_errors=True)
        metadata = _merged_metadata(before.data.to_dict(), metadata)
        text = _around(before.text, text)
    return str(ModelCard(f"---\n{ModelCardData(**metadata)}\n---\n\n{text.strip()}\n"))


def _merged_metadata(before: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = {**before, **ours}
    if "base_model" not in ours:
        merged.pop("base_model", None)  # PEFT puts a local folder there, which the Hub refuses
    for name in ("tags", "datasets"):
        ours_first = [*ours.get(name, []), *_as_list(before.get(name))]
        # The Hub derives "base_model:..." tags itself; PEFT's copy of them may name a local folder.
        kept = [tag for tag in dict.fromkeys(ours_first) if not str(tag).startswith("base_model:")]
        if kept:
            merged[name] = kept
    return merged


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _around(before: str, ours: str) -> str:
    # Our part of `before` replaced by that of `ours`; the rest of `before` stays.
    region = ours[ours.index(BEGIN) : ours.index(END) + len(END)]
    if BEGIN in before and END in before[before.index(BEGIN) :]:
        start = before.index(BEGIN)
        end = before.index(END, start) + len(END)
        return before[:start] + region + _without_peft_footer(before[end:])
    if any(phrase in before for phrase in _GENERATED) or not before.strip():
        return region
    return f"{region}\n\n{_without_peft_footer(before).strip()}\n"


def _without_peft_footer(text: str) -> str:
    # PEFT appends this to any card it finds at each save; our versions section says it already.
    heading, _, tail = text.rpartition("### Framework versions")
    lines = [line for line in tail.splitlines() if line.strip()]
    if heading and all(line.startswith("- PEFT ") for line in lines):
        return heading.rstrip() + "\n"
    return text


def _is_hub_id(name: str) -> bool:
    if Path(name).exists() or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def write_model_card(
    results: RunResults,
    folder: str | Path,
    title: str,
    existing: str | None = None,
    adapter: str | None = None,
    kind: Kind = "adapter",
) -> None:
    """Renders the card into `folder`'s README.md, keeping what a person added to the one that is there.

    Args:
        results, title, adapter, kind: As in `render_card`.
        folder: The adapter's folder.
        existing: The card from before PEFT's own save touched it; the README.md in `folder` if not given.
    """
    path = Path(folder) / CARD_FILE
    if existing is None and path.is_file():
        existing = path.read_text(encoding="utf-8")
    text = render_card(results, title, existing, adapter, kind)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
