"""Sound folders of a LeMo model and of an adapter, and ways to spoil them; what the tests of untrusted files share."""

import json
from pathlib import Path

from references.tiny_models import add_lora, lemo_model, stock_model

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig
from lemo_hf.hub.lemo_files import save_lemo_files


def saved_model(folder: Path, architecture: str = "llama", **lemo) -> Path:
    """A LeMo checkpoint, with these settings in its block."""
    lemo_model(stock_model(architecture=architecture), **lemo).save_pretrained(folder)
    return folder


def saved_adapter(folder: Path) -> Path:
    """What a LeMo run leaves, of a stock base beside it."""
    stock_model().save_pretrained(folder.parent / "base")
    block = LemoConfig(predictor_rank=8, predictor_features=8, selection="ratio")
    model = add_lora(AutoLemoModelForCausalLM.from_pretrained(folder.parent / "base", lemo=block))
    model.save_pretrained(folder)
    save_lemo_files(model, folder)
    return folder


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_block(folder: Path, **changes) -> None:
    rewrite(folder / "config.json", lemo={**json.loads((folder / "config.json").read_text())["lemo"], **changes})


def is_one_line(error: Exception | str) -> bool:
    message = str(error)
    return "\n" not in message and 20 < len(message) < 1000
