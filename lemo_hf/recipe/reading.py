"""Recipes: one flat YAML file says everything about a run.

A recipe's fields are those of `ModelFields`, `DataFields`, `LoraFields`, `LemoConfig` and `LemoTrainingArguments`, each under its
own name. A name that two of them have (`seed`) sets both. `--field value` on the command line overrides the file and is read
by the same rules.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..errors import LemoError
from ..models.lemo_config import LemoConfig
from .fields import RecipeField, fields_of, load_yaml, type_in_words

if TYPE_CHECKING:
    from ..training.arguments import LemoTrainingArguments

# Given for a run, never written down with it.
SECRET_FIELDS = ("hub_token",)
# Say where things lie on one machine: nobody else's business, and no part of what was trained.
LOCAL_FIELDS = ("output_dir", "logging_dir", "resume_from_checkpoint", "run_name")
PATH_FIELDS = ("model", "data_files", "held_out_files", "dataset", "chat_template", "adapter", "predictors")


@dataclass
class ModelFields:
    """The base model and how far its context is extended.

    Args:
        model: Hub id or folder of the base model, or the name of one that ships with lemo_hf (python-llama-4m).
        revision: Branch, tag or commit of the base model on the Hub.
        dtype: Float type of the base weights; "auto" is the checkpoint's own.
        rope_type: How positions beyond the base model's context are reached; "checkpoint" leaves them as they are.
        rope_factor: How many times the context grows; null is seq_len divided by the base model's context.
        rope_theta: Base of the rotary frequencies; null is the checkpoint's own.
        license: The licence of what is tuned, for the model card: a code of the Hub's, such as llama3.1.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    rope_type: Literal["checkpoint", "linear", "yarn"] = "checkpoint"
    rope_factor: float | None = None
    rope_theta: float | None = None
    license: str | None = None


