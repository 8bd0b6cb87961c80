"""From a run's folder to something others can use: a clean adapter, a stock checkpoint, or a LeMo model with its code.

    adapter       adapter, predictors, lemo_config.json     loads in transformers + peft
    merged        the adapter added into the base weights   a stock checkpoint, served by anything
    remote-code   the same weights, predictors, code        trains sparsely wherever transformers is, trust_remote_code=True

Each with tokenizer and model card. A folder appears whole or not at all: it is written under another name beside its place.
"""

import dataclasses
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import CONFIG_NAME

from ..errors import LemoError
from ..loading import SavedAdapter, load_adapter, model_location, one_line_errors, read_adapter
from ..models.sparse_decoder import sparse_backbone
from ..registry import ARCHITECTURES, AutoLemoModelForCausalLM, read_config
from .card_metadata import is_hub_id, public_name
from .lemo_files import CONFIG_FILE, PREDICTORS_FILE, context_config, opened_tensors, read_json, read_tensors, write_json
from .model_card import BEGIN, CARD_FILE, RESULTS_FILE, Kind, RunResults, write_model_card

logger = logging.getLogger(__name__)

# What a run's folder holds and an export does not.
_RUN_FILES = ("recipe.yaml", "trainer_state.json", "lemo_state.json", RESULTS_FILE)
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def export_run(
    run: str | Path,
    to: Kind,
    output: str | Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    repo_id: str | None = None,
) -> Path:
    """Writes what a LeMo run made into a folder of its own.

    Args:
        run: The run's output folder, or a checkpoint in it. A run without adapter (all weights trained) has no "adapter" form.
        to: "adapter", "merged" or "remote-code".
        output: The new folder; `<run>-<to>` if not given.
        base: Hub id or folder of the base model, where it is not to be the one that the adapter names.
        dtype: Float type to merge in and save; "auto" is that of the base checkpoint.
        repo_id: The repository that the folder is meant for; the card's examples name it then.

    Returns:
        The new folder.

    Raises:
        LemoError: If the run is incomplete, the base cannot be merged, or the output folder holds something; nothing is written.
    """
    run = Path(run)
    if not run.is_dir():
        raise LemoError(f"run folder does not exist; {str(run)!r}; name the output folder of a run, or a checkpoint in it")
    output = Path(output) if output is not None else run.resolve().with_name(f"{run.resolve().name}-{to}")
    _require_free(output)
    saved = None if _is_whole_model(run) else _complete_adapter(run, base, needs_predictors=to != "merged")
    with new_folder(output) as folder:
        if to == "adapter":
            if saved is None:
                raise LemoError(
                    f"run has no adapter, all weights were trained; {str(run)!r}; export it with --to merged or --to remote-code"
                )
            _write_adapter(saved, folder, base)
            fallback, config = saved.base, saved.base_config
        else:
            model = _merged_model(run, saved, base, dtype)
            fallback, config = (saved.base if saved else str(run)), context_config(model)
            (as_stock(model) if to == "merged" else model).save_pretrained(folder)
        _write_tokenizer(run, fallback, folder)
        title = repo_id.split("/")[-1] if repo_id else output.name
        card = run / CARD_FILE
        existing = card.read_text(encoding="utf-8") if card.is_file() else None
        write_model_card(_results(run, saved, config), folder, title, existing, adapter=repo_id, kind=to)
    return output


def exported_folder(folder: str | Path) -> Path:
    """A folder that [`export_run`] wrote, to be pushed as it is.

    Raises:
        LemoError: If it is something else, such as the folder of a run.
    """
    folder = Path(folder)
    card = folder / CARD_FILE
    whole = card.is_file() and BEGIN in card.read_text(encoding="utf-8")
    if not whole or any((folder / name).exists() for name in _RUN_FILES):
        raise LemoError(f"folder is none that lemo export wrote; {str(folder)!r}; say what to make of it with --to")
    return folder


