"""What processes do for `test_zero2_on_the_cpu`: the same tiny steps by DDP and by DeepSpeed ZeRO-2, saved and resumed.

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tests/deepspeed_runs.py FOLDER

One file of results per process, `rank<r>.json`.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from process_runs import LIMIT, PHASES, SAMPLED, SAVING, THRESHOLD, UnevenText, make_trainer, outcome, padded

LAUNCH_FILE = Path(__file__).parent.parent / "recipes" / "launch" / "zero2.json"


def main(out: Path) -> None:
    """Everything."""
    settings: dict[str, Any] = json.loads(LAUNCH_FILE.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    batch = 4 // int(os.environ["WORLD_SIZE"])

    def train(name: str, lemo: dict[str, Any], folder: str | None = None, resume: Any = None, **changes: Any) -> None:
        trainer = make_trainer(out / (folder or name), lemo, **{"per_device_train_batch_size": batch, **changes})
        trainer.train(resume_from_checkpoint=resume)
        found[name] = outcome(trainer)
        found[name]["optimizer"] = type(trainer.model_wrapped.optimizer).__name__ if "deepspeed" in changes else None
        trainer.save_model(str(out / f"{name}_final"))

    uneven = {"data": UnevenText(), "data_collator": padded, "train_sampling_strategy": "sequential", "max_steps": 4}
    uneven |= {"per_device_train_batch_size": 1, **PHASES}
    train("ddp", SAMPLED, **SAVING)
    train("uneven_ddp", THRESHOLD, **uneven)
    train("zero2", SAMPLED, **SAVING, deepspeed=settings)
    train("resumed", SAMPLED, "again", str(out / "zero2" / "checkpoint-2"), **SAVING, deepspeed=settings)
    train("uneven_zero2", THRESHOLD, **uneven, deepspeed=settings)
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found, default=str), encoding="utf-8")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()
