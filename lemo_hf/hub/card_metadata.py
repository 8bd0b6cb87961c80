"""The metadata block of a model card: what the Hub files a model by, and shows of its evaluation."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils._validators import validate_repo_id

if TYPE_CHECKING:
    from .model_card import Kind, RunResults

logger = logging.getLogger(__name__)

TAGS = ("lemo", "long-context")
# Every metric that we write into `model-index` is named so; results of other names are a person's.
_METRIC = "Dense perplexity"
# A merged adapter is a fine-tune to the Hub: "merge" there means several models made one.
_RELATIONS = {"adapter": "adapter", "merged": "finetune", "remote-code": "finetune"}


def is_hub_id(name: Any) -> bool:
    """Whether `name` can only mean a repository of the Hub: `owner/name`, and no folder here is called so."""
    if not isinstance(name, str) or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(name: str) -> str:
    """A model's or data set's name for others to read: a Hub id as it is, of a folder its last part."""
    return Path(name).name if Path(name).exists() or name.count("/") > 1 or name.startswith(("~", "/", ".")) else name


def card_metadata(results: "RunResults", title: str, kind: "Kind") -> dict[str, Any]:
    """The metadata that follow from a run's results; what is not known is left out.

    Args:
        results: The run's results.
        title: Name of the model in `model-index`.
        kind: What lies beside the card.

    Raises:
        ValueError: If huggingface_hub does not accept them.
    """
    data = ModelCardData(
        license=results.license,
        language=list(results.language) or None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=results.base_model if is_hub_id(results.base_model) else None,
        datasets=list(results.datasets) or None,
        tags=["lora", *TAGS] if kind == "adapter" else list(TAGS),
    )
    if data.base_model:
        data["base_model_relation"] = _RELATIONS[kind]
    if results.perplexity_after is not None:
        data.metrics = ["perplexity"]
        data.model_name = title
        data.eval_results = [_evaluation(results)]
    return data.to_dict()


def _evaluation(results: "RunResults") -> EvalResult:
    assert results.perplexity_after is not None
    words = results.evaluation_data or f"{results.data}, held out"
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        # The Hub wants a data set's id here; text that is none of its data sets has only a name.
        dataset_type=results.datasets[0] if len(results.datasets) == 1 else "held-out-text",
        dataset_name=words,
        metric_type="perplexity",
        metric_name=f"{_METRIC} at {results.seq_len} tokens" if results.seq_len else _METRIC,
        metric_value=round(results.perplexity_after.value, 4),
    )


def merged_metadata(before: dict[str, Any], ours: dict[str, Any], kind: "Kind", was_ours: bool) -> dict[str, Any]:
    """`ours` with what a person had added to the card that was there.

    Fields that the run fills are written anew, except that a stated licence or language stays. Lists are joined, and results in
    `model-index` that are not ours stay.

    Args:
        before: Metadata of that card.
        ours: What follows from the run.
        kind: What lies beside the card.
        was_ours: It was one of our cards before, so what we never write there is a person's and not another tool's.
    """
    merged = {**before, **ours}
    for name in ("license", "language"):
        if before.get(name):
            merged[name] = before[name]
    if "base_model" not in ours and not (was_ours and is_hub_id(before.get("base_model"))):
        # PEFT puts a local folder there, which the Hub refuses.
        merged.pop("base_model", None)
        merged.pop("base_model_relation", None)
    elif "base_model" in merged:
        merged["base_model_relation"] = _RELATIONS[kind]
    for name in ("tags", "datasets", "metrics"):
        ours_first = [*ours.get(name, []), *_as_list(before.get(name))]
        # The Hub derives "base_model:..." tags itself; PEFT's copy of them may name a local folder.
        kept = [tag for tag in dict.fromkeys(ours_first) if not str(tag).startswith("base_model:")]
        if kept:
            merged[name] = kept
    index = _merged_index(before.get("model-index"), ours.get("model-index"))
    merged.pop("model-index", None)
    return {**merged, "model-index": index} if index else merged


def _merged_index(before: Any, ours: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if not before:
        return ours or []
    try:
        name, found = model_index_to_eval_results(before)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning(
            "the card's model-index is not one that the Hub accepts (%r); %r; it is left out: add it again as the Hub documents it",
            error,
            before,
        )
        return ours or []
    theirs = [each for each in found if not str(each.metric_name or "").startswith(_METRIC)]
    if not theirs:
        return ours or []
    # Apart from ours: huggingface_hub joins results on one data set and takes the source of the first.
    kept = eval_results_to_model_index(name, theirs)
    return [{**ours[0], "results": [*ours[0]["results"], *kept[0]["results"]]}] if ours else kept


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