def local_base(folder: Path) -> str | None:
    """The folder on this machine that an adapter names as its base model; `None` where it is a Hub id, or there is no adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
    return None if is_hub_id(base) else base


def as_stock(model: Any) -> Any:
    """The stock model with the weights of a LeMo model, which are shared, and without predictors.

    Args:
        model: A LeMo model without adapter.
    """
    stock_type = next(name for name, (config, _) in ARCHITECTURES.items() if config.model_type == model.config.model_type)
    values = {name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "lemo", "auto_map")}
    config = CONFIG_MAPPING[stock_type].from_dict(values)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(stock).__name__]
    weights = {name: weight for name, weight in model.state_dict().items() if ".lemo_predictor." not in name}
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and is removed when it does not.

    Raises:
        LemoError: If a file cannot be written.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
        yield partial
        # Temporary folders, and safetensors' files, are private; results are for others too.
        partial.chmod(0o755)
        for written in partial.rglob("*"):
            written.chmod(0o755 if written.is_dir() else 0o644)
        os.replace(partial, path)  # onto nothing, or an empty folder
    except OSError as error:
        reason = " ".join(str(error).split())
        raise LemoError(
            f"output folder cannot be written ({reason}); {str(path)!r}; see that there is room, and permission"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _require_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise LemoError(f"output folder exists already; {str(output)!r}; delete it, or choose another with --output")


def _is_whole_model(run: Path) -> bool:
    return not (run / ADAPTER_CONFIG).is_file() and (run / CONFIG_NAME).is_file()


def _complete_adapter(run: Path, base: str | None, needs_predictors: bool) -> SavedAdapter:
    saved = read_adapter(str(run), base)
    if saved.lemo is None:
        raise LemoError(
            f"folder has no {CONFIG_FILE}, so the positions it was trained under are unknown; {str(run)!r}; copy it from its run"
        )
    if needs_predictors and not saved.has_predictors:
        raise LemoError(
            f"run has no {PREDICTORS_FILE}; {str(run)!r}; copy it there, train new ones (lemo train RECIPE --adapter {run} "
            "--predictor_documents 64), or export --to merged, which needs none"
        )
    with opened_tensors(saved.folder / ADAPTER_WEIGHTS):
        return saved


def _write_adapter(saved: SavedAdapter, folder: Path, base: str | None) -> None:
    for name in (ADAPTER_WEIGHTS, PREDICTORS_FILE):
        read_tensors(saved.folder / name)  # a truncated file is not handed on
        shutil.copyfile(saved.folder / name, folder / name)
    shutil.copyfile(saved.folder / CONFIG_FILE, folder / CONFIG_FILE)
    values = read_json(saved.folder / ADAPTER_CONFIG)
    if base:
        values |= {"base_model_name_or_path": base, "revision": None}
    write_json(folder / ADAPTER_CONFIG, values)


def _merged_model(run: Path, saved: SavedAdapter | None, base: str | None, dtype: str) -> Any:
    if saved is None:
        with one_line_errors("model cannot be loaded", str(run)):
            model = AutoLemoModelForCausalLM.from_pretrained(str(run), dtype=dtype)
        sparse_backbone(model)
        return model
    with one_line_errors("base model cannot be loaded", saved.base):
        config, _ = read_config(model_location(saved.base), revision=saved.base_revision)
    if getattr(config, "quantization_config", None) is not None:
        raise LemoError(
            f"base model is quantised, an adapter cannot be merged into it; {saved.base!r}; name the model that it was quantised "
            "from with --base, or export --to adapter"
        )
    model = load_adapter(str(run), base=base, dtype=dtype)
    kind = model.active_peft_config.peft_type.value
    if not hasattr(model, "merge_and_unload"):
        raise LemoError(f"an adapter of this kind cannot be merged; {kind}; export --to adapter")
    _untie_adapted_ends(model.get_base_model())
    with one_line_errors("adapter cannot be merged", str(run)):
        merged = model.merge_and_unload(safe_merge=True)
    _make_saveable(merged.generation_config)
    return merged


def _untie_adapted_ends(model: Any) -> None:
    # An adapter on one end changes that end alone; added into a weight that both share it would change the other as well.
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    plain = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    if plain == list(ends) or plain[0].weight is not plain[1].weight:
        return
    logger.warning("input embeddings and head are saved apart: the adapter changes them, and the base model ties them")
    plain[1].weight = torch.nn.Parameter(plain[1].weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _make_saveable(generation: Any) -> None:
    # Some checkpoints set sampling parameters without sampling (Llama 2), which transformers reads but refuses to write.
    try:
        generation.validate(strict=True)
    except ValueError as error:
        logger.warning("generation config of the base model contradicts itself, do_sample=True is set: %s", error)
        generation.do_sample = True


def _write_tokenizer(run: Path, fallback: str, folder: Path) -> None:
    source = str(run) if (run / "tokenizer_config.json").is_file() else model_location(fallback)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer is exported, none was found; %r; %s", source, " ".join(str(error).split())[:200])
        return
    tokenizer.save_pretrained(folder)


def _results(run: Path, saved: SavedAdapter | None, base_config: dict[str, Any]) -> RunResults:
    if (run / RESULTS_FILE).is_file():
        return RunResults.read(run / RESULTS_FILE)
    # A checkpoint is of the run in the folder above, and has measured nothing itself.
    of_run = run.resolve().parent / RESULTS_FILE
    state = run / "trainer_state.json"
    steps = read_json(state).get("global_step") if state.is_file() else None
    if _CHECKPOINT.fullmatch(run.resolve().name) and of_run.is_file():
        return dataclasses.replace(
            RunResults.read(of_run),
            steps=steps,
            train_seconds=None,
            kept_share=None,
            recall=None,
            recall_chance=None,
            recall_positions=None,
            perplexity_after=None,
            stock=None,
        )
    return RunResults(
        base_model=public_name(saved.base) if saved else run.resolve().name,
        data="not recorded",
        seq_len=0,
        lemo=saved.lemo.to_dict() if saved and saved.lemo else read_json(run / CONFIG_NAME).get("lemo", {}),
        base_config=base_config if saved else {},
        steps=steps,
    )