@dataclass
class DataFields:
    """The text or the conversations: exactly one of data_files, dataset and python_packages.

    Args:
        seq_len: Tokens of a training sample.
        data_files: Text files (one document each), .jsonl files (one document a line) or folders of them.
        dataset: Id of a data set for datasets.load_dataset.
        dataset_config: Its configuration.
        dataset_split: Its split.
        dataset_streaming: Read it as a stream instead of downloading all of it first.
        python_packages: Installed Python packages whose sources are the text; "stdlib" is the interpreter's own library.
        text_field: Column or JSONL field that holds the text.
        data_format: "text", or "chat" for conversations (rows of messages, or of an instruction and an output) from .jsonl files or
            a data set.
        messages_field: Column or JSONL field of chat data that holds the list of messages, each with role and content.
        instruction_field, input_field, output_field: Where a row has no messages: what is asked, what it is asked about (optional)
            and the answer.
        loss_on: What chat data train: "answers" (the chat template has to mark them by {% generation %}) or "all" tokens.
        chat_template: Jinja file with the chat template; null is the tokenizer's own.
        max_documents: Documents read of a data set at most; needed where it is larger than memory.
        layout: "packed" lays documents one after the other and cuts where a sample is full; "windows" takes one document a sample.
            Conversations are never cut: "packed" lays as many as fit whole, and one longer than seq_len loses its last exchanges.
        held_out_files: Files whose text is held out for evaluation; held_out_share is not used then.
        held_out_share: Share of the documents held out for evaluation, in [0, 1), chosen by their names.
        max_train_samples: Training samples at most, taken evenly from the whole text.
        max_eval_samples: Held-out samples at most, likewise.
        language: Languages of the text, for the model card: ISO 639 codes; "code" for Python sources if not given.
    """

    seq_len: int
    data_files: list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_streaming: bool = True
    python_packages: list[str] | None = None
    text_field: str = "text"
    data_format: Literal["text", "chat"] = "text"
    messages_field: str = "messages"
    instruction_field: str = "instruction"
    input_field: str = "input"
    output_field: str = "output"
    loss_on: Literal["answers", "all"] = "answers"
    chat_template: str | None = None
    max_documents: int | None = None
    layout: Literal["packed", "windows"] = "packed"
    held_out_files: list[str] | None = None
    held_out_share: float = 0.05
    max_train_samples: int | None = None
    max_eval_samples: int | None = 32
    language: list[str] | None = None

    def __post_init__(self) -> None:
        sources = [name for name in ("data_files", "dataset", "python_packages") if getattr(self, name)]
        if len(sources) != 1:
            given = ", ".join(sources) or "none of them"
            raise LemoError(f"a run reads one of data_files, dataset and python_packages; got {given}; give exactly one")
        if self.data_format == "chat" and self.python_packages:
            raise LemoError("Python sources are no conversations; data_format='chat'; give data_files or dataset")
        if self.data_format == "text" and self.chat_template:
            raise LemoError(
                f"chat_template is for conversations; got {self.chat_template!r} with data_format='text'; set data_format: chat"
            )
        if not 0 <= self.held_out_share < 1:
            raise LemoError(
                f"held_out_share must be in [0, 1); got {self.held_out_share}; 0.05 holds out every twentieth document"
            )
        for name in ("max_documents", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LemoError(f"{name} must be at least 1; got {value}; leave it out for no limit")

    @property
    def source(self) -> str:
        """Where the text comes from, in words, and what of it is trained."""
        loss_on = "answers" if self.loss_on == "answers" else "all tokens"
        return self._place + (f"; conversations, loss on {loss_on}" if self.data_format == "chat" else "")

    @property
    def _place(self) -> str:
        if self.data_files:
            return "local files " + ", ".join(Path(name).name for name in self.data_files)
        if self.dataset:
            return (
                f"data set {_without_folders(self.dataset)}"
                + (f" ({self.dataset_config})" if self.dataset_config else "")
                + f", {self.dataset_split}"
            )
        return "Python sources of " + ", ".join(self.python_packages or [])

    @property
    def held_out_source(self) -> str:
        """Where held-out text of its own comes from, in words; empty where it is a part of `source`."""
        return "local files " + ", ".join(Path(name).name for name in self.held_out_files) if self.held_out_files else ""

    @property
    def hub_datasets(self) -> list[str]:
        """Hub ids of the data sets read."""
        return [self.dataset] if self.dataset and _without_folders(self.dataset) == self.dataset else []

    @property
    def languages(self) -> list[str]:
        """The text's languages as far as they are known."""
        return self.language or (["code"] if self.python_packages else [])


@dataclass
class LoraFields:
    """The adapter.

    Args:
        adapter: Folder or Hub id of a PEFT adapter to go on from, with its predictors, thresholds and positions where a LeMo run
            saved it; the lora_ fields are the adapter's own then.
        lora_r: Rank.
        lora_alpha: Scale; the adapter's output is multiplied by lora_alpha / lora_r.
        lora_dropout: Dropout on the adapter's input.
        lora_target_modules: Names of the linear layers that get an adapter, or "all-linear".
        lora_modules_to_save: Names of modules that are trained whole and saved with the adapter.
        lora_dtype: Float type of the adapter: "float32" (PEFT's default) or the "model"'s.
    """

    adapter: str | None = None
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | Literal["all-linear"] = dataclasses.field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    lora_modules_to_save: list[str] | None = None
    lora_dtype: Literal["float32", "model"] = "float32"

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise LemoError(f"lora_r must be at least 1; got {self.lora_r}; 8 is a usual rank")


@cache
def sections() -> dict[str, type]:
    """The dataclasses whose fields a recipe has, by the heading that help gives them."""
    from ..training.arguments import LemoTrainingArguments  # with transformers' Trainer behind it: seconds

    return {
        "Model": ModelFields,
        "Data": DataFields,
        "LoRA": LoraFields,
        "LeMo": LemoConfig,
        "Training": LemoTrainingArguments,
    }


@cache
def recipe_fields() -> dict[str, RecipeField]:
    """Every field a recipe may have, by name."""
    found: dict[str, RecipeField] = {}
    for section in sections().values():
        found = {**fields_of(section), **found}
    return found


@dataclass
class Recipe:
    """A checked recipe.

    Args:
        name: Stem of its file.
        values: The given fields with their values.
        model: The base model.
        data: The text.
        lora: The adapter.
        lemo: How tokens are eliminated.
    """

    name: str
    values: dict[str, Any]
    model: ModelFields
    data: DataFields
    lora: LoraFields
    lemo: LemoConfig

    def __post_init__(self) -> None:
        if self.data.seq_len < self.lemo.block_size:
            raise LemoError(
                f"seq_len {self.data.seq_len} is shorter than one block (block_size={self.lemo.block_size}); "
                "lower block_size or use longer samples"
            )

    @property
    def output_dir(self) -> Path:
        """Where the run's files go: the recipe's `output_dir`, else `outputs/<name of the recipe>`."""
        return Path(self.values.get("output_dir") or f"outputs/{self.name}")

    def training_arguments(self) -> "LemoTrainingArguments":
        """The arguments of the trainer.

        Raises:
            LemoError: If transformers refuses a value.
        """
        from ..training.arguments import LemoTrainingArguments

        names = fields_of(LemoTrainingArguments)
        values = {name: value for name, value in self.values.items() if name in names}
        try:
            return LemoTrainingArguments(**{**values, "output_dir": str(self.output_dir)})
        except LemoError:
            raise
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise LemoError(
                f"training arguments are refused: {reason}; {self.name}; change these fields of the recipe"
            ) from error

    @property
    def seed(self) -> int:
        """Seed of the run: the trainer's."""
        return int(self.values.get("seed", fields_of(sections()["Training"])["seed"].default))

    def to_yaml(self, public: bool = False) -> str:
        """The recipe as a file that gives this run again; secrets are left out.

        Args:
            public: Leave out local folders too and cut local paths down to their names, for a model card.
        """
        hidden = (*SECRET_FIELDS, *LOCAL_FIELDS) if public else SECRET_FIELDS
        values = {name: value for name, value in self.values.items() if name not in hidden}
        if public:
            values = {name: _without_folders(value, may_be_relative=name in PATH_FIELDS) for name, value in values.items()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=130)


def _without_folders(value: Any, may_be_relative: bool = True) -> Any:
    """Local paths cut down to their names, in lists and mappings too.

    Args:
        value: A recipe's value.
        may_be_relative: Text that names a file or folder from here counts as well as an absolute path.
    """
    if isinstance(value, list):
        return [_without_folders(each, may_be_relative) for each in value]
    if isinstance(value, dict):
        return {name: _without_folders(each, may_be_relative) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    local = value.startswith("~") or Path(value).is_absolute() or (may_be_relative and Path(value).exists())
    return Path(value).name if local else value


def read_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: A flat YAML file.
        overrides: Field -> text, as from `--field value`; they win over the file.

    Raises:
        LemoError: If the file is missing or no flat YAML, a field is unknown, missing or of the wrong type, or a value is refused.
        LemoConfigError: If a field of `LemoConfig` is outside its domain.
    """
    path = Path(path)
    values = _read_values(path)
    known = recipe_fields()
    for name in (*values, *(overrides or {})):
        if name not in known:
            raise _unknown(name, path)
    values = {name: known[name].checked(value, str(path)) for name, value in values.items()}
    values |= {name: known[name].parsed(text) for name, text in (overrides or {}).items()}
    model, data, lora, lemo = (_section(part, values, path) for part in (ModelFields, DataFields, LoraFields, LemoConfig))
    return Recipe(path.stem, values, model, data, lora, lemo)


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LemoError(f"recipe does not exist; {str(path)!r}; give the path of a .yaml file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LemoError(f"recipe is not YAML ({' '.join(str(error).split())}); {str(path)!r}; correct that line") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise LemoError(f"recipe is not a list of 'field: value' lines; {str(path)!r}; write one field a line")
    return values


def _unknown(name: str, path: Path) -> LemoError:
    nearest = difflib.get_close_matches(name.replace("-", "_"), recipe_fields(), n=1, cutoff=0.5)
    fix = f"did you mean {nearest[0]!r}?" if nearest else "`lemo train --help` lists all fields"
    return LemoError(f"recipe has no field {name!r}; {str(path)!r}; {fix}")


def _section(section: type, values: dict[str, Any], path: Path) -> Any:
    fields = fields_of(section)
    for name, field in fields.items():
        if field.required and name not in values:
            raise LemoError(f"recipe lacks the field {name!r}; {str(path)!r}; add it: {field.description}")
    return section(**{name: values[name] for name in fields if name in values})


def describe_fields() -> str:
    """All fields with type, default and meaning, by section, for `lemo train --help`."""
    lines: list[str] = []
    for heading, section in sections().items():
        fields = fields_of(section)
        lines += [f"{heading} fields:"]
        for field in fields.values():
            if not field.inherited:
                default = "required" if field.required else f"default {_shown(field.default)}"
                lines += [f"  --{field.name}  {type_in_words(field.annotation)}; {default}", f"      {field.description}"]
        inherited = [field.name for field in fields.values() if field.inherited]
        if inherited:
            lines += ["  and every field of transformers.TrainingArguments:", "      " + ", ".join(inherited)]
        lines += [""]
    return "\n".join(lines).rstrip()


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
