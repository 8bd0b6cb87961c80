"""The recipe of the embedded base model, read from flat YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..errors import LemoError

# Two recipes that differ in one of these are different runs and cannot share an output folder; schedules may change.
IDENTITY = (
    "packages",
    "held_out_share",
    "seed",
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "context_length",
    "rope_theta",
    "batch_rows",
)


@dataclass
class BaseModelRecipe:
    """The fields of `recipes/base_python_1k.yaml`.

    Args:
        packages: Python packages to read, `stdlib` being the running interpreter's library.
        held_out_share: fraction of the files that is never trained on.
        batch_rows, micro_batch_rows: rows of `context_length` tokens a step, and a forward pass.
        short_context_length, short_context_share: the first part of the run, as a share of it, sees rows cut to this
            many tokens: attention over short rows is cheap, and long-range structure is learnt quickly afterwards.
        rename_from_epoch: from this epoch (0-based) on, half of the documents have some of their identifiers renamed
            consistently, against memorisation; `None` for never.
        learning_rate: peak rate of Muon (root mean square of an update matched to AdamW's).
        embedding_learning_rate: peak rate of AdamW for embeddings and norms.
        max_steps, max_minutes: the end of training, whichever comes first; `None` for no limit by minutes.
        decay_share: last fraction of the run over which the rates fall linearly to 0.
        eval_every, eval_rows: steps between held-out evaluations, and rows in each.
        checkpoint_minutes: minutes between checkpoints.
        output_dir, export_dir: where checkpoints go, and the finished model.
    """

    packages: list[str] = field(default_factory=lambda: ["stdlib"])
    held_out_share: float = 0.05
    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 416
    context_length: int = 1024
    rope_theta: float = 10000.0
    batch_rows: int = 8
    micro_batch_rows: int = 1
    short_context_length: int = 256
    short_context_share: float = 0.5
    rename_from_epoch: int | None = None
    learning_rate: float = 0.008
    embedding_learning_rate: float = 0.004
    weight_decay: float = 0.1
    warmup_steps: int = 50
    max_steps: int = 4000
    max_minutes: float | None = None
    decay_share: float = 0.25
    eval_every: int = 150
    eval_rows: int = 32
    checkpoint_minutes: float = 5.0
    threads: int = 2
    output_dir: str = "outputs/base"
    export_dir: str = "lemo_hf/assets/python-llama-4m"

    def __post_init__(self) -> None:
        if self.batch_rows % self.micro_batch_rows:
            raise LemoError(
                f"batch_rows is not a multiple of micro_batch_rows; {self.batch_rows} and {self.micro_batch_rows}; change either"
            )

        if self.context_length % self.short_context_length:
            raise LemoError(
                f"context_length is not a multiple of short_context_length; {self.context_length} and "
                f"{self.short_context_length}; change either"
            )

    @classmethod
    def load(cls, path: str | Path) -> BaseModelRecipe:
        """Reads a flat YAML recipe.

        Raises:
            LemoError: the file is missing, not a mapping, or has an unknown field.
        """
        if not Path(path).is_file():
            raise LemoError(f"recipe does not exist; {str(path)!r}; give the path of a .yaml file")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise LemoError(f"recipe is not YAML ({' '.join(str(error).split())}); {str(path)!r}; correct it") from error
        if not isinstance(values, dict):
            raise LemoError(f"recipe is not a list of 'field: value' lines; {str(path)!r}; write one field a line")
        known = [each.name for each in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise LemoError(f"unknown recipe field; {name!r}; the fields are {', '.join(known)}")
        return cls(**values)
