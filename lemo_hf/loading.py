"""From a name to a model: base models with their context extended, and whatever a run saved; errors are one line."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from .errors import LemoError
from .hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, load_predictors, read_lemo_files, with_found
from .hub.weight_files import find_file, require_adapter_rank, require_safe_weights
from .models.lemo_config import LemoConfig, LemoConfigError
from .models.sparse_decoder import sparse_backbone
from .registry import HUB_ARGUMENTS, AutoLemoModelForCausalLM, read_config

if TYPE_CHECKING:
    from .recipe import ModelFields

logger = logging.getLogger(__name__)

_ASSETS = Path(__file__).with_name("assets")


def model_location(name: str) -> str:
    """Where `from_pretrained` finds `name`: a folder or Hub id as it is, an embedded model in the package.

    A folder that is gone but is called like an embedded model means that one: adapters record the folder of their base.

    Raises:
        LemoError: If `name` can only be a folder, and there is none.
    """
    if Path(name).exists():
        return name
    embedded = _ASSETS / Path(name).name
    if embedded.is_dir() and name.count("/") != 1:
        return str(embedded)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise LemoError(f"model folder does not exist; {name!r}; give a folder that holds a model, or a Hub id")
    return name


@contextmanager
def without_peft_deprecation() -> Iterator[None]:
    """Keeps one warning from users that they can do nothing about: PEFT 0.21 reads an attribute that transformers 5.23 renames."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


@contextmanager
def one_line_errors(fact: str, name: str) -> Iterator[None]:
    """Turns what `from_pretrained` raises for bad files or names into a `LemoError` of one line."""
    try:
        yield
    except (LemoError, LemoConfigError):
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Of any kind: what a damaged or hostile file makes of upstream's code is a KeyError as often as a ValueError.
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise LemoError(f"{fact} ({reason}); {name!r}; check the name or path, and that its files are whole") from error


