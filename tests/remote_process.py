"""A process without lemo_hf that loads a LeMo model by its own code, evaluates, generates, trains, saves, and loads that again."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REMOTE_PROGRAM = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lemo_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
source, files = sys.argv[1:]
tokens = load_file(files + "/tokens.safetensors")["tokens"]
for turn in (1, 2):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        written = model.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 12)
    model.train()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert all(0 < share < 1 for share in model.model.lemo_kept_shares), model.model.lemo_kept_shares
    grads = {"grad." + name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    save_file({"logits": logits, "loss": loss.detach(), **grads}, f"{files}/result_{turn}.safetensors")
    source = f"{files}/saved_{turn}"
    model.save_pretrained(source)
"""


def run_remote(source: str | Path, folder: Path, tokens: torch.Tensor, **environment: str) -> list[dict[str, torch.Tensor]]:
    """Loads `source` twice where lemo_hf cannot be imported, the second time as the first one saved it (`folder`/saved_1).

    Args:
        source: Folder or Hub id of a LeMo model with its code.
        folder: Where the process works.
        tokens: What it evaluates, generates and trains on.
        **environment: Variables of the process.

    Returns:
        Logits, loss and, as "grad.<name>", gradients of both.
    """
    folder.mkdir(exist_ok=True)
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    found = subprocess.run(
        [sys.executable, "-c", REMOTE_PROGRAM, str(source), str(folder)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HOME": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return [load_file(folder / f"result_{turn}.safetensors") for turn in (1, 2)]
