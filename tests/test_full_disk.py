"""A disk that really is full: small file systems in memory, in a name space of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Trains into file systems of several sizes, one after the other, so that another file of another checkpoint is the first not to fit.
PROGRAM = """
import os, subprocess, sys
from pathlib import Path
import torch
from training_runs import RandomText, tiny_trainer
from lemo_hf import last_whole_checkpoint
from lemo_hf.errors import LemoRunError
from lemo_hf.training.faults.whole_checkpoints import damage
torch.set_num_threads(1)
place = Path(sys.argv[1])
for size in range(60, 420, 12):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)], check=True)
    lemo = {"selection": "ratio", "attention_forward": "sparse"}
    said = "finished"
    try:
        tiny_trainer(place / "out", lemo, max_steps=4, save_strategy="steps", save_steps=1, predictor_documents=1).train()
    except LemoRunError as error:
        said = str(error)
    found = sorted((place / "out").glob("checkpoint-*"))
    last = last_whole_checkpoint(place / "out")
    assert all(damage(folder) is None for folder in found), (size, said)
    if said != "finished":
        assert "could not be written" in said and "bytes free" in said and "\\n" not in said, said
        assert f"last whole checkpoint: {last or 'none yet'};" in said, said
    print(f"{size}k: {len(found)} whole; {said}")
    subprocess.run(["umount", str(place)], check=True)
"""


@pytest.mark.slow
def test_every_size_of_disk_leaves_whole_checkpoints_and_one_line(tmp_path, record_property):
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        allowed = subprocess.run([*apart, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("file systems cannot be mounted here")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    outcome = subprocess.run(
        [*apart, sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    lines = [line for line in outcome.stdout.splitlines() if " whole; " in line]
    failed = [line for line in lines if "finished" not in line]
    assert len(lines) == 30
    assert 5 <= len(failed) < 30
    assert any("0 whole" in line for line in failed)
    assert any("3 whole" in line for line in failed)
    record_property("disks", len(failed))