def extended_config(
    model: "ModelFields", seq_len: int, adapter: "SavedAdapter | None" = None
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The base model's config, and the fields to load it with so that it takes samples of `seq_len` tokens.

    Args:
        model: The base model, and how its context is extended.
        seq_len: Tokens of a sample.
        adapter: What training goes on from; its positions hold where `model` leaves the context as it is.

    Raises:
        LemoError: If the model cannot be found, its architecture is not supported, or its context is too short for
            `seq_len` and the recipe does not extend it.
    """
    with one_line_errors("base model cannot be loaded", model.model):
        config, _ = read_config(model_location(model.model), revision=model.revision)
    trained_under = adapter.base_config if adapter else {}
    context = config.max_position_embeddings
    scaled = model.rope_type != "checkpoint" or model.rope_theta is not None
    if not hasattr(config, "rope_parameters") and (scaled or seq_len > context):
        raise LemoError(
            f"the model has learned positions, which end at {context}; seq_len {seq_len}, rope_type {model.rope_type!r}; "
            f"set seq_len to {context} at most and leave out the rope_ fields"
        )
    if not scaled:
        context = trained_under.get("max_position_embeddings", context)
        if model.rope_factor is not None:
            raise LemoError(f"rope_factor needs a rope_type; rope_factor={model.rope_factor}; add rope_type: linear or yarn")
        if seq_len > context:
            raise LemoError(
                f"seq_len {seq_len} is longer than the model's context of {context}; {model.model!r}; "
                "extend it with rope_type: linear or yarn, or lower seq_len"
            )
        return config, trained_under
    rope = dict(config.rope_parameters)
    if model.rope_theta is not None:
        rope["rope_theta"] = model.rope_theta
    if model.rope_type != "checkpoint":
        if rope["rope_type"] != "default":
            raise LemoError(
                f"the model's positions are scaled already (rope_type {rope['rope_type']!r}); {model.model!r}; "
                "set rope_theta instead, or start from its unscaled base"
            )
        rope |= {"rope_type": model.rope_type, "factor": float(model.rope_factor or max(1.0, seq_len / context))}
        if model.rope_type == "yarn":
            rope["original_max_position_embeddings"] = context
    if adapter and trained_under.get("rope_parameters", rope) != rope:
        logger.warning(
            "positions change: the adapter was trained under %s, the recipe says %s; %s; leave out the rope_ fields to keep them",
            *(trained_under["rope_parameters"], rope, adapter.location),
        )
    return config, {"rope_parameters": rope, "max_position_embeddings": max(seq_len, context)}


def load_tokenizer(model: "ModelFields") -> Any:
    """The base model's tokenizer."""
    with one_line_errors("tokenizer cannot be loaded", model.model):
        return AutoTokenizer.from_pretrained(model_location(model.model), revision=model.revision, trust_remote_code=False)


def load_saved_model(name: str, sparse: bool = False) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer.

    On an accelerator the weights keep the checkpoint's dtype. On a CPU they are float32, where 16 bits are slow, and a base
    saved in bfloat16 that a run trained in float32 would be measured as another model than the run's.

    Args:
        name: Folder or Hub id of a model or of a PEFT adapter, or the name of an embedded model.
        sparse: The sparse forward will run too, so LeMo's settings and predictors are needed.

    Raises:
        LemoError: If it cannot be found, is damaged, or carries no LeMo though `sparse` asks for it.
    """
    with one_line_errors("model cannot be loaded", name):
        location = model_location(name)
        adapter = find_file(location, ADAPTER_CONFIG)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        dtype = torch.float32 if device is None else "auto"
        model = _load_adapter(location, sparse, dtype) if adapter else _load_whole(location, sparse, dtype)
        source = location if find_file(location, "tokenizer_config.json") else model.config.name_or_path
        return model.to(device or "cpu").eval(), AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@dataclass(frozen=True)
class SavedAdapter:
    """What the folder of a PEFT adapter says, LeMo's files beside it included.

    Args:
        location: The folder or Hub id, as PEFT takes it.
        folder: Where its files lie: the folder itself, or a snapshot in the cache.
        base: Folder or Hub id of the base model.
        base_revision: Branch, tag or commit of the base model.
        lemo: The lemo block; `None` for an adapter without LeMo's files.
        base_config: Config fields to load the base model with.
        has_predictors: Whether the predictors lie there too.
    """

    location: str
    folder: Path
    base: str
    base_revision: str | None
    lemo: LemoConfig | None
    base_config: dict[str, Any]
    has_predictors: bool

    def block_for(self, lemo: LemoConfig | None) -> LemoConfig:
        """The settings in `lemo` with the thresholds and predictor sizes of this adapter; its own block for `None`.

        Raises:
            LemoError: If training under `lemo` reads predictors and there are none.
        """
        if self.lemo is None:
            return lemo or LemoConfig()
        block = self.lemo if lemo is None else lemo
        if block.needs_predictors and not self.has_predictors:
            raise LemoError(
                f"selection={block.selection!r} reads predictors, the adapter has no {PREDICTORS_FILE}; {self.location!r}; "
                "copy it from the adapter's run, or train new ones: lemo train RECIPE --adapter FOLDER --predictor_documents 64"
            )
        if not self.has_predictors:
            return block if lemo is None else replace(block, thresholds=block.thresholds or self.lemo.thresholds)
        return with_found(block, self.lemo, self.location)


def read_adapter(name: str, base: str | None = None, **where: Any) -> SavedAdapter:
    """Reads the small files of an adapter's folder and, from the Hub, fetches the others.

    Args:
        name: Folder or Hub id of the adapter.
        base: Its base model, where it is not to be the one that the adapter names.
        **where: As for `from_pretrained`: revision, token, cache_dir and the like.

    Raises:
        LemoError: If it is no adapter, or its files are damaged.
    """
    from peft import PeftConfig

    with one_line_errors("adapter cannot be read", name):
        location = model_location(name)
        found = find_file(location, ADAPTER_CONFIG, **where)
        if found is None:
            raise LemoError(
                f"folder holds no adapter; {name!r} has no {ADAPTER_CONFIG}; name the output folder of a run, or a checkpoint in it"
            )
        folder = Path(found).parent
        config = PeftConfig.from_pretrained(str(folder))
        has_block = find_file(location, CONFIG_FILE, **where) is not None
        weights = find_file(location, ADAPTER_WEIGHTS, **where)
        if weights is None:
            raise LemoError(
                f"adapter has no {ADAPTER_WEIGHTS}; {name!r}; copy it from its run, saved as safetensors: others are not read"
            )
        require_adapter_rank(Path(weights), config)
        block, base_config = read_lemo_files(folder) if has_block else (None, {})
        has_predictors = find_file(location, PREDICTORS_FILE, **where) is not None
    if not (base or config.base_model_name_or_path):
        raise LemoError(f"adapter does not name its base model; {str(found)!r}; add base_model_name_or_path to that file")
    revision = None if base else config.revision
    return SavedAdapter(
        location, folder, base or config.base_model_name_or_path, revision, block, base_config, has_block and has_predictors
    )


def load_adapter(
    name: str, lemo: LemoConfig | None = None, is_trainable: bool = False, base: str | None = None, **kwargs: Any
) -> Any:
    """An adapter on its base as a LeMo model: with the predictors, the thresholds and the positions of the run that saved it.

    Args:
        name: Folder or Hub id of the adapter.
        lemo: How to eliminate tokens from here on; thresholds and predictors stay the adapter's. `None` is its run's own block.
        is_trainable: Whether the adapter is to be trained further, as in `PeftModel.from_pretrained`.
        base: Its base model, where it is not to be the one that the adapter names.
        **kwargs: As for `AutoModelForCausalLM.from_pretrained`.

    Returns:
        A `PeftModel` over the LeMo model, in evaluation mode.

    Raises:
        LemoError: If a file is missing or damaged, or adapter, predictors and base do not fit each other.
    """
    where = {argument: kwargs.pop(argument) for argument in ("revision", "subfolder") if argument in kwargs}
    shared = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
    saved = read_adapter(name, base, **where, **shared)
    block = saved.block_for(lemo)
    with one_line_errors("base model cannot be loaded", saved.base):
        model: Any = AutoLemoModelForCausalLM.from_pretrained(
            model_location(saved.base), lemo=block, revision=saved.base_revision, **{**saved.base_config, **kwargs}
        )
    if saved.has_predictors:
        load_predictors(sparse_backbone(model), saved.folder)
    return put_adapter_on(model, saved, is_trainable)


def put_adapter_on(model: Any, saved: SavedAdapter, is_trainable: bool = False, **kwargs: Any) -> Any:
    """`PeftModel.from_pretrained`, with an error where an adapter that does not fit the model would only draw a warning.

    Raises:
        LemoError: If the adapter's weights are missing, damaged, or do not fit the model.
    """
    from peft import PeftModel

    with warnings.catch_warnings(), without_peft_deprecation(), one_line_errors("adapter cannot be loaded", saved.location):
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            return PeftModel.from_pretrained(model, str(saved.folder), is_trainable=is_trainable, **kwargs)
        except (RuntimeError, UserWarning) as error:
            raise ValueError(f"it does not fit the base model {saved.base!r}: {error}") from error


def _load_adapter(location: str, sparse: bool, dtype: torch.dtype | str) -> Any:
    if sparse and find_file(location, CONFIG_FILE) is None:
        raise LemoError(f"the sparse forward needs LeMo's files; {location!r} has no {CONFIG_FILE}; leave out --sparse")
    if sparse:
        return load_adapter(location, dtype=dtype)
    saved = read_adapter(location)
    model = _load_stock(model_location(saved.base), dtype=dtype, revision=saved.base_revision, **saved.base_config)
    return put_adapter_on(model, saved)


def _load_stock(location: str, **kwargs: Any) -> Any:
    # Any architecture that transformers has; a repository's own code is not run and, at a terminal, not offered to be run.
    revision = kwargs.get("revision")
    require_safe_weights(
        location, AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False), revision=revision
    )
    return AutoModelForCausalLM.from_pretrained(location, use_safetensors=True, trust_remote_code=False, **kwargs)


def _load_whole(location: str, sparse: bool, dtype: torch.dtype | str) -> Any:
    if sparse and getattr(AutoConfig.from_pretrained(location, trust_remote_code=False), "lemo", None) is None:
        raise LemoError(
            f"the sparse forward needs a LeMo model; {location!r} is a stock one; leave out --sparse or name an adapter"
        )
    return _load_stock(location, dtype=dtype)
